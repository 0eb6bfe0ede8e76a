"""Frames of any shape to square frames: scaled to fit, black bars around; one function for import, training and acting."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_square(frames: Tensor, size: int) -> Tensor:
    """uint8 [..., H, W, 3] -> uint8 [..., size, size, 3]: the longer side becomes `size`, the shorter is padded with black.

    Bilinear with antialiasing; a frame that is square and of that size already comes back as it is.
    Raises ValueError for another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"Frames are {frames.dtype} {list(frames.shape)}; expected uint8 [..., H, W, 3].")
    height, width = frames.shape[-3:-1]
    if (height, width) == (size, size):
        return frames
    longer = max(height, width)
    rows, columns = (max(1, round(side * size / longer)) for side in (height, width))
    planes = frames.reshape(-1, height, width, 3).permute(0, 3, 1, 2).float()
    if (rows, columns) != (height, width):
        planes = F.interpolate(planes, (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    top, left = (size - rows) // 2, (size - columns) // 2
    planes = F.pad(planes, (left, size - columns - left, top, size - rows - top))
    fitted = planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return fitted.reshape(*frames.shape[:-3], size, size, 3)
