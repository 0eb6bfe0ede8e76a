"""`multimodal.images` for inference, in numpy alone: scaling, centre crop, normalisation, resizing."""

import numpy as np

from multimodal.config import ImageConfig


def prepare_images(images: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [..., H, W, 3] -> float32 [..., 3, h, w] with h = w = config.output_size; raises what its torch twin raises."""
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"Images are {images.dtype} {list(images.shape)}; expected uint8 [..., H, W, 3].")
    height, width = images.shape[-3:-1]
    if min(height, width) < config.crop:
        raise ValueError(f"Images of {height} x {width} pixels are smaller than the crop of {config.crop}; lower it (ImageConfig).")
    top, left = (height - config.crop) // 2, (width - config.crop) // 2
    cropped = images[..., top : top + config.crop, left : left + config.crop, :]
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    pixels = cropped * (1 / (255 * std)) - mean / std  # float32 [..., crop, crop, 3]
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
    return planes if config.output_size == config.crop else resized(planes, config.output_size)


def resized(planes: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with antialiasing, both sides to `size` pixels: float32 [..., h, w] -> [..., size, size].

    What torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False) computes.
    """
    rows, columns = (resize_weights(length, size) for length in planes.shape[-2:])
    return rows @ planes @ columns.T


def resize_weights(length: int, size: int) -> np.ndarray:
    """The share each of `length` pixels has in each of `size`: float32 [size, length], rows sum to one.

    A triangle around the pixel's centre, two pixels wide on the coarser of the two grids, cut off at the borders.
    """
    scale = length / size
    reach = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / reach
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def scaled_frame(image: np.ndarray, side: int | None) -> np.ndarray:
    """Twin of `multimodal.images.scale_frame`: uint8 [H, W, 3], its shorter side scaled to `side` pixels."""
    short = min(image.shape[:2])
    if side is None or short == side:
        return image
    rows, columns = (resize_weights(length, round(length * side / short)) for length in image.shape[:2])
    planes = rows @ np.moveaxis(image.astype(np.float32), -1, 0) @ columns.T
    return np.moveaxis(planes.round().clip(0, 255).astype(np.uint8), 0, -1)
