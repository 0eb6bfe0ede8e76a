"""Heads on one backbone: three over tokens, L1 regression, flow matching; same data, same budget, same validation starts.

Each arm is one `vla train` process with one thread; `--concurrent` of them train at the same time, so that the machine's
other load hits them alike. Then each policy is evaluated on the same validation starts. Finished parts are kept, and a
second call goes on from there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from sim.results import read_episodes, wilson
from tests.benchmarks.harness import parser, report
from vla.action_head import HEAD_TYPES
from vla.home import remask_home

VLA = [sys.executable, "-m", "vla.cli"]


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--suite", default="robosuite_lift")
    arguments.add_argument("--config", type=Path, default=Path("configs/lift_demo.yaml"))
    arguments.add_argument("--dataset", type=Path, default=remask_home() / "demo" / "dataset")
    arguments.add_argument("--tasks", default="", help="e.g. [0,1,2,3]; default: all")
    arguments.add_argument("--minutes", type=float, default=20, help="training budget of an arm, wall clock")
    arguments.add_argument("--episodes", type=int, default=100, help="validation episodes of an arm, over all its tasks")
    arguments.add_argument("--concurrent", type=int, default=1, help="arms trained at the same time")
    arguments.add_argument("--heads", nargs="+", default=list(HEAD_TYPES), choices=HEAD_TYPES)
    options = arguments.parse_args(argv)
    root = remask_home() / "bench" / f"heads-{options.suite}-{options.minutes:g}min"
    for first in range(0, len(options.heads), options.concurrent):
        group = options.heads[first : first + options.concurrent]
        running = [(head, start_training(head, root, options)) for head in group]
        failed = [head for head, process in running if process is not None and process.wait() != 0]
        if failed:
            raise ChildProcessError(f"training of {failed} failed; see its output above.")
    rows = [arm(head, root, options) for head in options.heads]
    columns = ["head", "success %", "95 % low", "95 % high", "n", "ms per chunk", "rounds", "jerk", "steps trained", "held-out error"]
    report(
        f"heads-{options.suite}", columns, rows, options.output,
        minutes=options.minutes, concurrent=options.concurrent, tasks=options.tasks,
    )  # fmt: skip
    return 0


def start_training(head: str, root: Path, options: argparse.Namespace) -> subprocess.Popen | None:
    """The training process of one arm; None if it is finished."""
    run = root / head
    if (run / "done").exists():
        return None
    command = [
        *VLA, "train", f"--config_path={options.config}", f"--dataset.root={options.dataset}", f"--head.type={head}",
        f"--training.minutes={options.minutes}", "--training.threads=1", f"--output_dir={run}",
    ]  # fmt: skip
    if options.tasks:
        command.append(f"--dataset.tasks={options.tasks}")
    if (run / "checkpoints").exists():
        command.append("--resume")
    return subprocess.Popen(command)


def arm(head: str, root: Path, options: argparse.Namespace) -> list:
    """Evaluate one trained arm; its row."""
    run, folder = root / head, root / f"{head}-evaluation"
    (run / "done").touch()
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
        raise ChildProcessError(f"{sum(bool(row.error) for row in rows)} episodes of {head} ended with an error; see {folder}.")
    successes = sum(row.success for row in rows)
    low, high = wilson(successes, len(rows))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    errors = [entry["validation/action_error"] for entry in log if "validation/action_error" in entry]
    return [
        head, 100 * successes / len(rows), 100 * low, 100 * high, len(rows),
        statistics.median(row.policy_ms for row in rows if row.policy_ms is not None),
        statistics.mean(row.rounds for row in rows if row.rounds is not None),
        statistics.mean(row.jerk for row in rows if row.jerk is not None),
        log[-1]["step"], errors[-1] if errors else float("nan"),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
