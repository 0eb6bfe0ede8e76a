"""What a policy and a robot say to each other: Observation, ActionChunk, RobotSpec, Policy. numpy only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class RobotSpec:
    """Names, shapes and rates of one robot's observations and actions; saved with every data set and checkpoint."""

    name: str
    cameras: tuple[str, ...]
    image_size: int  # square images, pixels
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    binary_actions: tuple[int, ...]  # action indices with exactly two values, -1 and +1 (grippers)
    control_hz: float

    @property
    def state_dim(self) -> int:
        return len(self.state_names)

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RobotSpec":
        """Inverse of `to_dict`. Raises TypeError on a missing or unknown field."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@dataclass(frozen=True)
class Observation:
    """One instant of one robot."""

    images: dict[str, np.ndarray]  # camera -> uint8 [H, W, 3]
    state: np.ndarray  # float32 [S], units of the robot
    instruction: str


@dataclass(frozen=True)
class ActionChunk:
    """Actions to execute from the observed instant on, one per control period."""

    actions: np.ndarray  # float32 [H, D], units of the robot
    info: dict[str, Any] = field(default_factory=dict)  # rounds, confidence, committed (a slot's round) [H, D], milliseconds


class Policy(Protocol):
    """Maps observations to action chunks; holds no episode state, so requests of many robots share one batch."""

    spec: RobotSpec
    action_horizon: int

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        """One chunk per observation.

        known: per observation None or the actions [k, D] already committed from this instant on (k <= H); the answer
            starts with exactly these. seeds: per observation the seed of any sampling; a chunk depends on its own
            observation, known actions and seed only, never on its batch mates.
        Raises ValueError naming what an observation lacks.
        """
        ...


def check_observation(observation: Observation, spec: RobotSpec) -> None:
    """Raise ValueError unless the observation has the cameras, image shape and state size of `spec`."""
    missing = [camera for camera in spec.cameras if camera not in observation.images]
    if missing:
        raise ValueError(
            f"Observation lacks camera {missing[0]!r}; got {sorted(observation.images)}. The policy was trained with "
            f"{list(spec.cameras)} (checkpoint config.yaml): rename the robot's cameras to these."
        )
    for camera in spec.cameras:
        image = observation.images[camera]
        expected = (spec.image_size, spec.image_size, 3)
        if image.dtype != np.uint8 or image.shape != expected:
            raise ValueError(
                f"Image {camera!r} is {image.dtype} {image.shape}; expected uint8 {expected}. Resize the frame to "
                f"{spec.image_size} x {spec.image_size} before sending it."
            )
    if observation.state.shape != (spec.state_dim,):
        raise ValueError(
            f"State has shape {observation.state.shape}; expected ({spec.state_dim},): {list(spec.state_names)}."
        )
    if not np.isfinite(observation.state).all():
        raise ValueError(f"State is not finite: {observation.state.tolist()}.")
