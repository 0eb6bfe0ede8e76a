"""Padded batches of text and images: who sees whom, where each position stands, images in their places.

Padding may stand on either side, is_real [B, T] says where. A position that is padding sees itself, so that nothing is NaN,
and is seen by nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.attention import KVCache, causal_mask
from multimodal.vlm import VLM

Grid = tuple[int, int]  # rows and columns of an image's tokens


@dataclass(frozen=True)
class Sequences:
    """A batch that was read: what its continuation needs."""

    hidden: Tensor  # [B, T, hidden_size] of the positions read last
    cache: KVCache
    is_real: Tensor  # bool [B, all positions so far]
    next_position: Tensor  # int64 [B]


def read(vlm: VLM, ids: Tensor, is_real: Tensor, images: Sequence[Tensor] = (), grids: Sequence[Grid] = ()) -> Sequences:
    """Run a padded batch of prompts.

    ids int64 [B, T] with the config's image_token_id at every position of an image. images: features [P_i, hidden_size] in
    the order of the prompts; grids: rows and columns of each, read by M-RoPE alone.
    Raises ValueError if the marked positions are not as many as the features.
    """
    is_image = torch.zeros_like(is_real) if vlm.config.image_token_id is None else (ids == vlm.config.image_token_id) & is_real
    embedded = place_images(vlm.embed_text(ids.masked_fill(is_image, 0)), is_image, images)
    if vlm.config.decoder.positions == "mrotary":
        positions = grid_positions(is_real, is_image, grids)
    else:
        positions = text_positions(is_real)
    visible = prompt_mask(is_real) if vlm.config.bidirectional_prompt else padded_causal_mask(is_real, is_real.shape[1])
    cache = vlm.decoder.new_cache()
    hidden = vlm.decoder(embedded, visible, positions, cache)
    return Sequences(hidden, cache, is_real, following(positions, is_real))


def go_on(vlm: VLM, read_so_far: Sequences, ids: Tensor) -> Sequences:
    """Append text ids [B, T] to what was read: cached, causal. Extends the cache of `read_so_far` in place."""
    is_real = torch.cat([read_so_far.is_real, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    positions = read_so_far.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
    if vlm.config.decoder.positions == "mrotary":
        positions = positions.expand(3, -1, -1)
    hidden = vlm.decoder(vlm.embed_text(ids), padded_causal_mask(is_real, ids.shape[1]), positions, read_so_far.cache)
    return Sequences(hidden, read_so_far.cache, is_real, read_so_far.next_position + ids.shape[1])


def padded_causal_mask(is_real: Tensor, num_queries: int) -> Tensor:
    """The last `num_queries` of is_real [B, K] see themselves and the real positions before them: [B, 1, Q, K]."""
    num_keys = is_real.shape[1]
    own = torch.eye(num_keys, dtype=torch.bool, device=is_real.device)[-num_queries:]
    return (causal_mask(num_queries, num_keys, is_real.device) & is_real[:, None] | own)[:, None]


def prompt_mask(is_real: Tensor) -> Tensor:
    """Every position of is_real [B, T] sees all real ones and itself: [B, 1, T, T]."""
    own = torch.eye(is_real.shape[1], dtype=torch.bool, device=is_real.device)
    return (is_real[:, None] | own)[:, None]


def text_positions(is_real: Tensor) -> Tensor:
    """Real positions numbered from 0 in each row, padding 0: int64 [B, T]."""
    return (is_real.long().cumsum(1) - 1).clamp(min=0)


def grid_positions(is_real: Tensor, is_image: Tensor, grids: Sequence[Grid]) -> Tensor:
    """M-RoPE positions, time, row and column: int64 [3, B, T].

    Text counts on along all three axes. An image's tokens share one time, and rows and columns count from there; what follows
    stands behind the largest of them (Wang et al. 2024, Qwen2-VL, section 2.1). grids: of all images, in order.
    Raises ValueError if they do not cover the image positions.
    """
    positions = torch.zeros(3, *is_real.shape, dtype=torch.long)
    left = iter(grids)
    for row in range(len(is_real)):
        places = is_real[row].nonzero()[:, 0].tolist()
        marked = is_image[row].tolist()
        segments: list[Grid | int] = []
        index = 0
        while index < len(places):
            if not marked[places[index]]:
                segments.append(1)
                index += 1
                continue
            grid = next(left, None)
            if grid is None or not all(marked[place] for place in places[index : index + grid[0] * grid[1]]):
                raise ValueError(f"Prompt {row} marks image positions that the grids {list(grids)} do not cover.")
            segments.append(grid)
            index += grid[0] * grid[1]
        positions[:, row, places] = segment_positions(segments)
    if next(left, None) is not None:
        raise ValueError(f"{len(grids)} grids are more images than the prompts mark.")
    return positions.to(is_real.device)


def segment_positions(segments: Sequence[Grid | int]) -> Tensor:
    """M-RoPE positions of a sequence of texts (their lengths) and images (rows, columns): int64 [3, T]."""
    parts, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            parts.append(torch.arange(start, start + segment).expand(3, -1))
            start += segment
        else:
            rows, columns = (torch.arange(count) for count in segment)
            here = torch.stack(torch.broadcast_tensors(torch.zeros(1, 1).long(), rows[:, None], columns[None]))
            parts.append(start + here.flatten(1))
            start += max(segment)
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.long)


def following(positions: Tensor, is_real: Tensor) -> Tensor:
    """The position behind each row's last: positions [B, T] or [3, B, T] -> int64 [B]."""
    highest = positions if positions.ndim == 2 else positions.amax(0)
    return highest.masked_fill(~is_real, -1).amax(1) + 1


def place_images(embedded: Tensor, is_image: Tensor, images: Sequence[Tensor]) -> Tensor:
    """Put features [P_i, D] one after the other where is_image [B, T] is true of embedded [B, T, D]."""
    marked, given = int(is_image.sum()), sum(len(features) for features in images)
    if marked != given:
        raise ValueError(f"The prompts mark {marked} image positions; the images have {given} tokens.")
    if given == 0:
        return embedded
    return embedded.masked_scatter(is_image[..., None], torch.cat(list(images)).to(embedded.dtype))
