"""Episodes in which the policy acts and the expert labels: the data of DAgger (Ross et al. 2011). Imports no torch of ours.

Per chunk a coin decides who acts: the expert with probability `mixing`, else the policy. Every state visited is recorded
with what the expert would do there, so that a policy trained on it learns to come back from where it has gone. Where the
policy did something else, the next label answers another state than the label before it leads to: such a frame is not
`followed`, and no chunk of labels is cut across it.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from sim import demonstration
from sim.demonstration import Demonstration
from sim.environment import Environment
from sim.episode_worker import PipePolicy
from sim.experts.programs import Expert
from sim.rollout import checked_actions, chunk_seed
from sim.seeds import Start, start
from sim.workers import serve_jobs
from vla.interface import Policy

SPLIT = "train"
FOLLOWED = 0.25  # action units, by which what is executed may differ from the label: about the noise of demonstrations


@dataclass(frozen=True)
class CorrectionSettings:
    """What all episodes of a round share."""

    suite: str
    image_size: int  # pixels, what the policy was trained on
    action_horizon: int
    execution_horizon: int  # actions executed of each chunk, whoever acts
    max_steps: int
    mixing: float  # probability that the expert acts during a chunk
    folder: Path  # where episodes are staged


@dataclass(frozen=True)
class CorrectionJob:
    """One training start of one task."""

    task: int
    index: int


def correct(
    environment: Environment, policy: Policy, expert: Expert, *, task: int, start: Start, settings: CorrectionSettings
) -> tuple[Demonstration, int]:
    """One labelled episode, and how many of its chunks the expert executed; a function of policy, expert, task and start.

    It ends with success or after `max_steps`; a failed one is kept, since its labels are the expert's all the same.
    """
    generator = np.random.default_rng([start.seed, task])
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in environment.spec.cameras}
    states, labels, followed, expert_chunks, chunk_number = [], [], [], 0, 0
    waiting: list[np.ndarray] = []  # the policy's actions still to execute
    expert_left, success = 0, False
    environment.reset(task, start)
    while not success and len(labels) < settings.max_steps:
        observation = environment.observe()
        label = expert.action(environment.world())
        if not waiting and not expert_left:
            if generator.random() < settings.mixing:
                expert_left = settings.execution_horizon
                expert_chunks += 1
            else:
                chunk = policy.act([observation], seeds=[chunk_seed(task, start, chunk_number)])[0]
                waiting = list(checked_actions(chunk.actions, environment.spec.action_dim)[: settings.execution_horizon])
            chunk_number += 1
        for camera in environment.spec.cameras:
            images[camera].append(observation.images[camera])
        states.append(observation.state)
        labels.append(label)
        if expert_left:
            expert_left -= 1
            executed = label
        else:
            executed = waiting.pop(0)
        followed.append(bool(np.abs(executed - label).max() <= FOLLOWED))
        success = environment.step(executed)
    episode = Demonstration(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        state=np.stack(states).astype(np.float32),
        action=np.stack(labels).astype(np.float32),
        instruction=environment.instruction(task),
        task=task,
        start=start,
        success=bool(success),
        followed=np.array(followed),
    )
    return episode, expert_chunks


def work(
    connection: Connection, settings: CorrectionSettings, build: Callable[..., Environment], expert: Callable[..., Any]
) -> None:
    """A simulator process: labels the episodes it is given, asking the parent's policy for chunks."""

    def begin() -> tuple[dict[str, Any], Callable[[CorrectionJob], dict[str, Any]]]:
        environment = build(settings.suite, image_size=settings.image_size)
        policy = PipePolicy(connection, environment.spec, settings.action_horizon)
        return environment.spec.to_dict(), functools.partial(attempt, environment, policy, expert, settings)

    serve_jobs(connection, begin)


def attempt(
    environment: Environment, policy: Policy, expert: Callable[..., Any], settings: CorrectionSettings, job: CorrectionJob
) -> dict[str, Any]:
    """Label one start, stage the episode, return what a row says of it."""
    began = time.perf_counter()
    episode, expert_chunks = correct(
        environment, policy, expert(environment, job.task), task=job.task, start=start(SPLIT, job.index), settings=settings
    )
    demonstration.save(episode, demonstration.staged_path(settings.folder, job.task, job.index))
    return {
        "success": episode.success,
        "labels": len(episode.action),
        "expert_chunks": expert_chunks,
        "wall_s": round(time.perf_counter() - began, 3),
    }
