"""One demonstration in memory: what data set readers yield and writers take. numpy only."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla.interface import RobotSpec


@dataclass(frozen=True)
class Episode:
    """T frames of one demonstration; `action[t]` is what was done at what `images[t]` and `state[t]` show."""

    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, S]
    action: np.ndarray  # float32 [T, D]
    instruction: str
    task: int  # number within its suite
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values, such as the start
    followed: np.ndarray | None = None  # bool [T]: the next frame is what action[t] led to; None: everywhere


def check_episode(episode: Episode, spec: RobotSpec, number: int) -> None:
    """Raise ValueError naming the first array that does not fit `spec`; `number` is the episode's, for the message."""
    length, size = len(episode.action), spec.image_size
    arrays = {f"image {camera!r}": (episode.images.get(camera), np.uint8, (size, size, 3)) for camera in spec.cameras}
    arrays["state"] = (episode.state, np.float32, (spec.state_dim,))
    arrays["action"] = (episode.action, np.float32, (spec.action_dim,))
    for name, (values, dtype, shape) in arrays.items():
        if values is None:
            raise ValueError(f"Episode {number} lacks {name}; it has {sorted(episode.images)}.")
        if length == 0 or values.shape != (length, *shape) or values.dtype != dtype:
            raise ValueError(
                f"Episode {number} has {name} {values.dtype} {values.shape}; expected {np.dtype(dtype)} "
                f"{(length, *shape)} with at least one frame."
            )
