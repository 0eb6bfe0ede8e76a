"""What a perturbation is: an Effect on an Environment's episodes, of a magnitude, drawn from the episode's own generator."""

import zlib
from typing import Any

import numpy as np

from sim.environment import Environment
from sim.seeds import Start
from vla.interface import Observation


class Effect:
    """One perturbation of an environment, its magnitude given. Subclasses override what they change.

    Order of an episode: `undo`, the environment's reset, `begin`, then `after_step` and `observe` as the episode goes.
    The generator is a function of start, task and kind only, not of the severity: one start's severities pull in the same
    direction, and magnitude 0 changes nothing.
    """

    def __init__(self, magnitude: float) -> None:
        self.magnitude = magnitude
        self.textures: list[int] = []  # of the model, that `begin` changed

    def undo(self) -> None:
        """Take back what `begin` wrote into the simulator's model, before the environment is reset.

        Its textures reach the renderer with the next `begin`, or by `PerturbedEnvironment.restore`."""

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        """The environment has just been reset."""

    def after_step(self, environment: Environment) -> None:
        """The environment has just taken a step."""

    def observe(self, environment: Environment) -> Observation:
        """What the policy is shown instead of `environment.observe()`."""
        return environment.observe()


def episode_generator(task: int, start: Start, kind: str) -> np.random.Generator:
    """The draws of one kind in one episode, the same whatever ran before and whatever the severity."""
    return np.random.default_rng((start.seed, task, zlib.crc32(kind.encode())))


def arm_of(environment: Environment, kind: str) -> Any:
    """The simulator's model (sim.robosuite_env.Arm). Raises ValueError for an environment without one."""
    arm = getattr(environment, "arm", None)
    if arm is None:
        raise ValueError(
            f"Perturbation {kind!r} changes the simulator's model; {type(environment).__name__} has none. Kinds that need "
            "none: instruction, noise, state_noise, blur."
        )
    return arm


class ModelChanges:
    """Arrays of a MuJoCo model as they were, so that changes for one episode can be taken back before the next."""

    def __init__(self) -> None:
        self._saved: list[tuple[np.ndarray, np.ndarray]] = []  # view into the model, copy

    def keep(self, view: np.ndarray) -> np.ndarray:
        """Remember a view's values; returns the copy."""
        copy = view.copy()
        self._saved.append((view, copy))
        return copy

    def undo(self) -> None:
        """Write everything back and let go of the model, which its environment may be about to replace."""
        for view, copy in reversed(self._saved):
            view[...] = copy
        self._saved.clear()


def unit_vector(generator: np.random.Generator) -> np.ndarray:
    """Uniform on the sphere. [3]"""
    vector = generator.standard_normal(3)
    return vector / np.linalg.norm(vector)
