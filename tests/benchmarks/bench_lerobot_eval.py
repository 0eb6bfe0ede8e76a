"""Episodes per hour of `vla eval` against lerobot-eval: same suite, task, starts, policy, step limit and machine, in turn.

    vla bench lerobot_eval --policy RUN/checkpoints/last/policy [--suite robosuite_lift] [--episodes 5] [--repetitions 3]

The policy is converted to LeRobot's folder once. A repetition runs both programs on the same validation starts, the order
alternating. Both have one process and one environment, and are what a user calls: lerobot-eval observes every step and
films its first ten episodes, which it cannot be told not to do. Two figures: episodes an hour by each program's own clock
(eval_s), and by the wall, start-up included. Successes of the same start are compared, to see that it is the same work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import median_ratio, parser, quiet_machine, report

GOAL = 1.0  # times as many episodes an hour


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(repetitions=3)
    arguments.add_argument("--policy", required=True, help="checkpoint folder")
    arguments.add_argument("--suite", default="robosuite_lift")
    arguments.add_argument("--task", type=int, default=0)
    arguments.add_argument("--episodes", type=int, default=5, help="starts 0 to N - 1 of a repetition")
    arguments.add_argument("--execution_horizon", type=int, default=5, help="actions executed of each chunk")
    options = arguments.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        convert = ["convert", f"--source={options.policy}", f"--output_dir={root / 'lerobot'}"]
        run([*python("vla.cli"), *convert, f"--n_action_steps={options.execution_horizon}"], options)
        programs: dict[str, Callable[[Path], list[str]]] = {
            "vla eval": lambda output: our_command(options, output),
            "lerobot-eval": lambda output: lerobot_command(options, root / "lerobot", output),
        }
        own: dict[str, list[float]] = {name: [] for name in programs}
        wall: dict[str, list[float]] = {name: [] for name in programs}
        solved: dict[str, list[list[bool]]] = {name: [] for name in programs}
        with quiet_machine():
            for repetition in range(options.repetitions):
                for name in list(programs)[:: 1 if repetition % 2 == 0 else -1]:
                    output = root / f"{name.replace(' ', '-')}-{repetition}"
                    wall[name].append(run(programs[name](output), options))
                    info = json.loads((output / "eval_info.json").read_text())
                    own[name].append(info["overall"]["eval_s"])
                    solved[name].append(successes(info, options.episodes))
    same = solved["vla eval"] == solved["lerobot-eval"]
    counts = {name: [sum(map(sum, lists)), sum(map(len, lists))] for name, lists in solved.items()}
    rows = [[name, per_hour(own[name], options), per_hour(wall[name], options), *counts[name]] for name in programs]
    ratio_with_start_up = median_ratio(wall["lerobot-eval"], wall["vla eval"])
    ratio = median_ratio(own["lerobot-eval"], own["vla eval"])
    report(
        "lerobot_eval", ["program", "episodes per hour", "with start-up", "solved", "episodes"], rows, options.output,
        suite=options.suite, task=options.task, ratio=ratio, ratio_with_start_up=ratio_with_start_up,
        same_successes=same, seconds=own, repetitions=options.repetitions, threads=options.threads,
    )  # fmt: skip
    print(f"vla eval runs {ratio:.2f} times as many episodes an hour; outcomes of the starts {'agree' if same else 'DIFFER'}")
    return int(ratio < GOAL)


def our_command(options: argparse.Namespace, output: Path) -> list[str]:
    return [
        *python("vla.cli"), "eval", f"--policy.path={options.policy}", f"--suite={options.suite}", f"--tasks=[{options.task}]",
        f"--episodes={options.episodes}", "--workers=1", "--protocol=lerobot",
        f"--execution_horizon={options.execution_horizon}", f"--output_dir={output}",
    ]  # fmt: skip


def lerobot_command(options: argparse.Namespace, policy: Path, output: Path) -> list[str]:
    return [
        *python("lerobot.scripts.lerobot_eval"), "--policy.discover_packages_path=vla.lerobot_plugin",
        "--env.discover_packages_path=sim.lerobot_plugin", f"--policy.path={policy}", "--policy.device=cpu",
        "--env.type=remask", f"--env.task={options.suite}", f"--env.task_id={options.task}", "--env.protocol=lerobot",
        f"--env.image_size={image_size(policy)}", f"--eval.n_episodes={options.episodes}",
        "--eval.batch_size=1", "--seed=0", f"--output_dir={output}",
    ]  # fmt: skip


def image_size(policy: Path) -> int:
    """Pixels of the robot's cameras, from the checkpoint's schema."""
    return json.loads((policy / "schema.json").read_text())["image_size"]


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def run(command: list[str], options: argparse.Namespace) -> float:
    """Seconds on the wall. Raises ChildProcessError with the end of what it said."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    began = time.perf_counter()
    # LP_NUM_THREADS=0: what `vla eval` gives its simulator processes; lerobot-eval is given the same
    done = subprocess.run(command, env={**os.environ, **threads, "LP_NUM_THREADS": "0"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise ChildProcessError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - began


def successes(info: dict[str, Any], episodes: int) -> list[bool]:
    """Of the one task, by start. Raises ValueError if there are not as many as asked for."""
    (task,) = info["per_task"]
    found = [bool(success) for success in task["metrics"]["successes"]]
    if len(found) != episodes:
        raise ValueError(f"{len(found)} episodes ended without an error, {episodes} were asked for.")
    return found


def per_hour(seconds: list[float], options: argparse.Namespace) -> float:
    return 3600 * options.episodes / statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
