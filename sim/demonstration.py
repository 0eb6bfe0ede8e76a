"""One demonstration: recorded from an expert, staged on disk, read back. numpy only."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sim.disturbance import ClumsyActor, begin_elsewhere
from sim.environment import Environment
from sim.experts.programs import Expert, NoisyExpert
from sim.seeds import Start


@dataclass(frozen=True)
class Demonstration:
    """T frames; `action[t]` is what the expert does at what `images[t]` and `state[t]` show, noise or not."""

    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, S]
    action: np.ndarray  # float32 [T, D]
    instruction: str
    task: int
    start: Start
    success: bool
    followed: np.ndarray | None = None  # bool [T]: action[t] was executed, or nearly; None: everywhere, up to noise


def record(
    environment: Environment,
    expert: Expert,
    *,
    task: int,
    start: Start,
    max_steps: int,
    noise: float = 0.0,
    random_start: bool = False,
    mishaps: float = 0.0,
) -> Demonstration:
    """Let an expert act until success or `max_steps`, rendering every step.

    noise: see `NoisyExpert`; random_start: see `begin_elsewhere`, whose steps are not recorded; mishaps: see `ClumsyActor`.
    All are drawn under the start's seed. The demonstrations then show how to come back.
    """
    spec = environment.spec
    actor = ClumsyActor(NoisyExpert(expert, noise, start.seed), mishaps, start.seed)
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in spec.cameras}
    states, actions, followed = [], [], []
    success = False
    environment.reset(task, start)
    if random_start:
        begin_elsewhere(environment, start.seed)
    while not success and len(actions) < max_steps:
        observation = environment.observe()
        executed, action = actor.act(environment.world())
        for camera in spec.cameras:
            images[camera].append(observation.images[camera])
        states.append(observation.state)
        actions.append(action)
        followed.append(not actor.intervenes)
        success = environment.step(executed)
    return Demonstration(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        state=np.stack(states).astype(np.float32),
        action=np.stack(actions),
        instruction=environment.instruction(task),
        task=task,
        start=start,
        success=bool(success),
        followed=None if all(followed) else np.array(followed),
    )


def staged_path(folder: Path, task: int, index: int) -> Path:
    """Where the demonstration of a task from the `index`-th training start is staged."""
    return folder / f"task_{task:03d}-start_{index:06d}.npz"


def save(demonstration: Demonstration, path: Path) -> None:
    """Write an uncompressed .npz that is either whole or absent. Raises OSError, leaving nothing, on a full disk."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    start = demonstration.start
    arrays = {f"image.{camera}": frames for camera, frames in demonstration.images.items()}
    try:
        with open(partial, "wb") as file:
            np.savez(
                file,
                **arrays,
                state=demonstration.state,
                action=demonstration.action,
                instruction=np.array(demonstration.instruction),
                task=np.array(demonstration.task),
                start=np.array([start.split, str(start.index), str(start.seed)]),
                success=np.array(demonstration.success),
                **({} if demonstration.followed is None else {"followed": demonstration.followed}),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Demonstration:
    """Inverse of `save`."""
    with np.load(path, allow_pickle=False) as arrays:
        split, index, seed = arrays["start"].tolist()
        return Demonstration(
            images={name.removeprefix("image."): arrays[name] for name in arrays.files if name.startswith("image.")},
            state=arrays["state"],
            action=arrays["action"],
            instruction=str(arrays["instruction"]),
            task=int(arrays["task"]),
            start=Start(split, int(index), int(seed)),
            success=bool(arrays["success"]),
            followed=arrays["followed"] if "followed" in arrays.files else None,
        )
