"""What each sensor of the bound corpus can report: range, unit, what 1/255 of an epsilon is in it, and why. No torch.

An epsilon of k/255 means the same for every sensor: the share of its range that k grey levels are of a picture's. Two
exceptions say why they are ones. A value is stored as a code, value = low + code / (levels - 1) * (high - low), so what is
read back lies in the range exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

GRAVITY = 9.81  # m/s^2
FORCE_RANGE = 10.0  # N, full scale of the finger's force sensor
ACCELERATION_RANGE = 6 * GRAVITY  # m/s^2, full scale of the accelerometer
SAMPLE_RATE = 8000  # Hz of the microphone
TRACE_RATE = 100  # Hz of force and acceleration


@dataclass(frozen=True)
class Sensor:
    """The range of one modality's values, the same for each of them."""

    low: float
    high: float
    unit: str
    step: float  # radius of epsilon 1/255, in `unit`
    levels: int  # codes of the stored form
    reason: str  # why the step is what it is

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values -> codes, uint8 or uint16; what lies outside the range is what a saturated sensor says."""
        share = (np.clip(values, self.low, self.high) - self.low) / (self.high - self.low)
        return np.rint(share * (self.levels - 1)).astype(np.uint8 if self.levels <= 256 else np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> float32 values, within [low, high]."""
        values = self.low + codes.astype(np.float64) / (self.levels - 1) * (self.high - self.low)
        return np.clip(values.astype(np.float32), np.float32(self.low), np.float32(self.high))


_GREY = "one of an 8-bit picture's 255 grey levels"
SENSORS: Mapping[str, Sensor] = {
    "image": Sensor(0.0, 1.0, "intensity", 1 / 255, 256, _GREY),
    "video": Sensor(0.0, 1.0, "intensity", 1 / 255, 256, _GREY),
    "depth": Sensor(
        0.25, 0.75, "m", 0.5 / 255, 1 << 16,
        "1/255 of the camera's working range: 2 mm, a stereo camera's noise at half a metre",
    ),
    "thermal": Sensor(
        10.0, 60.0, "degree Celsius", 50 / 255, 1 << 16,
        "one of 255 grey levels that the span is shown in: 0.2 K, twice an uncooled sensor's noise",
    ),
    "audio": Sensor(
        -1.0, 1.0, "full scale", 1 / 255, 1 << 16,
        "1/255 of full scale, -48 dB: amplitudes are counted from silence, so half of what the range would give",
    ),
    "point": Sensor(
        -0.125, 0.125, "m", 0.25 / 255, 1 << 16,
        "1/255 of the box that holds an object: 1 mm for each coordinate of each point",
    ),
    "trace": Sensor(
        -1.0, 1.0, "full scale", 2 / 255, 1 << 16,
        f"1/255 of the range: {2 * FORCE_RANGE / 255:.2f} N and {2 * ACCELERATION_RANGE / 255:.2f} m/s^2",
    ),
}  # fmt: skip


def get_sensor(modality: str) -> Sensor:
    """Raises ValueError listing the modalities."""
    if modality not in SENSORS:
        raise ValueError(f"Unknown modality {modality!r}; sensors: {', '.join(SENSORS)}.")
    return SENSORS[modality]


def sensor_table() -> dict[str, dict[str, Any]]:
    """Range, unit and levels of each sensor, as a manifest states them."""
    return {name: {"low": s.low, "high": s.high, "unit": s.unit, "levels": s.levels} for name, s in SENSORS.items()}
