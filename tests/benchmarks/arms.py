"""Policies compared under one budget: train every arm, evaluate each on the same validation starts, paired with the first.

Each arm is one `vla train` process with one thread; `--concurrent` of them train at the same time, so that the machine's other
load hits them alike. Finished parts are kept, and a second call goes on from there.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from sim.results import ROWS, EpisodeRow, differences, latest_episodes
from sim.shards import episode_list
from sim.suites import get_suite
from tests.benchmarks import studies
from vla.home import remask_home

VLA = [sys.executable, "-m", "vla.cli"]
COLUMNS = (*studies.COLUMNS, "ms per chunk", "steps trained", "held-out error")


@dataclass(frozen=True)
class Arm:
    """One policy: its name, the YAML it starts from, and the settings that make it this arm."""

    name: str
    config: Path
    settings: tuple[str, ...] = ()  # "--a.b=value" of `vla train`


def add_arm_options(arguments: argparse.ArgumentParser) -> None:
    """What every comparison of arms asks for."""
    arguments.add_argument("--suite", default="robosuite_lift")
    arguments.add_argument("--config", type=Path, default=Path("configs/lift_demo.yaml"))
    arguments.add_argument("--dataset", type=Path, default=remask_home() / "demo" / "dataset")
    arguments.add_argument("--tasks", default="", help="e.g. [0,1,2,3]; default: all")
    arguments.add_argument("--minutes", type=float, default=20, help="training budget of an arm, wall clock")
    arguments.add_argument("--episodes", type=int, default=100, help="validation episodes of an arm, over all its tasks")
    arguments.add_argument("--concurrent", type=int, default=1, help="arms trained at the same time")


def compare_arms(arms: Sequence[Arm], root: Path, options: argparse.Namespace) -> list[list]:
    """Train, evaluate and time the arms under `root`; rows [name, *COLUMNS], their differences in points to the first arm.

    Raises ChildProcessError if a part fails.
    """
    for arm in arms:
        check_arm(arm, root, options)
    for first in range(0, len(arms), options.concurrent):
        group = arms[first : first + options.concurrent]
        running = [(arm, start_training(arm, root, options)) for arm in group]
        failed = [arm.name for arm, process in running if process is not None and process.wait() != 0]
        if failed:
            raise ChildProcessError(f"training of {failed} failed; see its output above.")
        for arm in group:
            (root / arm.name / "done").touch()
    found = {arm.name: evaluate_arm(arm, root, options) for arm in arms}
    milliseconds = arms_milliseconds(arms, root, options)
    return [[*row, milliseconds[row[0]], *end_of_training(root / row[0])] for row in studies.study_rows(found, arms[0].name)]


def arms_milliseconds(arms: Sequence[Arm], root: Path, options: argparse.Namespace) -> dict[str, float]:
    """`studies.chunk_milliseconds` of the arms along the first demonstration."""
    import numpy as np

    from vla.frame_cache import FrameCache
    from vla.interface import Observation
    from vla.policy import load_policy

    cache = FrameCache.open(options.dataset)
    instruction = cache.instructions[cache.episode_instructions[0]]
    seen = [
        Observation({camera: np.array(images[frame]) for camera, images in cache.images.items()}, cache.state[frame], instruction)
        for frame in range(0, int(cache.episode_starts[1]), studies.STRIDE)
    ]
    return studies.chunk_milliseconds({arm.name: load_policy(policy_of(arm, root)) for arm in arms}, seen, options)


def check_arm(arm: Arm, root: Path, options: argparse.Namespace) -> None:
    """Raise ValueError if what is kept of an arm was made with other settings or data than these."""
    identity = {
        "config": yaml.safe_load(arm.config.read_text()), "settings": list(arm.settings), "dataset": str(options.dataset),
        "tasks": options.tasks, "minutes": options.minutes, "suite": options.suite,
    }  # fmt: skip
    path = root / f"{arm.name}.json"
    if path.exists():
        changed = differences(json.loads(path.read_text()), identity)
        if changed:
            raise ValueError(f"{root / arm.name} was made otherwise: {changed}. Remove {path.with_suffix('')}* or move {root}.")
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity, indent=1))


def policy_of(arm: Arm, root: Path) -> Path:
    return root / arm.name / "checkpoints" / "last" / "policy"


def start_training(arm: Arm, root: Path, options: argparse.Namespace) -> subprocess.Popen | None:
    """The training process of one arm; None if it is finished."""
    run = root / arm.name
    if (run / "done").exists():
        return None
    command = [
        *VLA, "train", f"--config_path={arm.config}", f"--dataset.root={options.dataset}", *arm.settings,
        f"--training.minutes={options.minutes}", "--training.threads=1", f"--output_dir={run}",
    ]  # fmt: skip
    if options.tasks:
        command.append(f"--dataset.tasks={options.tasks}")
    if (run / "checkpoints" / "last").exists():
        command.append("--resume")
    return subprocess.Popen(command)


def evaluate_arm(arm: Arm, root: Path, options: argparse.Namespace) -> list[EpisodeRow]:
    """The episodes asked for of one trained arm; its folder may hold more, of a call that asked for more.

    Raises ChildProcessError if one ended with an error: arms are judged on all starts.
    """
    folder = root / f"{arm.name}-evaluation"
    tasks = json.loads(options.tasks) if options.tasks else list(range(get_suite(options.suite).num_tasks))
    asked = episode_list(tasks, options.episodes // len(tasks))
    command = [
        *VLA, "eval", f"--policy.path={policy_of(arm, root)}", f"--suite={options.suite}",
        f"--episodes={options.episodes // len(tasks)}", "--workers=2", "--resume", f"--output_dir={folder}",
    ]  # fmt: skip
    if options.tasks:
        command.append(f"--tasks={options.tasks}")
    subprocess.run(command, check=True)
    rows = [row for row in latest_episodes(folder / ROWS) if (row.task, row.episode) in asked]
    if any(row.error for row in rows):
        raise ChildProcessError(f"{sum(bool(row.error) for row in rows)} episodes of {arm.name} ended with an error; see {folder}.")
    return rows


def end_of_training(run: Path) -> tuple[int, float]:
    """Steps trained, and the last held-out action error (nan: none was logged)."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    errors = [entry["validation/action_error"] for entry in log if "validation/action_error" in entry]
    return log[-1]["step"], errors[-1] if errors else float("nan")
