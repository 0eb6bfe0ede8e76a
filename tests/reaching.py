"""A tiny data set for training tests: the picture shows where to go, the action goes there."""

from pathlib import Path

import numpy as np

from vla.frame_cache import FrameCacheWriter
from vla.interface import RobotSpec

SPEC = RobotSpec(
    name="reaching",
    cameras=("base", "wrist"),
    image_size=36,
    state_names=("x", "y", "z"),
    action_names=("dx", "dy", "grip"),
    binary_actions=(2,),
    control_hz=20.0,
)


def write_cache(root: Path, *, episodes: int = 8, length: int = 10) -> Path:
    """Episodes whose action is a function of the bright column of the image and of the state."""
    generator = np.random.default_rng(0)
    with FrameCacheWriter(root, SPEC, source="tests/reaching.py") as writer:
        for episode in range(episodes):
            images = {camera: generator.integers(0, 60, (length, 36, 36, 3), dtype=np.uint8) for camera in SPEC.cameras}
            side = episode % 2
            images["base"][:, :, 18 * side : 18 * side + 18] = 220
            state = generator.normal(size=(length, 3)).astype(np.float32)
            action = np.stack(
                [np.full(length, 0.8 if side else -0.8), 0.1 * state[:, 0], np.where(np.arange(length) > 5, 1.0, -1.0)], axis=1
            ).astype(np.float32)
            writer.add_episode(images, state, action, instruction="go to the bright side", task=0)
    return root
