"""Modalities: the box of valid inputs, and the patches that a trunk reads. All of it differentiable in the inputs.

    image, depth, thermal   [C, S, S]        a token per 8 x 8 pixels, by three strided convolutions
    video                   [3, T, S, S]     a token per 2 frames and 8 x 8 pixels
    audio                   [samples]        waveform -> log-mel picture -> as a picture
    point                   [N, 3]           a token per neighbourhood of 16 far-apart points
    trace                   [6, samples]     a token per 4 samples of force and acceleration
    text                    [ids]            a token per id; no perturbation, since an id has no neighbours

Strided convolutions instead of one large patch matrix: trained from scratch on thousands of samples they generalise much
better (Xiao et al. 2021, "Early convolutions help transformers see better"). Normalisation lives in here, so that attacks
work in the sensor's own unit.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.interface import Box
from multimodal.bind.sensors import SAMPLE_RATE, SENSORS, get_sensor

PICTURES = ("image", "depth", "thermal")
TEXT = "text"
MODALITIES = (*SENSORS, TEXT)
PATCH = 8  # pixels
NUM_GROUPS, GROUP_SIZE = 16, 32  # of a point cloud: tokens, points of each
MEL_SIZE = 32  # bands and frames of the log-mel picture


def box_of(modality: str, vocab_size: int = 0) -> Box:
    """The valid inputs of a modality. Raises ValueError listing the modalities."""
    if modality == TEXT:
        return Box(0, max(vocab_size - 1, 0), "token id", 0.0)
    sensor = get_sensor(modality)
    return Box(sensor.low, sensor.high, sensor.unit, sensor.step)


class Standardise(nn.Module):
    """(x - mean) / std with fixed numbers, measured on training inputs; part of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def measure(self, values: Tensor) -> None:
        self.mean.fill_(float(values.mean()))
        self.std.fill_(max(float(values.std()), 1e-6))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


class PicturePatches(nn.Module):
    """[B, C, H, W] -> [B, H W / 64, width], row by row."""

    def __init__(self, channels: int, height: int, width_pixels: int, width: int, last: int | None = None) -> None:
        """last: channels of the last convolution; none: width."""
        super().__init__()
        if height % PATCH or width_pixels % PATCH:
            raise ValueError(f"Pictures are {height} x {width_pixels}; expected multiples of {PATCH} pixels.")
        self.num_tokens = height * width_pixels // PATCH**2
        self.standardise = Standardise()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, last or width, 3, stride=2, padding=1),
        )

    def features(self, inputs: Tensor) -> Tensor:
        """What is standardised."""
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(self.standardise(self.features(inputs))).flatten(2).transpose(1, 2)


