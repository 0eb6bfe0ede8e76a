"""Attention of many texts of different lengths, each after its scene's images, without padding between them.

All of a batch's texts stand in one row of N positions and all of its scenes' image tokens in one row before them, so that
everything position by position (projections, MLP, norms: most of the work) meets real tokens alone. Only attention pads, in
groups of texts of like length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 8  # texts of one padded product: sorted by length, so that little of it is padding
# Positions of the row, and of a group's longest text, are rounded up, so that a batch's tensors have the sizes of the last one's. A
# new size in every step scatters glibc's heap until half of a step is spent looking for room (docs/log.md, 2026-11-30).
ROW_MULTIPLE, TEXT_MULTIPLE = 256, 16


@dataclass(frozen=True)
class _Group:
    """Some texts of like length L, side by side in the row, and where their padded block [G, L] meets it."""

    start: int  # first position
    stop: int
    scenes: Tensor  # int64 [G] whose images each text sees
    queries: Tensor  # int64 [G * L] positions; padding repeats a text's last
    keys: Tensor  # int64 [G * (P + L)] each text's image positions and its own, among all keys
    real: Tensor  # int64 [stop - start] places of the positions in the block
    is_padding: Tensor  # bool [G * L, 1]
    hidden: Tensor  # bool [G, L, P + L] whom a query must not see


class PackedTexts:
    """Stands where the decoder expects a mask: queries are N text positions, keys R * P image positions and those N.

    The last of the N are padding: nothing sees them, they see nothing, and attention gives them zeros.
    """

    def __init__(self, segment: Tensor, prefix: int) -> None:
        """segment: int64 [R, T], the texts of each of R scenes by number, side by side, -1 for padding; prefix: image
        tokens of a scene, P."""
        self.num_scenes, self.prefix = len(segment), prefix
        scene, start, length = _texts(segment)
        order = torch.argsort(length, stable=True)
        scene, start, length = scene[order], start[order], length[order]
        self.places = _ranges(start + scene * segment.shape[1], length)  # int64 [n] into the flat [R * T], padding left out
        self.num_positions = rounded_up(len(self.places), ROW_MULTIPLE)  # N
        self.groups: list[_Group] = []
        first = 0
        for texts in range(0, len(length), GROUP):
            self.groups.append(self._group(first, scene[texts : texts + GROUP], length[texts : texts + GROUP]))
            first = self.groups[-1].stop

    @property
    def num_image_positions(self) -> int:
        return self.num_scenes * self.prefix

    def pad(self, values: Tensor) -> Tensor:
        """Values [n] of the places -> [N], zeros behind them."""
        return torch.nn.functional.pad(values, (0, self.num_positions - len(values)))

    def dense(self) -> Tensor:
        """The same as a boolean mask [1, 1, N, R * P + N]: the definition."""
        total = self.num_positions
        mask = torch.zeros(total, self.num_image_positions + total, dtype=torch.bool, device=self.places.device)
        for group in self.groups:
            block = group.hidden.logical_not().flatten(0, 1)[group.real]  # [n, P + L]
            keys = group.keys.view(len(group.scenes), 1, -1).expand_as(group.hidden).flatten(0, 1)[group.real]
            for query, (seen, key) in enumerate(zip(block, keys, strict=True), group.start):
                mask[query, key[seen]] = True
        return mask[None, None]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [1, heads, N, d], keys and values [1, kv_heads, R * P + N, d] -> [1, heads, N, d]."""
        shared = query.shape[1] // keys.shape[1]
        if shared > 1:
            keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
        return _Attention.apply(query[0], keys[0], values[0], self)[None]

    def _group(self, first: int, scenes: Tensor, lengths: Tensor) -> _Group:
        count, longest = len(lengths), rounded_up(int(lengths.max()), TEXT_MULTIPLE)
        place = torch.arange(longest, device=lengths.device)
        starts = first + lengths.cumsum(0) - lengths
        own = starts[:, None] + torch.minimum(place[None], lengths[:, None] - 1)  # [G, L]
        images = scenes[:, None] * self.prefix + torch.arange(self.prefix, device=scenes.device)  # [G, P]
        is_seen = (place < lengths[:, None, None]) & (place <= place[:, None])  # [G, L, L]
        hidden = torch.cat([is_seen.new_zeros(count, longest, self.prefix), ~is_seen], dim=2)
        real = _ranges(torch.arange(count, device=lengths.device) * longest, lengths)
        keys = torch.cat([images, self.num_image_positions + own], dim=1).flatten()
        is_padding = (place >= lengths[:, None]).flatten()[:, None]
        return _Group(first, first + int(lengths.sum()), scenes, own.flatten(), keys, real, is_padding, hidden)


