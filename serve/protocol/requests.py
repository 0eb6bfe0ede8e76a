"""What every wire is translated to: ActRequest, checked, and PolicyBackend, which answers it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from vla.interface import ActionChunk, Observation, RobotSpec, check_observation

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Description:
    """What a client must know of the policy it talks to."""

    spec: RobotSpec
    action_horizon: int
    checkpoint: str  # content hash

    def to_dict(self) -> dict[str, Any]:
        return {"spec": self.spec.to_dict(), "action_horizon": self.action_horizon, "checkpoint": self.checkpoint}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Description":
        """Inverse of `to_dict`; other keys are ignored, so that a server may say more."""
        return cls(RobotSpec.from_dict(values["spec"]), int(values["action_horizon"]), str(values["checkpoint"]))


@dataclass(frozen=True)
class ActRequest:
    """One observation to answer. Made by `act_request`, which checks it."""

    observation: Observation
    known: np.ndarray | None  # float32 [k, D], k <= H
    seed: int
    deadline: float  # on time.monotonic()'s clock

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()


class PolicyBackend(Protocol):
    """Answers requests, in this process or another; every wire talks to one of these."""

    @property
    def description(self) -> Description | None:
        """None until the policy was loaded for the first time."""
        ...

    @property
    def ready(self) -> bool:
        """Warm, and not draining."""
        ...

    async def act(self, requests: Sequence[ActRequest]) -> list[ActionChunk]:
        """One chunk per request, all or none. Raises Refusal."""
        ...


def act_request(
    description: Description,
    limits: Limits,
    *,
    images: dict[str, np.ndarray],
    state: np.ndarray,
    instruction: str,
    tail: np.ndarray | None = None,
    delay: int | None = None,
    seed: int = 0,
    deadline: float,
) -> ActRequest:
    """The request, if the policy can answer it; raises Refusal naming what is wrong.

    tail [n, D]: what the robot would go on with; delay: how many of these it will have executed when the answer arrives,
    default all. The answer starts with those (real-time chunking: arXiv 2506.07339, with the hard prefix of 2512.05964).
    """
    spec = description.spec
    with np.errstate(over="ignore"):
        state = np.asarray(state, dtype=np.float32)
    if len(instruction) > limits.instruction_chars:
        raise Refusal.invalid(
            f"The instruction has {len(instruction)} characters; at most {limits.instruction_chars} are accepted."
        )
    try:
        instruction.encode()
    except UnicodeEncodeError as error:
        raise Refusal.invalid(f"The instruction is not Unicode text: {error}") from error
    observation = Observation({camera: images[camera] for camera in spec.cameras if camera in images}, state, instruction)
    try:
        check_observation(observation, spec)
    except ValueError as error:
        raise Refusal.invalid(error) from error
    if not 0 <= seed <= MAX_SEED:
        raise Refusal.invalid(f"seed is {seed}; it must be 0 to {MAX_SEED}.")
    return ActRequest(observation, known_actions(description, tail, delay), seed, deadline)


def known_actions(description: Description, tail: np.ndarray | None, delay: int | None) -> np.ndarray | None:
    """The actions [k, D] an answer must start with; None for a chunk decided afresh."""
    if tail is None or len(tail) == 0:
        if delay:
            raise Refusal.invalid(
                f"delay is {delay} but no actions were sent to bridge it; send the unexecuted tail, or delay 0 and wait."
            )
        return None
    horizon, dims = description.action_horizon, description.spec.action_dim
    with np.errstate(over="ignore"):
        tail = np.asarray(tail, dtype=np.float32)
    if tail.ndim != 2 or tail.shape[1] != dims or not np.isfinite(tail).all():
        raise Refusal.invalid(f"The known actions have shape {list(tail.shape)}; they must be finite, [k, {dims}].")
    count = len(tail) if delay is None else delay
    if not 0 <= count <= min(len(tail), horizon):
        raise Refusal.invalid(
            f"The answer would start with {count} known actions; {len(tail)} were sent and a chunk has {horizon}. "
            "Give a delay of at most both."
        )
    return tail[:count] if count else None


def deadline_after(timeout_s: float | None, limits: Limits) -> float:
    """The deadline of a request that arrives now and names this timeout, in seconds."""
    if timeout_s is None:
        return time.monotonic() + limits.timeout_s
    if not 0 < timeout_s < float("inf"):
        raise Refusal.invalid(f"The timeout is {timeout_s} s; it must be positive.")
    return time.monotonic() + min(timeout_s, limits.max_timeout_s)


def check_batch(count: int, num_images: int, limits: Limits) -> None:
    """Raise Refusal unless that many observations and images may be in one request."""
    if not 1 <= count <= limits.batch:
        raise Refusal(
            Code.TOO_LARGE if count else Code.INVALID, f"A request of {count} observations; 1 to {limits.batch} are accepted."
        )
    if num_images > limits.images:
        raise Refusal(Code.TOO_LARGE, f"A request of {num_images} images; at most {limits.images} are accepted.")
