"""Who sees whom: masks as pure functions, the key/value cache, and grouped-query attention over both."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.config import DecoderConfig
from multimodal.layers import Rotary, build_norm, rotate


class SparseMask(Protocol):
    """A mask whose product is computed without the pairs that it hides (multimodal/packed_texts.py)."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...


# Masks are boolean [..., queries, keys], True = may look. None = everything may look at everything.
Mask = Tensor | SparseMask | None


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Queries are the last `num_queries` of `num_keys` positions; each sees itself and what precedes it. [Q, K]"""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)
    return query[:, None] >= torch.arange(num_keys, device=device)[None]


def prefix_mask(num_prefix: int, length: int, device: torch.device | None = None) -> Tensor:
    """A prefix that sees itself whole, then causal positions that see the prefix and their past. [T, T]"""
    keys = torch.arange(length, device=device)
    return causal_mask(length, length, device) | (keys[None] < num_prefix).expand(length, length)


def block_mask(blocks: Tensor) -> Tensor:
    """Block-causal: a position sees every position whose block index is not larger. blocks [T] -> [T, T]"""
    return blocks[:, None] >= blocks[None]


def tree_mask(parents: Sequence[int]) -> Tensor:
    """Each node of a draft tree sees itself and its ancestors; parents[i] < i, or -1 for a root. [T, T]"""
    rows: list[list[bool]] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parents[{node}] is {parent}; a parent precedes its child (or is -1).")
        row = list(rows[parent]) if parent >= 0 else [False] * len(parents)
        row[node] = True
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).view(len(parents), len(parents))


def ragged_mask(starts: Sequence[int], blocks: Tensor) -> Tensor:
    """Sequences of different lengths in one pass: row r's queries see its keys before starts[r], and of the N that follow what
    blocks[r] says. blocks bool [R, M, N] (causal, a tree, a diagonal for padding) -> [R, 1, M, max(starts) + N]
    """
    num_rows, num_queries, num_new = blocks.shape
    keys = torch.arange(max(starts) + num_new, device=blocks.device)
    offset = keys - torch.tensor(starts, device=blocks.device)[:, None]  # [R, K], from the row's first new position
    index = offset.clamp(0, num_new - 1)[:, None].expand(num_rows, num_queries, -1)
    is_new = ((offset >= 0) & (offset < num_new))[:, None]
    return ((offset < 0)[:, None] | (is_new & blocks.gather(2, index)))[:, None]


def key_padding_mask(is_real: Tensor) -> Tensor:
    """Hide padded keys from every query: is_real [B, K] -> [B, 1, 1, K]."""
    return is_real[:, None, None, :]


def within_window(mask: Mask, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Mask:
    """`mask`, and each of the last `num_queries` of `num_keys` places sees only its `window` latest, itself included.

    Raises ValueError for a sparse mask, whose places are not those of one sequence.
    """
    if window is None or num_keys <= window:
        return mask
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError("A decoder with a sliding window takes no sparse mask; set DecoderConfig.sliding_window to None.")
    query = torch.arange(num_keys - num_queries, num_keys, device=device)
    near = query[:, None] - torch.arange(num_keys, device=device)[None] < window
    return near if mask is None else mask & near


class KVCache:
    """Keys and values of every layer for positions already computed, each [B, kv_heads, length, head_dim].

    Differentiable: entries are concatenated, so gradients flow from later queries into the prefix that made them.
    """

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions [B, kv_heads, T, head_dim] to a layer; returns all of its keys and values."""
        if self.keys[layer] is not None:
            keys = torch.cat([self.keys[layer], keys], dim=2)
            values = torch.cat([self.values[layer], values], dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def rollback(self, length: int) -> None:
        """Forget positions from `length` on. Raises ValueError beyond the current length."""
        if not 0 <= length <= self.length:
            raise ValueError(f"Cannot roll back to {length}: the cache holds {self.length} positions.")
        self._keep(lambda tensor: tensor[:, :, :length])

    def commit(self, start: int, path: Tensor) -> None:
        """Of the positions from `start` on keep those at offsets `path` [T], in that order; drop the others."""
        index = torch.cat([torch.arange(start, device=path.device), start + path])
        self._keep(lambda tensor: tensor.index_select(2, index))

    def repeat(self, times: int) -> "KVCache":
        """A cache whose batch holds each row `times` times in a row; shares the graph of this one."""
        copy = KVCache(len(self.keys))
        copy.keys = [keys.repeat_interleave(times, dim=0) for keys in self.keys]
        copy.values = [values.repeat_interleave(times, dim=0) for values in self.values]
        return copy

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of the batch rows `rows` [R]."""
        copy = KVCache(len(self.keys))
        copy.keys = [keys.index_select(0, rows) for keys in self.keys]
        copy.values = [values.index_select(0, rows) for values in self.values]
        return copy

    def joined(self) -> "KVCache":
        """A cache of one row that holds this one's rows side by side; shares the graph of this one."""
        copy = KVCache(len(self.keys))
        copy.keys = [keys.transpose(0, 1).flatten(1, 2)[None] for keys in self.keys]
        copy.values = [values.transpose(0, 1).flatten(1, 2)[None] for values in self.values]
        return copy

    def view(self) -> "KVCache":
        """Another cache on the same tensors: what is appended to it leaves this one as it is."""
        copy = KVCache(len(self.keys))
        copy.keys, copy.values = list(self.keys), list(self.values)
        return copy

    def _keep(self, keep) -> None:
        self.keys = [None if tensor is None else keep(tensor) for tensor in self.keys]
        self.values = [None if tensor is None else keep(tensor) for tensor in self.values]


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention: query [B, heads, Q, d], keys and values [B, kv_heads, K, d] -> [B, heads, Q, d].

    torch's scaled_dot_product_attention, except for bfloat16 on the CPU: its backward there takes three times as long as
    these two products (torch 2.10, 64 x 3 heads x 56 queries x 171 keys, one thread: 80 ms against 24 ms).
    """
    if mask is not None and not isinstance(mask, Tensor):
        return mask.attend(query, keys, values)
    groups = query.shape[1] // keys.shape[1]
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if mask is not None:
            scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1) @ values
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=groups > 1)


class Attention(nn.Module):
    """Queries, keys and values of one layer; the cache keeps the latter two."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.sliding_window
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        width = config.hidden_size
        self.query = nn.Linear(width, self.num_heads * self.head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(width, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(width, self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.output = nn.Linear(self.num_heads * self.head_dim, width, bias=config.output_bias)
        self.query_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.key_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]

    def keys_values(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values of x [B, T, width], appended to the cache if there is one."""
        keys = self.key_norm(self._heads(self.key(x), self.kv_heads))
        values = self._heads(self.value(x), self.kv_heads)
        if angles is not None:
            keys = rotate(keys, *angles)
        return (keys, values) if cache is None else cache.append(self.layer, keys, values)

    def forward(
        self, x: Tensor, mask: Mask, angles: tuple[Tensor, Tensor] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x [B, T, width]; mask broadcasts to [B, heads, T, cached + T], or is sparse. Returns [B, T, width]."""
        keys, values = self.keys_values(x, angles, cache)
        query = self.query_norm(self._heads(self.query(x), self.num_heads))
        if angles is not None:
            query = rotate(query, *angles)
        mask = within_window(mask, query.shape[2], keys.shape[2], self.window, x.device)
        return self.output(attend(query, keys, values, mask).transpose(1, 2).flatten(2))
