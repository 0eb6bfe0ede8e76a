"""What a simulated robot offers to rollouts, collection and experts: the Environment protocol, and the World."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sim.seeds import Start
from vla.interface import Observation, RobotSpec


@dataclass(frozen=True)
class Body:
    """A movable object or fixture as the simulator knows it."""

    position_w: np.ndarray  # [3] m, centre of its collision box, world frame
    rotation_w: np.ndarray  # [3, 3], columns are the body's axes in the world frame
    half_extents: np.ndarray  # [3] m, half sizes of its collision box along the body's axes
    touches_fingers: tuple[bool, bool] = (False, False)  # left, right finger in contact


@dataclass(frozen=True)
class World:
    """Simulator truth that experts act on. A snapshot: arrays are copies."""

    gripper_position_w: np.ndarray  # [3] m, grip site between the finger tips
    gripper_rotation_w: np.ndarray  # [3, 3]; fingers close along its y axis, the approach is its z axis
    gripper_width: float  # m between the fingers, 0 closed
    bodies: Mapping[str, Body]
    goal: tuple[tuple[str, ...], ...]  # predicates that must hold, e.g. (("in", "milk_1", "basket_1_contain_region"),)


class Environment(Protocol):
    """One simulator process's world. Cameras are rendered by `observe` and `render` only."""

    spec: RobotSpec
    num_tasks: int
    assets: str  # where meshes and textures came from, recorded with results

    def instruction(self, task: int) -> str: ...

    def reset(self, task: int, start: Start) -> None:
        """Place the world at `start` and let it settle. The model is reused between episodes of one task."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """One control period with action [D] in robot units; True when the task's success predicate holds."""
        ...

    def state(self) -> np.ndarray:
        """Proprioception, float32 [S]; renders nothing."""
        ...

    def observe(self) -> Observation:
        """Renders every camera of the spec now."""
        ...

    def render(self, camera: str, size: int) -> np.ndarray:
        """A frame for people: uint8 [size, size, 3], upright."""
        ...

    def world(self) -> World: ...

    def close(self) -> None: ...
