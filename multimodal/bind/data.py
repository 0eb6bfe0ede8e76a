"""Batches from a bound corpus, and the changes of viewpoint, time and gain that training adds to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal.bind.corpus_file import LABEL, BoundManifest, read_manifest, read_split
from multimodal.bind.modalities import PICTURES
from multimodal.bind.sensors import SENSORS

SHIFT_PIXELS = 3
SHIFT_SECONDS_SHARE = 0.05  # of a waveform's or trace's length
GAIN = (0.7, 1.0)  # of a waveform
SCALE = (0.9, 1.1)  # of a point cloud


class BoundSamples:
    """One split in memory, as codes; values are decoded when asked for."""

    def __init__(self, root: Path | str, split: str) -> None:
        """Raises FileNotFoundError or ValueError, see corpus_file."""
        self.root, self.split = Path(root).expanduser(), split
        self.manifest: BoundManifest = read_manifest(self.root)
        rows = read_split(self.root, split)
        self.labels = torch.from_numpy(rows[LABEL])  # int64 [n], counts in manifest.classes
        self._codes = {name: rows[name] for name in SENSORS}
        self._order: tuple[tuple[int, int], np.ndarray] | None = None  # of the epoch last asked for: (seed, epoch), order

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, modality: str, index: Sequence[int] | np.ndarray | Tensor | slice = slice(None)) -> Tensor:
        """Values of a sensor, float32 [n, *shape], in its box."""
        chosen = index.numpy() if isinstance(index, Tensor) else index if isinstance(index, slice) else np.asarray(index)
        return torch.from_numpy(SENSORS[modality].decode(self._codes[modality][chosen]))

    def batch(self, index: int, *, size: int, seed: int, modalities: Sequence[str]) -> dict[str, Tensor]:
        """Training batch number `index` of the endless stream under `seed`: every epoch each sample once, in a new order."""
        places = range(index * size, (index + 1) * size)
        chosen = np.array([self._epoch(seed, place // len(self))[place % len(self)] for place in places])
        return {name: self.inputs(name, chosen) for name in modalities} | {LABEL: self.labels[chosen]}

    def _epoch(self, seed: int, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng((seed, epoch)).permutation(len(self))
        return self._order[1]


def augment(modality: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """Values [B, *shape] as another camera, moment or loudness would have given them; each sample its own draw, in the box."""
    if modality in PICTURES or modality == "video":
        values = shifted(values, generator)
        mirrored = _uniform(len(values), (0.0, 1.0), values, generator) < 0.5
        return torch.where(mirrored.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)
    if modality == "point":
        return turned(values, generator)
    if modality == "audio":
        values = values * _uniform(len(values), GAIN, values, generator)[:, None]
    return delayed(values, generator)


def shifted(values: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, ..., H, W] moved by up to SHIFT_PIXELS, borders repeated."""
    height, width = values.shape[-2:]
    flat = values.reshape(len(values), -1, height, width)

    def places(size: int) -> Tensor:
        by = _integers(len(values), SHIFT_PIXELS, values, generator)
        return (torch.arange(size, device=values.device) + by[:, None]).clamp(0, size - 1)

    rows, columns = places(height), places(width)
    batch = torch.arange(len(values), device=values.device)[:, None, None]
    moved = flat.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).reshape(values.shape)


def delayed(values: Tensor, generator: torch.Generator) -> Tensor:
    """Signals [B, ..., T] moved in time by up to SHIFT_SECONDS_SHARE of T; the ends repeat for a trace, wrap for a waveform."""
    length = values.shape[-1]
    by = _integers(len(values), max(1, round(length * SHIFT_SECONDS_SHARE)), values, generator)
    index = torch.arange(length, device=values.device) + by[:, None]
    index = index % length if values.ndim == 2 else index.clamp(0, length - 1)
    return values.gather(-1, index.view(len(values), *[1] * (values.ndim - 2), length).expand_as(values))


def turned(points: Tensor, generator: torch.Generator) -> Tensor:
    """Clouds [B, N, 3] turned about the vertical and scaled; what leaves the box is cut off."""
    angle = _uniform(len(points), (0.0, 2 * np.pi), points, generator)
    cosine, sine, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one], 1).view(-1, 3, 3)
    scale = _uniform(len(points), SCALE, points, generator)[:, None, None]
    sensor = SENSORS["point"]
    return (points @ rotation * scale).clamp(sensor.low, sensor.high)


def _uniform(count: int, limits: tuple[float, float], like: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(count, generator=generator, device=generator.device).to(like)
    return limits[0] + (limits[1] - limits[0]) * share


def _integers(count: int, most: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [count] in [-most, most]."""
    return torch.randint(-most, most + 1, (count,), generator=generator, device=generator.device).to(like.device)
