"""One episode of a policy in a simulated world: the loop to read first."""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sim.environment import Environment
from sim.seeds import Start
from vla.chunking import ActionQueue
from vla.interface import Policy


MOVED = 0.05  # m; less is a nudge


class Recorder(Protocol):
    """Takes the frames of an episode (sim.video.VideoRecorder)."""

    camera: str
    size: int  # pixels

    def add(self, frame: np.ndarray) -> None: ...


@dataclass(frozen=True)
class EpisodeResult:
    """What one episode did. `actions` are those executed, float32 [steps, D]."""

    success: bool
    actions: np.ndarray
    rounds: tuple[float, ...]  # decoding rounds of each chunk, empty if the policy does not say
    policy_ms: tuple[float, ...]  # milliseconds of each chunk, the policy's own figure or else the time waited
    moved: dict[str, float]  # bodies that end MOVED or more from where they were at the start, and how far, m
    wall_s: float  # seconds, reset included

    @property
    def steps(self) -> int:
        return len(self.actions)

    @property
    def chunks(self) -> int:
        return len(self.policy_ms)

    @property
    def jerk(self) -> float | None:
        """Mean squared third difference of the executed position deltas (dimensions 0 to 2); None below four steps."""
        if self.steps < 4:
            return None
        return float(np.square(np.diff(self.actions[:, :3].astype(np.float64), n=3, axis=0)).mean())


def rollout(
    environment: Environment,
    policy: Policy,
    *,
    task: int,
    start: Start,
    max_steps: int,
    execution_horizon: int,
    num_known: int = 0,
    video: Recorder | None = None,
) -> EpisodeResult:
    """Run one episode, executing `execution_horizon` actions of each chunk; it ends with success or after `max_steps`.

    Cameras are rendered when a chunk is due or a video records, never else. num_known: actions not executed that the
    next chunk must start with (vla.chunking). The result depends on the policy, the task and the start only: chunk c
    is sampled under `chunk_seed(task, start, c)`.
    Raises ValueError if a chunk is too short, has the wrong width or is not finite.
    """
    began = time.perf_counter()
    queue = ActionQueue(execution_horizon, num_known)
    executed: list[np.ndarray] = []
    rounds: list[float] = []
    policy_ms: list[float] = []
    success = False
    environment.reset(task, start)
    places = body_places(environment)
    while not success and len(executed) < max_steps:
        if queue.needs_chunk:
            observation = environment.observe()
            asked = time.perf_counter()
            seed = chunk_seed(task, start, len(policy_ms))
            chunk = policy.act([observation], known=[queue.known_tail()], seeds=[seed])[0]
            waited_ms = 1000 * (time.perf_counter() - asked)
            queue.push(checked_actions(chunk.actions, environment.spec.action_dim))
            policy_ms.append(float(chunk.info.get("milliseconds", waited_ms)))
            if "rounds" in chunk.info:
                rounds.append(float(chunk.info["rounds"]))
        if video is not None:
            video.add(environment.render(video.camera, video.size))
        action = queue.pop()
        success = environment.step(action)
        executed.append(action)
    if video is not None:
        video.add(environment.render(video.camera, video.size))
    return EpisodeResult(
        success=bool(success),
        actions=np.array(executed, dtype=np.float32).reshape(len(executed), environment.spec.action_dim),
        rounds=tuple(rounds),
        policy_ms=tuple(policy_ms),
        moved=displacements(places, body_places(environment)),
        wall_s=time.perf_counter() - began,
    )


def body_places(environment: Environment) -> dict[str, np.ndarray]:
    """Where each movable body is: [3] m."""
    return {name: body.origin_w for name, body in environment.world().bodies.items()}


def displacements(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, float]:
    """How far the bodies came that moved by MOVED or more: name -> m, the furthest first."""
    ways = {name: float(np.linalg.norm(after[name] - place)) for name, place in before.items() if name in after}
    return {name: round(way, 3) for name, way in sorted(ways.items(), key=lambda item: -item[1]) if way >= MOVED}


def chunk_seed(task: int, start: Start, chunk: int) -> int:
    """Seed of an episode's `chunk`-th request, a function of what is being run and of nothing else."""
    return int(np.random.SeedSequence((start.seed, task, chunk)).generate_state(1)[0])


def checked_actions(actions: np.ndarray, action_dim: int) -> np.ndarray:
    """`actions` [H, D] if a robot of D action dimensions can execute them. Raises ValueError naming what is wrong."""
    if actions.ndim != 2 or actions.shape[1] != action_dim:
        raise ValueError(f"The policy's chunk has shape {actions.shape}; the robot takes [H, {action_dim}].")
    if not np.isfinite(actions).all():
        raise ValueError("The policy's chunk holds NaN or infinity; the checkpoint is broken or was not fully trained.")
    return actions