class _Attention(torch.autograd.Function):
    """softmax(query keys^T / sqrt(d)) values, group by group; query [H, N, d], keys and values [H, R * P + N, d] -> [H, N, d].

    By hand, because autograd's gradient of a gather adds up element by element on the CPU, which takes longer than attention.
    """

    @staticmethod
    def forward(context, query: Tensor, keys: Tensor, values: Tensor, texts: PackedTexts) -> Tensor:
        heads, size, kept = len(query), query.shape[-1], []
        result = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in texts.groups:
            count, length, seen = group.hidden.shape
            own_query = (query.index_select(1, group.queries) * size**-0.5).view(heads * count, length, size)
            own_keys = keys.index_select(1, group.keys).view(heads * count, seen, size)
            own_values = values.index_select(1, group.keys).view(heads * count, seen, size)
            scores = torch.bmm(own_query, own_keys.transpose(1, 2)).view(heads, count, length, seen)
            weights = torch.softmax(scores.masked_fill_(group.hidden, -torch.inf), dim=-1).view(heads * count, length, seen)
            weights = weights.to(own_values.dtype)  # autocast on CUDA, not on the CPU, makes a softmax float32
            mixed = torch.bmm(weights, own_values).view(heads, count * length, size)
            result[:, group.start : group.stop] = mixed.index_select(1, group.real)
            kept += [own_query, own_keys, own_values, weights]
        result[:, len(texts.places) :] = 0
        context.texts, context.num_keys = texts, keys.shape[1]
        context.save_for_backward(*kept)
        return result

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        texts, kept = context.texts, context.saved_tensors
        heads, size = len(gradient), gradient.shape[-1]
        to_query = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        to_keys, to_values = gradient.new_zeros(2, heads, context.num_keys, size)
        for number, group in enumerate(texts.groups):
            query, keys, values, weights = kept[4 * number : 4 * number + 4]
            count, length, _ = group.hidden.shape
            upstream = gradient.index_select(1, group.queries).masked_fill_(group.is_padding, 0).view(-1, length, size)
            to_weights = torch.bmm(upstream, values.transpose(1, 2))
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            own = torch.bmm(to_scores, keys).mul_(size**-0.5).view(heads, count * length, size)
            to_query[:, group.start : group.stop] = own.index_select(1, group.real)
            _add(to_keys, torch.bmm(to_scores.transpose(1, 2), query).view(heads, count, -1, size), group, texts)
            _add(to_values, torch.bmm(weights.transpose(1, 2), upstream).view(heads, count, -1, size), group, texts)
        to_query[:, len(texts.places) :] = 0
        return to_query, to_keys, to_values, None


def _add(total: Tensor, part: Tensor, group: _Group, texts: PackedTexts) -> None:
    """Add a group's gradient part [H, G, P + L, d] to total [H, R * P + N, d]; its texts' own positions are its alone."""
    images = texts.num_image_positions
    by_scene = total[:, :images].unflatten(1, (texts.num_scenes, texts.prefix))
    by_scene.index_add_(1, group.scenes, part[:, :, : texts.prefix])
    own = part[:, :, texts.prefix :].flatten(1, 2)
    total[:, images + group.start : images + group.stop] = own.index_select(1, group.real)


def rounded_up(count: int, multiple: int) -> int:
    """The least multiple that holds `count`."""
    return -(-count // multiple) * multiple


def _texts(segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scene, first place in its row, and length of each text of segment [R, T]."""
    before = torch.cat([torch.full_like(segment[:, :1], -1), segment[:, :-1]], dim=1)
    scene, start = ((segment != before) & (segment >= 0)).nonzero().T
    length = (segment[scene] == segment[scene, start][:, None]).sum(1)
    return scene, start, length


def _ranges(start: Tensor, length: Tensor) -> Tensor:
    """start[0] .. start[0] + length[0] - 1, start[1] .. and so on: int64 [sum of lengths]."""
    offset = torch.arange(int(length.sum()), device=start.device)
    return offset + (start - (length.cumsum(0) - length)).repeat_interleave(length)
