"""What a simulated robot offers to rollouts, collection and experts: the Environment protocol, and the World."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sim.boxes import Boxes
from sim.seeds import Start
from vla.interface import Observation, RobotSpec


@dataclass(frozen=True)
class Body:
    """A movable object, the fixed part of a fixture, or one of its moving parts, as the simulator knows it."""

    position_w: np.ndarray  # [3] m, centre of its collision box, world frame
    rotation_w: np.ndarray  # [3, 3], columns are the body's axes in the world frame
    half_extents: np.ndarray  # [3] m, half sizes of its collision box along the body's axes
    touches_fingers: tuple[bool, bool] = (False, False)  # left, right finger in contact
    shape: Boxes | None = None  # its collision geoms about the centre; the same object for the same model
    origin_offset: np.ndarray | None = None  # [3] m, of the body frame's origin from the centre, in the body's axes

    @property
    def origin_w(self) -> np.ndarray:
        """Origin of the body's frame, which goals are about; the centre if it is not known. [3] m"""
        return self.position_w if self.origin_offset is None else self.position_w + self.rotation_w @ self.origin_offset

    @functools.cached_property
    def parts(self) -> Boxes:
        """The collision geoms in the world frame; the box alone if there is no shape."""
        shape = Boxes.single(self.half_extents) if self.shape is None else self.shape
        return shape.moved(self.position_w, self.rotation_w)


@dataclass(frozen=True)
class Region:
    """A volume that goals name: on a table, above a burner, in a basket or a drawer."""

    position_w: np.ndarray  # [3] m
    rotation_w: np.ndarray  # [3, 3]
    half_extents: np.ndarray  # [3] m
    owner: str | None = None  # the body it belongs to; None: the table or the floor
    joint: str | None = None  # the joint it moves with

    @property
    def box(self) -> Boxes:
        return Boxes(self.position_w[None], self.rotation_w[None], self.half_extents[None])


@dataclass(frozen=True)
class Joint:
    """A drawer's slide, a door's or a knob's hinge."""

    kind: str  # "slide" or "hinge"
    value: float  # m or rad
    limits: tuple[float, float]
    axis_w: np.ndarray  # [3] unit vector: direction of a slide, axis of a hinge
    anchor_w: np.ndarray  # [3] m, a point on the axis of a hinge
    link: Body  # what moves
    owner: str  # the body it belongs to
    targets: Mapping[str, tuple[float, float]]  # predicate ("open", "close", "turnon", "turnoff") -> values that fulfil it


@dataclass(frozen=True)
class World:
    """Simulator truth that experts act on. A snapshot: arrays are copies."""

    gripper_position_w: np.ndarray  # [3] m, grip site between the finger tips
    gripper_rotation_w: np.ndarray  # [3, 3]; fingers close along its y axis, the approach is its z axis
    gripper_width: float  # m between the fingers, 0 closed
    bodies: Mapping[str, Body]
    goal: tuple[tuple[str, ...], ...]  # predicates that must hold, e.g. (("in", "milk_1", "basket_1_contain_region"),)
    achieved: tuple[bool, ...] = ()  # which of them hold, by the simulator's own test; as long as `goal`
    regions: Mapping[str, Region] = field(default_factory=dict)
    joints: Mapping[str, Joint] = field(default_factory=dict)
    scenery: Boxes = Boxes.joined(())  # what never moves and has no name: tables, floors, bins
    shoulder_w: np.ndarray | None = None  # [3] m, the point that the arm's reach is measured from; None: reaches anywhere


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
