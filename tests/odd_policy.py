"""A policy without torch that does what its instruction says: sleep, raise, die, hang. For tests of the server around it."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.point_world import SPEC
from vla.interface import ActionChunk, Observation


class OddPolicy:
    """vla.interface.Policy; a chunk is a function of its own state, known actions and seed."""

    spec = SPEC
    action_horizon = 4

    def __init__(self, delay_s: float = 0.0, content_hash: str = "odd", fail_file: str = "") -> None:
        self.delay_s, self.content_hash = delay_s, content_hash
        if fail_file and os.path.exists(fail_file):
            raise ValueError(f"{fail_file} is there")

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        time.sleep(self.delay_s)
        instructions = [observation.instruction for observation in observations]
        if "sleep" in instructions:
            time.sleep(1.0)
        if "raise" in instructions:
            raise RuntimeError("the policy's own secret words")
        if "die" in instructions:
            os.kill(os.getpid(), 9)
        if "hang" in instructions:
            time.sleep(3600)
        for instruction in instructions:
            if instruction == "refuse":
                raise ValueError("the instruction 'refuse' is refused")
        return [
            chunk_of(observation, None if known is None else known[row], 0 if seeds is None else seeds[row])
            for row, observation in enumerate(observations)
        ]


def chunk_of(observation: Observation, known: np.ndarray | None = None, seed: int = 0) -> ActionChunk:
    """What OddPolicy answers."""
    noise = np.random.default_rng(seed).standard_normal((OddPolicy.action_horizon, 7))
    actions = (noise + observation.state.sum()).astype(np.float32)
    if known is not None:
        actions[: len(known)] = known
    return ActionChunk(actions, {"rounds": 1 + seed % 3})


def odd_observation(instruction: str = "go", *, state: float = 0.0) -> Observation:
    image = np.zeros((SPEC.image_size, SPEC.image_size, 3), np.uint8)
    return Observation({camera: image for camera in SPEC.cameras}, np.full(3, state, np.float32), instruction)


def odd_from_file(path: str) -> OddPolicy:
    """A policy whose checkpoint is a JSON file."""
    return OddPolicy(**json.loads(Path(path).read_text()))
