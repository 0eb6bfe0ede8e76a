"""Keys and values of many sequences of different lengths in one preallocated buffer: what an engine decodes with.

A slot is one sequence. A forward pass over some slots writes its new positions behind each slot's length and reads a view; only
`commit` makes written positions part of the sequence, so a rejected draft is forgotten by doing nothing. Not differentiable:
training and the policy use `multimodal.attention.KVCache`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal.config import DecoderConfig


class SlotCache:
    """Buffer [2, layers, slots, kv_heads, capacity, head_dim] and the committed length of each slot."""

    def __init__(
        self, config: DecoderConfig, num_slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        # Zeros: positions never written are masked, but zero weight times an uninitialised NaN would be NaN.
        shape = (2, config.num_layers, num_slots, config.kv_heads, capacity, config.head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * num_slots

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def rows(self, slots: Sequence[int], num_new: int, starts: Sequence[int] | None = None) -> "SlotRows":
        """The cache argument of one forward pass of [len(slots), num_new] positions.

        starts: where each slot's new positions are written; default its length. Raises ValueError beyond the capacity.
        """
        starts = [self.lengths[slot] for slot in slots] if starts is None else list(starts)
        if max(starts) + num_new > self.capacity:
            raise ValueError(
                f"{num_new} new positions after {max(starts)} exceed a slot's capacity of {self.capacity}; admit shorter "
                "requests or build the cache with a larger capacity."
            )
        return SlotRows(self, list(slots), starts, num_new)

    def commit(self, slot: int, path: Sequence[int], start: int | None = None) -> None:
        """Of the positions written behind `start` (default: the slot's length) keep those at offsets `path`, in that order."""
        start = self.lengths[slot] if start is None else start
        if list(path) != list(range(len(path))):
            index = torch.tensor(path, device=self.buffer.device) + start
            row = self.buffer[:, :, slot]  # [2, layers, kv_heads, capacity, head_dim]
            row[:, :, :, start : start + len(path)] = row.index_select(3, index)  # index_select copies, so overlap is safe
        self.lengths[slot] = start + len(path)

    def rollback(self, slot: int, length: int) -> None:
        """Forget a slot's positions from `length` on. Raises ValueError beyond its length."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"Cannot roll back slot {slot} to {length}: it holds {self.lengths[slot]} positions.")
        self.lengths[slot] = length

    def erase(self, slot: int) -> None:
        """Empty a slot that took values that are not finite: masked or not, the next sequence there would inherit NaN."""
        self.buffer[:, :, slot].zero_()
        self.lengths[slot] = 0


class SlotRows:
    """Some slots of a cache for one forward pass; stands where `Attention` expects a KVCache."""

    def __init__(self, cache: SlotCache, slots: list[int], starts: list[int], num_new: int) -> None:
        self.cache, self.slots, self.starts, self.num_new = cache, slots, starts, num_new
        self.num_keys = max(starts) + num_new
        device = cache.buffer.device
        self._is_range = slots == list(range(slots[0], slots[0] + len(slots)))
        self._are_level = min(starts) == max(starts)
        self._slot_index = None if self._is_range else torch.tensor(slots, device=device)
        if not (self._is_range and self._are_level):
            self._target_slots = torch.tensor(slots, device=device)[:, None]
            self._target_positions = torch.tensor(starts, device=device)[:, None] + torch.arange(num_new, device=device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions [R, kv_heads, M, head_dim] of a layer; keys and values [R, kv_heads, K, head_dim] to look at.

        K = the largest start + M. What lies behind a shorter row's new positions is stale and must be masked.
        """
        store = self.cache.buffer[:, layer]
        if self._is_range and self._are_level:
            first, start = self.slots[0], self.starts[0]
            block = store[:, first : first + len(self.slots), :, start : start + self.num_new]
            block[0], block[1] = keys, values
        else:
            store[0][self._target_slots, :, self._target_positions] = keys.transpose(1, 2)
            store[1][self._target_slots, :, self._target_positions] = values.transpose(1, 2)
        if self._is_range:
            seen = store[:, self.slots[0] : self.slots[0] + len(self.slots), :, : self.num_keys]
        else:
            seen = store[:, :, :, : self.num_keys].index_select(1, self._slot_index)
        return seen[0], seen[1]
