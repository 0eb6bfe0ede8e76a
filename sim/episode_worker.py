"""The simulator process of an evaluation: runs the episodes it is given and asks the parent's policy for chunks."""

import contextlib
import functools
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sim.environment import Environment
from sim.perturbations.kinds import PerturbConfig
from sim.perturbations.perturbed_environment import perturbed
from sim.results import mean
from sim.rollout import EpisodeResult, Recorder, rollout
from sim.seeds import Start
from sim.video import VideoRecorder
from sim.watch import EpisodeWatch, Recorders, WatchedPolicy, Watcher
from sim.workers import Ask, serve_jobs
from vla.interface import ActionChunk, Observation, Policy, RobotSpec


@dataclass(frozen=True)
class EpisodeSettings:
    """What all episodes of an evaluation share."""

    suite: str
    protocol: str
    image_size: int  # pixels, what the policy was trained on
    action_horizon: int
    max_steps: int
    execution_horizon: int
    num_known: int
    output_dir: Path
    video_size: int  # pixels
    gif: bool
    watch: str | None = None  # address of a page that shows the running episodes
    perturb: PerturbConfig | None = None  # None: clean episodes


@dataclass(frozen=True)
class EpisodeJob:
    task: int
    episode: int
    start: Start
    video: str | None  # path relative to the output folder


@dataclass(frozen=True)
class Question:
    """One request to the policy."""

    observation: Observation
    known: np.ndarray | None  # [k, D]
    seed: int


class PipePolicy:
    """A vla.interface.Policy that lives at the other end of a pipe."""

    def __init__(self, connection: Connection, spec: RobotSpec, action_horizon: int) -> None:
        self._connection, self.spec, self.action_horizon = connection, spec, action_horizon

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        chunks = []
        for index, observation in enumerate(observations):
            question = Question(observation, known[index] if known else None, seeds[index] if seeds else 0)
            self._connection.send(Ask(question))
            chunks.append(self._connection.recv())
        return chunks


def work(connection: Connection, settings: EpisodeSettings, build: Callable[..., Environment]) -> None:
    """A simulator process from birth to the parent's hanging up. Imports no torch of ours."""

    def begin() -> tuple[dict[str, Any], Callable[[EpisodeJob], dict[str, Any]]]:
        environment = build(settings.suite, image_size=settings.image_size, protocol=settings.protocol)
        environment = perturbed(environment, settings.perturb)
        policy = PipePolicy(connection, environment.spec, settings.action_horizon)
        watcher = Watcher(settings.watch, settings.output_dir.name) if settings.watch else None
        facts = {
            "spec": environment.spec.to_dict(),
            "assets": getattr(environment, "assets", "unknown"),
            "gl": os.environ.get("MUJOCO_GL", "default"),
            "instructions": [environment.instruction(task) for task in range(environment.num_tasks)],
        }
        return facts, functools.partial(run_episode, environment, policy, settings, watcher)

    serve_jobs(connection, begin)


def run_episode(
    environment: Environment, policy: Policy, settings: EpisodeSettings, watcher: Watcher | None, job: EpisodeJob
) -> dict[str, Any]:
    """One rollout, filmed and shown if asked; returns the row fields that the episode decides."""
    with contextlib.ExitStack() as stack:
        video: Recorder | None = None
        watch: EpisodeWatch | None = None
        if job.video is not None:
            video = stack.enter_context(
                VideoRecorder(
                    settings.output_dir / job.video,
                    camera=environment.spec.cameras[0],
                    size=settings.video_size,
                    fps=environment.spec.control_hz,
                    gif=settings.gif,
                )
            )
        if watcher is not None:
            camera, instruction = environment.spec.cameras[0], environment.instruction(job.task)
            watch = stack.enter_context(watcher.episode(job.task, job.episode, instruction, camera, settings.video_size))
            policy = WatchedPolicy(policy, watch)
            video = watch if video is None else Recorders([video, watch])
        result = rollout(
            environment,
            policy,
            task=job.task,
            start=job.start,
            max_steps=settings.max_steps,
            execution_horizon=settings.execution_horizon,
            num_known=settings.num_known,
            video=video,
        )
        if watch is not None:
            watch.success = result.success
    return {**row_fields(result), "video": job.video, "renderer": opengl_renderer()}


def row_fields(result: EpisodeResult) -> dict[str, Any]:
    """The part of an EpisodeRow that a rollout knows."""
    return {
        "success": result.success,
        "steps": result.steps,
        "wall_s": round(result.wall_s, 3),
        "chunks": result.chunks,
        "rounds": mean(result.rounds),
        "policy_ms": mean(result.policy_ms),
        "jerk": result.jerk,
        "moved": result.moved,
    }


def opengl_renderer() -> str:
    """The driver that drew this process's last frame, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)"; "none" if nothing drew."""
    if "mujoco" not in sys.modules:
        return "none"
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode() if name else "unknown"


def version(distribution: str) -> str:
    """Installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
