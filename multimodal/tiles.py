"""LLaVA-NeXT's view of a large image: the whole at tower size, and tiles of it at full resolution, packed into one sequence.

Liu et al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge", and the layout of the llava-hf checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """Of the allowed canvases the one that keeps most of the image's pixels, and of those the one that wastes least."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def pack_tiles(tiles: Tensor, size: Size, canvas: Size, tile_size: int, newline: Tensor) -> Tensor:
    """Tokens of one image: the whole view, then the rows of the unpadded tiles, each with a newline behind it.

    tiles [1 + n, P, D]: features of the whole view and of the n tiles of `canvas` row by row, P = side^2. size: pixels of the
    image before it was scaled and centred on the canvas. newline [D]. Returns [T, D].
    """
    whole, parts = tiles[0], tiles[1:]
    down, across, side = canvas[0] // tile_size, canvas[1] // tile_size, round(tiles.shape[1] ** 0.5)
    if len(parts) != down * across:
        raise ValueError(f"{len(parts)} tiles for a canvas of {canvas[0]} x {canvas[1]} pixels; expected {down} x {across}.")
    plane = parts.view(down, across, side, side, -1).transpose(1, 2).reshape(down * side, across * side, -1)
    plane = unpadded(plane, size)
    rows = torch.cat([plane, newline.to(plane.dtype).expand(len(plane), 1, -1)], dim=1)
    return torch.cat([whole, rows.flatten(0, 1)])


def unpadded(plane: Tensor, size: Size) -> Tensor:
    """plane [rows, columns, D] without the rows or columns where an image of that shape left the canvas empty."""
    rows, columns = plane.shape[:2]
    height, width = size
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))  # rounding: 0.999... of a row is a row
        empty = (rows - filled) // 2
        return plane[empty : rows - empty]
    filled = int(round(width * (rows / height), 7))
    empty = (columns - filled) // 2
    return plane[:, empty : columns - empty]