class VideoPatches(PicturePatches):
    """[B, 3, T, S, S] -> [B, T / 2 * S S / 64, width], frame pair by frame pair."""

    def __init__(self, frames: int, size: int, width: int) -> None:
        super().__init__(3, size, size, width, width // 2)
        if frames % 2:
            raise ValueError(f"A video of {frames} frames cannot be cut into pairs; use an even number.")
        self.num_tokens *= frames // 2
        self.pair = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        batch, _, frames = inputs.shape[:3]
        patches = super().forward(inputs.transpose(1, 2).flatten(0, 1))  # [B T, P, width / 2]
        pairs = patches.view(batch, frames // 2, 2, *patches.shape[1:]).transpose(2, 3).flatten(3)
        return self.pair(pairs).flatten(1, 2)


class LogMel(nn.Module):
    """Waveforms [B, samples] -> log power in mel bands [B, 1, MEL_SIZE frames, MEL_SIZE bands].

    The Fourier transform is a product with a fixed matrix, and the logarithm has a floor of the room's noise, so that the
    gradient is finite everywhere and the graph exports. Triangles on the mel scale of O'Shaughnessy: 2595 log10(1 + f / 700).
    """

    FLOOR = 1e-2
    window: Tensor
    transform: Tensor
    triangles: Tensor

    def __init__(self, samples: int, sample_rate: int = SAMPLE_RATE, size: int = 256) -> None:
        super().__init__()
        self.hop, self.size = samples // MEL_SIZE, size
        if self.hop < 1:
            raise ValueError(f"A waveform of {samples} samples is too short for {MEL_SIZE} frames.")
        time, bins = torch.arange(size, dtype=torch.float64), torch.arange(size // 2 + 1, dtype=torch.float64)
        phase = 2 * math.pi * time[:, None] * bins / size
        self.register_buffer("window", torch.hann_window(size, dtype=torch.float64).float(), persistent=False)
        self.register_buffer("transform", torch.cat([phase.cos(), phase.sin()], 1).float(), persistent=False)
        self.register_buffer("triangles", mel_triangles(MEL_SIZE, size, sample_rate), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform, (self.size // 2, self.size // 2))
        frames = padded.unfold(1, self.size, self.hop)[:, :MEL_SIZE] * self.window  # [B, frames, size]
        cosine, sine = (frames @ self.transform).chunk(2, dim=-1)
        power = (cosine.square() + sine.square()) @ self.triangles  # [B, frames, bands]
        return torch.log(power + self.FLOOR)[:, None]


def mel_triangles(num_bands: int, size: int, sample_rate: int) -> Tensor:
    """Weights [size / 2 + 1, num_bands] of Fourier bins in overlapping triangles, evenly spaced in mel."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, num_bands + 2, dtype=torch.float64) / 2595) - 1)  # Hz
    edges = torch.maximum(edges, torch.arange(num_bands + 2) * sample_rate / size / 2)  # none narrower than half a bin
    frequency = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None] * sample_rate / size
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


class AudioPatches(PicturePatches):
    """[B, samples] -> [B, 16, width] by way of the log-mel picture."""

    def __init__(self, samples: int, width: int) -> None:
        super().__init__(1, MEL_SIZE, MEL_SIZE, width)
        self.log_mel = LogMel(samples)

    def features(self, inputs: Tensor) -> Tensor:
        return self.log_mel(inputs)


class TracePatches(nn.Module):
    """[B, C, samples] -> [B, samples / 4, width]."""

    def __init__(self, channels: int, samples: int, width: int) -> None:
        super().__init__()
        if samples % 4:
            raise ValueError(f"A trace of {samples} samples is not a multiple of 4.")
        self.num_tokens = samples // 4
        self.standardise = Standardise()
        self.layers = nn.Sequential(
            nn.Conv1d(channels, width // 2, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv1d(width // 2, width, 3, stride=2, padding=1),
        )

    def features(self, inputs: Tensor) -> Tensor:
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(self.standardise(inputs)).transpose(1, 2)


class PointPatches(nn.Module):
    """[B, N, 3] -> [B, NUM_GROUPS, width]: neighbourhoods of far-apart points, each through a small PointNet (Point-BERT).

    Which points are neighbours is piecewise constant in the inputs; where they are is differentiable.
    """

    def __init__(self, points: int, width: int) -> None:
        super().__init__()
        self.num_tokens, self.group_size = NUM_GROUPS, min(GROUP_SIZE, points)
        if points < NUM_GROUPS:
            raise ValueError(f"A cloud of {points} points is too small for {NUM_GROUPS} neighbourhoods.")
        self.standardise = Standardise()
        self.lift = nn.Sequential(nn.Linear(3, width // 2), nn.GELU(), nn.Linear(width // 2, width))
        self.place = nn.Sequential(nn.Linear(3, width // 2), nn.GELU(), nn.Linear(width // 2, width))

    def features(self, inputs: Tensor) -> Tensor:
        return inputs

    def forward(self, inputs: Tensor) -> Tensor:
        points = self.standardise(inputs)
        centres = take(points, farthest_points(points.detach(), self.num_tokens))  # [B, G, 3]
        distance = torch.cdist(centres.detach(), points.detach())
        near = distance.topk(self.group_size, largest=False).indices  # [B, G, group_size]
        groups = take(points, near.flatten(1)).view(*near.shape, 3) - centres[:, :, None]
        return self.lift(groups).amax(2) + self.place(centres)


def take(points: Tensor, index: Tensor) -> Tensor:
    """points [B, N, 3] at index [B, M] -> [B, M, 3]."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Indices [B, count] of points [B, N, 3], each farthest from those before it; the first from the mean. Deterministic."""
    nearest = (points - points.mean(1, keepdim=True)).square().sum(-1)  # [B, N]
    chosen = [nearest.argmax(1)]
    nearest = torch.full_like(nearest, torch.inf)
    for _ in range(count - 1):
        latest = take(points, chosen[-1][:, None])
        nearest = torch.minimum(nearest, (points - latest).square().sum(-1))
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, 1)


def build_patches(modality: str, shape: tuple[int, ...], width: int) -> nn.Module:
    """The patch embedding of a sensor's modality; `shape` is one sample's. Raises ValueError for another number of axes."""
    get_sensor(modality)
    axes = {"video": 4, "audio": 1, "trace": 2, "point": 2}.get(modality, 3)
    if len(shape) != axes:
        raise ValueError(
            f"A sample of {modality} has shape {list(shape)}; expected {axes} axes (see multimodal/bind/modalities.py)."
        )
    if modality == "video":
        return VideoPatches(shape[1], shape[2], width)
    if modality == "audio":
        return AudioPatches(shape[0], width)
    if modality == "trace":
        return TracePatches(*shape, width)
    return PointPatches(shape[0], width) if modality == "point" else PicturePatches(*shape, width)
