"""Camera frames to model range: crop, colour jitter in training, normalisation; one path for training and inference.

All of it is affine per pixel, so crop, jitter and normalisation cost one pass over the cropped image: 0.3 ms for a
128-pixel image on one busy core (`pytest -s tests/test_images.py` prints the figure of the machine at hand).
Where there is no torch, inference uses its twin, `multimodal.numpy_images`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.config import ImageConfig

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision and PIL define grey


def prepare_images(images: Tensor, config: ImageConfig, generator: torch.Generator | None = None) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, h, w] with h = w = config.output_size.

    Without a generator: centre crop, no jitter, deterministic. With one (training): each image gets its own crop and
    colour factors, drawn from the generator only, so equal seeds give equal images on one kind of device.
    Raises ValueError for another dtype or shape, or an image smaller than the crop.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"Images are {images.dtype} {list(images.shape)}; expected uint8 [..., H, W, 3].")
    height, width = images.shape[-3:-1]
    if min(height, width) < config.crop:
        raise ValueError(f"Images of {height} x {width} pixels are smaller than the crop of {config.crop}; lower it: --images.crop={int(0.95 * min(height, width))} (lerobot-train: --policy.images.crop).")
    frames = images.reshape(-1, height, width, 3)  # [N, H, W, 3]
    corners = _corners(len(frames), height - config.crop, width - config.crop, generator).to(frames.device)
    cropped = cut(frames, corners, config.crop).float()  # [N, 3, crop, crop], 0..255
    factors = _factors(len(frames), config, generator).to(frames.device)
    result = recolour(cropped, factors, config.mean, config.std)
    if config.output_size != config.crop:
        sides = (config.output_size, config.output_size)
        result = F.interpolate(result, sides, mode="bilinear", antialias=True, align_corners=False)
    return result.reshape(*images.shape[:-3], 3, config.output_size, config.output_size)


def scale_frame(image: Tensor, side: int | None) -> Tensor:
    """uint8 [H, W, 3], its shorter side scaled to `side` pixels; as it is without one, or if it fits."""
    short = min(image.shape[:2])
    if side is None or short == side:
        return image
    size = [round(length * side / short) for length in image.shape[:2]]
    scaled = F.interpolate(image.permute(2, 0, 1)[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def prepare_pixels(frames: Tensor, config: ImageConfig) -> Tensor:
    """`prepare_images` without jitter for frames whose values are floats, differentiable in them: what an attacker goes through.

    frames: float [..., H, W, 3] in 0..255 -> [..., 3, h, w]. Equal to `prepare_images` at whole values up to rounding.
    """
    height, width = frames.shape[-3:-1]
    top, left = (height - config.crop) // 2, (width - config.crop) // 2
    pixels = frames[..., top : top + config.crop, left : left + config.crop, :].movedim(-1, -3)
    mean, std = (torch.tensor(values, device=frames.device, dtype=frames.dtype)[:, None, None] for values in (config.mean, config.std))
    result = (pixels / 255 - mean) / std
    if config.output_size == config.crop:
        return result
    sides = (config.output_size, config.output_size)
    flat = F.interpolate(result.flatten(0, -4), sides, mode="bilinear", antialias=True, align_corners=False)
    return flat.unflatten(0, result.shape[:-3])


def cut(frames: Tensor, corners: Tensor, crop: int) -> Tensor:
    """Squares of `crop` pixels: frames [N, H, W, 3], corners int64 [N, 2] (top, left) -> [N, 3, crop, crop]."""
    every_crop = frames.unfold(1, crop, 1).unfold(2, crop, 1)  # a view [N, H-crop+1, W-crop+1, 3, crop, crop]
    return every_crop[torch.arange(len(frames), device=frames.device), corners[:, 0], corners[:, 1]]


def recolour(pixels: Tensor, factors: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Brightness, then contrast about the image's mean grey, then saturation, then (x - mean) / std.

    pixels float [N, 3, h, w] in 0..255; factors [N, 3] (brightness, contrast, saturation). Colours are clipped to the
    displayable range once, at the end. Equal to `recolour_reference` up to rounding; here the three jitters are one
    3 x 3 matrix and an offset per image.
    """
    luma, mean, std = (torch.tensor(values, device=pixels.device) for values in (_LUMA, mean, std))
    brightness, contrast, saturation = factors.T[:, :, None, None]  # each [N, 1, 1]
    grey = pixels.mean(dim=(2, 3)) @ luma  # [N]
    mix = saturation * torch.eye(3, device=pixels.device) + (1 - saturation) * luma  # [N, 3 out, 3 in]
    matrix = brightness * contrast * mix / (255 * std[:, None])
    offset = (brightness * (1 - contrast) * grey[:, None, None] / 255).squeeze(-1)  # [N, 1]
    offset = (offset - mean) / std  # [N, 3]
    result = torch.empty_like(pixels)
    for channel in range(3):  # in place: allocating a temporary costs more than the arithmetic
        plane, weights = result[:, channel], matrix[:, channel, :, None, None]  # [N, h, w], [N, 3, 1, 1]
        torch.mul(pixels[:, 0], weights[:, 0], out=plane)
        plane.addcmul_(pixels[:, 1], weights[:, 1]).addcmul_(pixels[:, 2], weights[:, 2])
        plane.add_(offset[:, channel, None, None])
        plane.clamp_(float(-mean[channel] / std[channel]), float((1 - mean[channel]) / std[channel]))
    return result


def recolour_reference(pixels: Tensor, factors: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The definition of `recolour`, one jitter after the other, in the dtype of `pixels`."""
    luma, mean, std = (torch.tensor(values, dtype=pixels.dtype)[:, None, None] for values in (_LUMA, mean, std))
    brightness, contrast, saturation = factors.to(pixels.dtype).T[:, :, None, None, None]  # each [N, 1, 1, 1]
    colours = pixels / 255 * brightness
    average = (colours * luma).sum(1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    colours = contrast * colours + (1 - contrast) * average
    grey = (colours * luma).sum(1, keepdim=True)
    colours = saturation * colours + (1 - saturation) * grey
    return (colours.clamp(0, 1) - mean) / std


def _corners(count: int, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """Top left corners int64 [count, 2] within 0..rows and 0..columns; the centre without a generator."""
    if generator is None:
        return torch.tensor([[rows // 2, columns // 2]]).expand(count, 2)
    share = torch.rand(count, 2, generator=generator, device=generator.device)
    return (share * torch.tensor([rows + 1, columns + 1], device=generator.device)).long()


def _factors(count: int, config: ImageConfig, generator: torch.Generator | None) -> Tensor:
    """Colour factors float [count, 3]: brightness, contrast, saturation; ones without a generator."""
    if generator is None:
        return torch.ones(count, 3)
    spread = torch.tensor([config.brightness, config.contrast, config.saturation], device=generator.device)
    return 1 + spread * (2 * torch.rand(count, 3, generator=generator, device=generator.device) - 1)
