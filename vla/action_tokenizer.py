"""Actions <-> tokens: uniform bins with an exact zero for motion, two ids for a gripper. numpy only.

Ids, shared by all dimensions: 0 .. num_bins - 1 motion bins; then two ids for the binary values -1 and +1; `vocab_size`
ids in all can be predicted, and `mask_id == vocab_size` exists in the embedding table alone.

The bins of a continuous dimension with range [low, high] (the data's q01 and q99):

    offset = 0 if low <= 0 <= high else (low + high) / 2
    width  = max(high - offset, offset - low) / ((bins - 1) / 2)
    center(id) = offset + (id - (num_bins - 1) / 2) * width

`bins` is odd, so the middle id means offset in every dimension: raw zero ("no motion") decodes to exactly zero and a robot
told to stand still does not drift. The published tokenizer bins (x - q01) / (q99 - q01), where raw zero falls between two
centers as soon as |q01| != |q99|. The farther of low, high is a center too, so saturated actions survive. The price: a
range that is lopsided around zero leaves part of its bins unused (`valid_range` excludes them).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vla.normalization import Statistics

DEFAULT_NUM_BINS = 255


@dataclass(frozen=True)
class ActionTokenizer:
    """Tokens of D action dimensions; the tuples hold one entry per dimension, and binary dimensions ignore theirs."""

    low: tuple[float, ...]  # raw units
    high: tuple[float, ...]
    bins: tuple[int, ...]  # odd, >= 3
    binary: tuple[int, ...] = ()  # dimensions with the values -1 and +1

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.bins) > 0:
            raise ValueError(f"low, high and bins have {len(self.low)}, {len(self.high)}, {len(self.bins)} dimensions.")
        if any(count < 3 or count % 2 == 0 for count in self.bins):
            raise ValueError(f"Bin counts {self.bins} must be odd and at least 3: an even count has no bin at zero.")
        if any(not 0 <= dim < len(self.low) for dim in self.binary):
            raise ValueError(f"Binary dimensions {self.binary} lie outside the {len(self.low)} action dimensions.")
        bounds = np.array([self.low, self.high], dtype=np.float64)
        if not np.isfinite(bounds).all() or (bounds[0] > bounds[1]).any():
            raise ValueError(f"Ranges must be finite with low <= high; got low {self.low}, high {self.high}.")

    @classmethod
    def from_statistics(
        cls,
        statistics: Statistics,
        *,
        binary: Sequence[int] = (),
        num_bins: int | Sequence[int] = DEFAULT_NUM_BINS,
        bounds: tuple[str, str] = ("q01", "q99"),
    ) -> "ActionTokenizer":
        """Tokenizer over the range that two fields of the action statistics name, ("min", "max") for clean data."""
        low, high = (getattr(statistics, name).tolist() for name in bounds)
        bins = (num_bins,) * len(low) if isinstance(num_bins, int) else tuple(num_bins)
        return cls(tuple(low), tuple(high), bins, tuple(binary))

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ActionTokenizer":
        """Inverse of `to_dict`. Raises TypeError on a missing or unknown field."""
        return cls(**{key: tuple(value) for key, value in values.items()})

    # -------------------------------------------------------------------------------------------------- the id space

    @property
    def action_dim(self) -> int:
        return len(self.low)

    @property
    def num_bins(self) -> int:
        """Motion ids: the largest bin count; dimensions with fewer use the middle ones."""
        return max(self.bins)

    @property
    def vocab_size(self) -> int:
        """Ids a model may predict, V."""
        return self.num_bins + 2

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    @cached_property
    def offset(self) -> np.ndarray:
        """Raw value of the middle bin, float64 [D]."""
        low, high = np.array(self.low), np.array(self.high)
        return np.where((low <= 0) & (high >= 0), 0.0, (low + high) / 2)

    @cached_property
    def width(self) -> np.ndarray:
        """Bin width in raw units, float64 [D]; 0 where the range is a single point."""
        reach = np.maximum(np.array(self.high) - self.offset, self.offset - np.array(self.low))
        return reach / ((np.array(self.bins) - 1) / 2)

    @cached_property
    def _ranges(self) -> np.ndarray:
        """Valid ids as [start, end) per dimension, int64 [D, 2]."""
        start, end = self._bin(np.array(self.low)), self._bin(np.array(self.high)) + 1
        for dim in self.binary:
            start[dim], end[dim] = self.num_bins, self.num_bins + 2
        return np.stack([start, end], axis=-1)

    def valid_range(self, dim: int) -> tuple[int, int]:
        """(start, end): the ids start .. end - 1 are the ones dimension `dim` can take."""
        return int(self._ranges[dim, 0]), int(self._ranges[dim, 1])

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool [D, V]: which ids each dimension can take."""
        ids = np.arange(self.vocab_size)
        return (ids >= self._ranges[:, :1]) & (ids < self._ranges[:, 1:])

    @cached_property
    def centers(self) -> np.ndarray:
        """Raw value of each id, float64 [D, V]; NaN where the id is not allowed."""
        ids = np.arange(self.vocab_size)
        values = self.offset[:, None] + (ids - (self.num_bins - 1) // 2) * self.width[:, None]
        for dim in self.binary:
            values[dim, self.num_bins :] = (-1.0, 1.0)
        return np.where(self.allowed, values, np.nan)

    def edges(self, dim: int) -> np.ndarray:
        """Raw bin borders of a continuous dimension, float64 [end - start + 1] for `valid_range(dim)`."""
        if dim in self.binary:
            raise ValueError(f"Action dimension {dim} is binary; it has two values and no bin edges.")
        start, end = self.valid_range(dim)
        return self.offset[dim] + (np.arange(start, end + 1) - 0.5 - (self.num_bins - 1) // 2) * self.width[dim]

    # ------------------------------------------------------------------------------------------------ encode, decode

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Ids int64 [..., D] of raw actions [..., D].

        Values outside [low, high] take the extreme bin; a binary dimension is +1 above zero and -1 otherwise.
        Raises ValueError on a wrong last dimension or on values that are not finite.
        """
        actions = np.asarray(actions, dtype=np.float64)
        if actions.ndim == 0 or actions.shape[-1] != self.action_dim:
            raise ValueError(f"Actions have shape {actions.shape}; expected [..., {self.action_dim}].")
        if not np.isfinite(actions).all():
            raise ValueError("Actions are not finite; look for NaN in the recorded episodes.")
        ids = self._bin(np.clip(actions, self.low, self.high))
        for dim in self.binary:
            ids[..., dim] = self.num_bins + (actions[..., dim] > 0)
        return ids

    def coordinates(self, actions: np.ndarray) -> np.ndarray:
        """Raw actions [..., D] on the axis of the ids, unrounded: float32 [..., D], NaN at binary dimensions.

        Clipped like `encode`, which is this, rounded. What ordinal objectives take as the continuous target.
        """
        clipped = np.clip(np.asarray(actions, dtype=np.float64), self.low, self.high)
        width = np.where(self.width > 0, self.width, 1.0)
        values = (clipped - self.offset) / width + (self.num_bins - 1) // 2
        values[..., list(self.binary)] = np.nan
        return values.astype(np.float32)

    def to_unit(self, actions: np.ndarray) -> np.ndarray:
        """Raw actions [..., D] -> float32 [..., D] in [-1, 1], what continuous heads predict; clipped like `encode`.

        Zero at the middle bin, one at the farther of the range's ends; a binary dimension is -1 or +1.
        """
        values = (self.coordinates(actions) - (self.num_bins - 1) // 2) / ((np.array(self.bins, dtype=np.float32) - 1) / 2)
        for dim in self.binary:
            values[..., dim] = np.where(np.asarray(actions)[..., dim] > 0, 1.0, -1.0)
        return values

    def from_unit(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `to_unit` within the range, to which it clips; a binary dimension takes its sign. float32 [..., D]."""
        values = _to_numpy(values, "double")
        actions = np.clip(self.offset + values * self.width * (np.array(self.bins) - 1) / 2, self.low, self.high)
        for dim in self.binary:
            actions[..., dim] = np.where(values[..., dim] > 0, 1.0, -1.0)
        return actions.astype(np.float32)

    def decode_ids(self, ids: np.ndarray) -> np.ndarray:
        """Bin centers float32 [..., D] of ids [..., D]. Raises ValueError on an id its dimension cannot take."""
        ids = _to_numpy(ids, "long")
        self._check_ids(ids)
        return self.centers[np.arange(self.action_dim), ids].astype(np.float32)

    def decode_expectation(self, probs: np.ndarray, ids: np.ndarray, radius: int = 2) -> np.ndarray:
        """Sub-bin decoding: the mean of the centers within `radius` bins of the chosen id, weighted by probability.

        probs: [..., D, V] (columns past V, such as the mask's, are ignored); ids: [..., D] the committed tokens. numpy
        arrays or torch tensors. Only valid ids count, renormalised; without any probability there the answer is the
        center of the id, as it is for one-hot probs and for binary dimensions. Returns float32 [..., D].
        """
        ids, probs = _to_numpy(ids, "long"), _to_numpy(probs, "double")
        if probs.shape[:-1] != ids.shape or probs.shape[-1] < self.vocab_size:
            raise ValueError(f"probs {probs.shape} do not match ids {ids.shape} with {self.vocab_size} tokens.")
        chosen = self.decode_ids(ids)
        window = ids[..., None] + np.arange(-radius, radius + 1)  # [..., D, 2 radius + 1]
        inside = (window >= self._ranges[:, :1]) & (window < self._ranges[:, 1:])
        window = np.where(inside, window, ids[..., None])
        weights = np.where(inside, np.take_along_axis(probs, window, axis=-1), 0.0)
        total = weights.sum(-1)
        values = self.centers[np.arange(self.action_dim)[:, None], window]
        mean = (weights * values).sum(-1) / np.where(total > 0, total, 1.0)
        is_binary = np.isin(np.arange(self.action_dim), self.binary)
        return np.where((total > 0) & ~is_binary, mean, chosen).astype(np.float32)

    def _bin(self, values: np.ndarray) -> np.ndarray:
        """Nearest motion id, int64 [..., D], of values within [low, high]."""
        width = np.where(self.width > 0, self.width, 1.0)
        return np.rint((values - self.offset) / width).astype(np.int64) + (self.num_bins - 1) // 2

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.ndim == 0 or ids.shape[-1] != self.action_dim:
            raise ValueError(f"Token ids have shape {ids.shape}; expected [..., {self.action_dim}].")
        wrong = np.argwhere((ids < self._ranges[:, 0]) | (ids >= self._ranges[:, 1]))
        if len(wrong):
            dim, token = int(wrong[0][-1]), int(ids[tuple(wrong[0])])
            what = "the mask" if token == self.mask_id else "a token"
            raise ValueError(
                f"Id {token} ({what}) is not one action dimension {dim} can take; its ids are {self.valid_range(dim)} "
                "(end excluded). Mask logits with `allowed` and decode only after every slot is committed."
            )


def _to_numpy(values: Any, kind: str) -> np.ndarray:
    """An array as it is; a torch tensor through its own method `kind` ("long", "double"), so torch is not imported."""
    if hasattr(values, "detach"):
        values = getattr(values.detach().cpu(), kind)().numpy()
    return np.asarray(values)
