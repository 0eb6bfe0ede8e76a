"""Published towers as ModalityEncoders: CLIP and SigLIP and CLAP of transformers, CLIP and its kin of open_clip.

The box is the sensor's; resizing and each model's own normalisation happen inside `embed`, so that attacks act on what the
sensor delivers. One class wraps any differentiable function from inputs to embeddings.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.interface import Box
from multimodal.bind.modalities import box_of
from multimodal.bind.sensors import SAMPLE_RATE


class PublishedEncoder(nn.Module):
    """A ModalityEncoder around `tower`: embed(inputs) = normalise(tower(prepare(inputs)))."""

    def __init__(
        self, modality: str, tower: nn.Module, prepare: nn.Module, *, dimension: int, logit_scale: float, box: Box | None = None
    ) -> None:
        super().__init__()
        self.modality, self.dimension, self.logit_scale = modality, dimension, float(logit_scale)
        self.box = box or box_of(modality)
        self.tower, self.prepare = tower, prepare

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> unit vectors [B, dimension]."""
        return F.normalize(self.tower(self.prepare(inputs)), dim=-1)

    forward = embed


class PreparedPictures(nn.Module):
    """Pictures [B, C, H, W] in the modality's box -> [B, channels, size, size] as the tower was trained on them.

    The box is mapped to [0, 1], a single channel repeated (depth and heat go through image towers as grey pictures), the
    picture resized without cropping, then normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, box: Box, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.low, self.range, self.size = box.low, box.high - box.low, size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        share = (pictures - self.low) / self.range
        if share.shape[1] == 1 and len(self.mean) > 1:
            share = share.expand(-1, len(self.mean), -1, -1)
        if tuple(share.shape[-2:]) != (self.size, self.size):
            share = F.interpolate(share, (self.size, self.size), mode="bilinear", align_corners=False)
        return (share - self.mean) / self.std


class _Features(nn.Module):
    """A method of a model as a module: `get_image_features` and the like. transformers 5 wraps what transformers 4 returns."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, inputs: Tensor) -> Tensor:
        features = self._call(self.model, inputs)
        return features if isinstance(features, Tensor) else features.pooler_output


def _scale(logarithm: Tensor) -> float:
    return float(logarithm.detach().exp())


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's release
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
PICTURE_MODELS = {"clip": (CLIP_MEAN, CLIP_STD), "siglip": (SIGLIP_MEAN, SIGLIP_STD)}  # of their processors, by model_type


def transformers_picture_encoder(model: nn.Module, modality: str = "image") -> PublishedEncoder:
    """transformers' CLIPModel or SiglipModel over pictures of `modality`. Raises ValueError for another model."""
    kind = model.config.model_type
    if kind not in PICTURE_MODELS:
        raise ValueError(
            f"No picture encoder of model_type {kind!r}; expected {' or '.join(PICTURE_MODELS)}. Use PublishedEncoder "
            "for others."
        )
    vision, (mean, std) = model.config.vision_config, PICTURE_MODELS[kind]
    prepare = PreparedPictures(box_of(modality), vision.image_size, mean, std)
    tower = _Features(model, lambda inner, pixels: inner.get_image_features(pixel_values=pixels))
    dimension = model.config.projection_dim if kind == "clip" else vision.hidden_size
    return PublishedEncoder(modality, tower, prepare, dimension=dimension, logit_scale=_scale(model.logit_scale)).eval()


def open_clip_encoder(model: nn.Module, modality: str = "image") -> PublishedEncoder:
    """An open_clip model over pictures of `modality`; size and normalisation are its own."""
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    mean, std = getattr(visual, "image_mean", None) or CLIP_MEAN, getattr(visual, "image_std", None) or CLIP_STD
    prepare = PreparedPictures(box_of(modality), size, mean, std)
    tower = _Features(model, lambda inner, pixels: inner.encode_image(pixels))
    with torch.no_grad():
        dimension = tower(torch.zeros(1, len(mean), size, size)).shape[1]
    return PublishedEncoder(modality, tower, prepare, dimension=dimension, logit_scale=_scale(model.logit_scale)).eval()


class ClapPicture(nn.Module):
    """Waveform [B, samples] -> CLAP's input [B, 1, frames, bands]: power in mel bands in decibels, resampled and repeated.

    CLAP's own extractor runs in numpy. This is the same chain in torch, so that gradients reach the waveform: linear
    resampling to 48 kHz, repetition to the model's length, periodic Hann window, Slaney mel bands with unit area, 10 log10.
    """

    triangles: Tensor
    window: Tensor

    def __init__(
        self, *, frames: int, bands: int = 64, sample_rate: int = SAMPLE_RATE, target_rate: int = 48_000, size: int = 1024,
        hop: int = 480, lowest: float = 0.0, highest: float = 14_000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.frames, self.size, self.hop, self.factor = frames, size, hop, target_rate / sample_rate
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.register_buffer("triangles", slaney_bands(bands, size, target_rate, lowest, highest), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        faster = F.interpolate(waveform[:, None], scale_factor=self.factor, mode="linear", align_corners=False)[:, 0]
        needed = self.frames * self.hop
        repeated = faster.repeat(1, -(-needed // faster.shape[1]))[:, :needed]
        spectrum = torch.stft(
            repeated, self.size, self.hop, window=self.window, center=True, pad_mode="reflect", return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()  # [B, bins, frames + 1]
        bands = (self.triangles.T @ power)[..., : self.frames]
        return 10 * torch.log10(bands.clamp(min=1e-10)).transpose(1, 2)[:, None]


def slaney_bands(count: int, size: int, rate: int, lowest: float, highest: float) -> Tensor:
    """Weights [size / 2 + 1, count]: linear below 1 kHz, logarithmic above (Slaney's Auditory Toolbox), each of unit area."""
    step = math.log(6.4) / 27

    def to_mel(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / step

    mel = torch.linspace(to_mel(lowest), to_mel(highest), count + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp(step * (mel - 15)))
    frequency = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None] * rate / size
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])).float()


def clap_encoder(model: nn.Module, *, frames: int | None = None) -> PublishedEncoder:
    """transformers' ClapModel (without fusion) over waveforms. frames: of its input; none: spec_size^2 / mel bands, what its
    tower folds into a square."""
    audio = model.config.audio_config
    if audio.enable_fusion:
        raise ValueError(
            "This CLAP fuses several crops (enable_fusion); take a checkpoint without fusion, whose input is one picture."
        )
    frames = frames or audio.spec_size**2 // audio.num_mel_bins
    prepare = ClapPicture(frames=frames, bands=audio.num_mel_bins)
    tower = _Features(model, lambda inner, features: inner.get_audio_features(input_features=features))
    scale = _scale(model.logit_scale_a)
    return PublishedEncoder("audio", tower, prepare, dimension=model.config.projection_dim, logit_scale=scale).eval()
