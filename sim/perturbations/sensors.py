"""Sensors: noise in the pictures, noise in what the joints report, blur, and observations that come late. numpy only."""

from collections import deque
from dataclasses import replace

import numpy as np

from sim.environment import Environment
from sim.perturbations.effect import Effect, arm_of
from vla.interface import Observation

ANGLE_SHARE = 5.0  # rad of noise in an angle for 1 m in a position: 1 mm goes with 5 mrad
FINGER_SHARE = 0.1  # m in a finger joint for 1 m in a position


class CameraNoise(Effect):
    """Magnitude: standard deviation of Gaussian noise in each pixel and channel, of 255."""

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        self._generator = generator

    def observe(self, environment: Environment) -> Observation:
        seen = environment.observe()
        return replace(seen, images={name: self._noisy(image) for name, image in seen.images.items()})

    def _noisy(self, image: np.ndarray) -> np.ndarray:
        noise = self._generator.standard_normal(image.shape, dtype=np.float32)
        return np.rint(image + np.float32(self.magnitude) * noise).clip(0, 255).astype(np.uint8)


class StateNoise(Effect):
    """Magnitude: m, standard deviation of Gaussian noise in reported positions; angles and fingers in proportion."""

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        self._generator = generator
        self._scale = np.array([share_of(name) for name in environment.spec.state_names])

    def observe(self, environment: Environment) -> Observation:
        seen = environment.observe()
        noise = self.magnitude * self._scale * self._generator.standard_normal(len(self._scale))
        return replace(seen, state=(seen.state + noise).astype(np.float32))


def share_of(state_name: str) -> float:
    """How much noise a state gets for 1 m in a position."""
    return ANGLE_SHARE if "angle" in state_name else FINGER_SHARE if "finger" in state_name else 1.0


class Blur(Effect):
    """Magnitude: standard deviation of a Gaussian blur, as a share of the picture's width."""

    def observe(self, environment: Environment) -> Observation:
        seen = environment.observe()
        return replace(seen, images={name: blurred(image, self.magnitude * len(image)) for name, image in seen.images.items()})


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """uint8 [H, W, 3] convolved with a Gaussian of `sigma` pixels, cut at 3 sigma; the border's pixels go on beyond it."""
    reach = int(np.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / max(sigma, 1e-9)) ** 2)
    weights /= weights.sum()
    result = image.astype(np.float64)
    for axis in (0, 1):
        padded = np.pad(result, [(reach, reach) if index == axis else (0, 0) for index in range(3)], mode="edge")
        parts = [weight * padded.take(range(first, first + image.shape[axis]), axis) for first, weight in enumerate(weights)]
        result = np.sum(parts, axis=0)
    return np.rint(result).clip(0, 255).astype(np.uint8)


class Latency(Effect):
    """Magnitude: control periods by which pictures and proprioception are old when the policy sees them.

    The simulator's poses are kept for so long and drawn when a chunk is due, so late pictures cost no more than fresh ones.
    """

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        self._past = deque([arm_of(environment, "latency").observed.copy()], maxlen=int(self.magnitude) + 1)

    def after_step(self, environment: Environment) -> None:
        self._past.append(arm_of(environment, "latency").observed.copy())

    def observe(self, environment: Environment) -> Observation:
        observed = arm_of(environment, "latency").observed
        observed.put(self._past[0])
        seen = environment.observe()
        observed.put(self._past[-1])
        return seen
