"""Policies compared under one budget: train every arm, evaluate each on the same validation starts, one row an arm.

Each arm is one `vla train` process with one thread; `--concurrent` of them train at the same time, so that the machine's other
load hits them alike. Finished parts are kept, and a second call goes on from there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sim.results import read_episodes, wilson
from vla.home import remask_home

VLA = [sys.executable, "-m", "vla.cli"]
COLUMNS = ("success %", "95 % low", "95 % high", "n", "ms per chunk", "rounds", "steps trained", "held-out error")


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
    """Train and evaluate the arms under `root`; rows [name, *COLUMNS]. Raises ChildProcessError if a part fails."""
    for first in range(0, len(arms), options.concurrent):
        group = arms[first : first + options.concurrent]
        running = [(arm, start_training(arm, root, options)) for arm in group]
        failed = [arm.name for arm, process in running if process is not None and process.wait() != 0]
        if failed:
            raise ChildProcessError(f"training of {failed} failed; see its output above.")
        for arm in group:
            (root / arm.name / "done").touch()
    return [evaluate_arm(arm, root, options) for arm in arms]


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
    if (run / "checkpoints").exists():
        command.append("--resume")
    return subprocess.Popen(command)


def evaluate_arm(arm: Arm, root: Path, options: argparse.Namespace) -> list:
    """Evaluate one trained arm; its row."""
    run, folder = root / arm.name, root / f"{arm.name}-evaluation"
    tasks = json.loads(options.tasks) if options.tasks else [0]
    command = [
        *VLA, "eval", f"--policy.path={run / 'checkpoints' / 'last' / 'policy'}", f"--suite={options.suite}",
        f"--episodes={options.episodes // len(tasks)}", "--workers=2", "--resume", f"--output_dir={folder}",
    ]  # fmt: skip
    if options.tasks:
        command.append(f"--tasks={options.tasks}")
    subprocess.run(command, check=True)
    rows = list(read_episodes(folder / "episodes.jsonl"))
    if any(row.error for row in rows):
        raise ChildProcessError(f"{sum(bool(row.error) for row in rows)} episodes of {arm.name} ended with an error; see {folder}.")
    successes = sum(row.success for row in rows)
    low, high = wilson(successes, len(rows))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    errors = [entry["validation/action_error"] for entry in log if "validation/action_error" in entry]
    return [
        arm.name, 100 * successes / len(rows), 100 * low, 100 * high, len(rows),
        statistics.median(row.policy_ms for row in rows if row.policy_ms is not None),
        statistics.mean(row.rounds for row in rows if row.rounds is not None),
        log[-1]["step"], errors[-1] if errors else float("nan"),
    ]  # fmt: skip
