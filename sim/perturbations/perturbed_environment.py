"""An Environment whose episodes are perturbed; what it wraps stays as it is for those who step it directly."""

from typing import Any

import numpy as np

from sim.environment import Environment, World
from sim.perturbations.effect import episode_generator
from sim.perturbations.kinds import NONE, PerturbConfig, build_effect
from sim.seeds import Start
from vla.interface import Observation


class PerturbedEnvironment:
    """sim.environment.Environment under one perturbation. An episode depends on task, start, kind and severity only.

    `instruction`, `state` and `world` tell the truth; `observe` shows what the policy is to see; `render` draws the scene as
    perturbed, without sensor effects.
    """

    def __init__(self, environment: Environment, config: PerturbConfig) -> None:
        self._inner, self._kind, self._effect = environment, config.kind, build_effect(config)
        self.spec, self.num_tasks = environment.spec, environment.num_tasks
        self.assets = getattr(environment, "assets", "unknown")

    @property
    def arm(self) -> Any:
        """The simulator's model. Raises AttributeError where there is none."""
        return self._inner.arm

    def instruction(self, task: int) -> str:
        return self._inner.instruction(task)

    def reset(self, task: int, start: Start) -> None:
        self._effect.undo()
        self._inner.reset(task, start)
        self._effect.begin(self._inner, episode_generator(task, start, self._kind))

    def step(self, action: np.ndarray) -> bool:
        success = self._inner.step(action)
        self._effect.after_step(self._inner)
        return success

    def restore(self) -> None:
        """Give the wrapped environment its looks back, textures included; its simulation is where the episode left it."""
        self._effect.undo()
        renderer = getattr(getattr(self._inner, "arm", None), "renderer", None)
        if renderer is not None and self._effect.textures:
            renderer.upload_textures(self._effect.textures)

    def state(self) -> np.ndarray:
        return self._inner.state()

    def observe(self) -> Observation:
        return self._effect.observe(self._inner)

    def render(self, camera: str, size: int) -> np.ndarray:
        return self._inner.render(camera, size)

    def world(self) -> World:
        return self._inner.world()

    def close(self) -> None:
        self._inner.close()


def perturbed(environment: Environment, config: PerturbConfig | None) -> Environment:
    """`environment` itself without a perturbation."""
    return environment if config is None or config.kind == NONE else PerturbedEnvironment(environment, config)
