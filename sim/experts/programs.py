"""Task programs: from the goal predicates of a `World` to actions, by the skills."""

from typing import Protocol

import numpy as np

from sim.environment import Environment, World
from sim.experts.goals import pursue


class Expert(Protocol):
    """Labels states of one task."""

    def action(self, world: World) -> np.ndarray:
        """The clean action, float [7] in [-1, 1], for any state; the phase is inferred from `world`."""
        ...


class GoalExpert:
    """Reads the goal from the world it is shown, so one object serves every task whose predicates have programs."""

    def action(self, world: World) -> np.ndarray:
        """See `Expert.action`. Raises ValueError if no program reaches the goal."""
        return pursue(world).astype(np.float32)


class NoisyExpert:
    """An expert whose executed motion is disturbed by correlated noise, while the label stays clean.

    The noise is a stationary first-order process, since the arm smooths white noise away. The gripper is not disturbed.
    """

    def __init__(self, expert: Expert, noise: float, seed: int, *, correlation: float = 0.7):
        """noise: standard deviation in action units of translation; a third of it on rotation."""
        self._expert, self._correlation = expert, correlation
        self._scale = noise * np.array([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 0])
        self._generator = np.random.default_rng(seed)
        self._disturbance = self._generator.standard_normal(7)

    def act(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), float32 [7] each, in [-1, 1]."""
        label = self._expert.action(world)
        executed = np.clip(label + self._scale * self._disturbance, -1.0, 1.0).astype(np.float32)
        fresh = np.sqrt(1.0 - self._correlation**2) * self._generator.standard_normal(7)
        self._disturbance = self._correlation * self._disturbance + fresh
        return executed, label


def build_expert(environment: Environment, task: int) -> Expert:
    """The expert of a task; whether its goal has a program shows at the first `action`, since a world carries the goal.

    Raises ValueError if the environment has no such task.
    """
    if not 0 <= task < environment.num_tasks:
        raise ValueError(f"No task {task}; the environment has 0 to {environment.num_tasks - 1}.")
    return GoalExpert()
