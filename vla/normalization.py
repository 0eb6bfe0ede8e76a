"""Per-dimension statistics of states and actions over all frames, and the normalisation built on them. numpy only."""

import json
from dataclasses import dataclass

import numpy as np

CLIP = 1.5  # normalised units: room for states a little outside the data, none for a broken sensor
CONSTANT_RANGE = 1e-4  # raw units (m, rad): a dimension that moves less carries noise, and is mapped to 0


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one feature, float64 [D] each.

    Quantiles are numpy's, over every frame; lerobot 0.4.4 instead averages the quantiles of its episodes, which is not
    a quantile of the data set.
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "Statistics":
        """Statistics of frames [F, D]. Raises ValueError if there are none or if a value is not finite."""
        frames = np.asarray(frames, dtype=np.float64)
        if frames.ndim != 2 or len(frames) == 0:
            raise ValueError(f"Statistics need frames [F, D] with F >= 1; got shape {frames.shape}.")
        if not np.isfinite(frames).all():
            raise ValueError(f"{int((~np.isfinite(frames).all(axis=1)).sum())} frames hold NaN or infinity; drop them.")
        q01, q99 = np.quantile(frames, [0.01, 0.99], axis=0)
        return cls(len(frames), frames.mean(0), frames.std(0), frames.min(0), frames.max(0), q01, q99)

    def to_dict(self) -> dict[str, int | list[float]]:
        return {"count": self.count} | {
            name: getattr(self, name).tolist() for name in ("mean", "std", "min", "max", "q01", "q99")
        }

    @classmethod
    def from_dict(cls, values: dict[str, int | list[float]]) -> "Statistics":
        """Inverse of `to_dict`, exact. Raises TypeError on a missing or unknown field."""
        arrays = {name: np.array(value, dtype=np.float64) for name, value in values.items() if name != "count"}
        return cls(count=int(values["count"]), **arrays)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Statistics":
        return cls.from_dict(json.loads(text))


def normalize(values: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Raw [..., D] -> float32 [..., D]: q01 -> -1, q99 -> +1, clipped to [-CLIP, CLIP]; constant dimensions -> 0."""
    center, scale = _center_and_scale(statistics)
    is_constant = scale == 0
    normalized = (np.asarray(values, dtype=np.float64) - center) / np.where(is_constant, 1.0, scale)
    return np.where(is_constant, 0.0, np.clip(normalized, -CLIP, CLIP)).astype(np.float32)


def denormalize(values: np.ndarray, statistics: Statistics) -> np.ndarray:
    """Inverse of `normalize` for values it did not clip; a constant dimension comes back as its center. float32."""
    center, scale = _center_and_scale(statistics)
    return (np.asarray(values, dtype=np.float64) * scale + center).astype(np.float32)


def _center_and_scale(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half-width of [q01, q99]; half-width 0 where the dimension is constant."""
    half = (statistics.q99 - statistics.q01) / 2
    return (statistics.q99 + statistics.q01) / 2, np.where(2 * half < CONSTANT_RANGE, 0.0, half)
