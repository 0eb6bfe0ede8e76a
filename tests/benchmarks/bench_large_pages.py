"""What huge memory pages are worth to a training step of the desk policy (vla/large_pages.py).

They are chosen when a process starts, so each measurement is a process of its own: one with small pages, one with large ones, in
turn. Each drops its first steps, in which memory is fetched, and gives the median of the others.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from tests.benchmarks.bench_training import SHIPPED, build_step
from tests.benchmarks.harness import median_ratio, parser, quiet_machine, report
from vla.large_pages import TUNABLES

COLUMNS = ("pages", "ms per step", "lowest", "highest", "time / small")
WARM_UP = 3  # steps


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--batch_size", type=int, default=32)
    arguments.add_argument("--steps", type=int, default=8, help="timed in a process")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments.set_defaults(repetitions=5)
    options = arguments.parse_args(argv)
    if options.child:
        print(median_step(options))
        return 0
    small = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environments = {"small": small, "large": small | {"GLIBC_TUNABLES": TUNABLES}}
    seconds: dict[str, list[float]] = {name: [] for name in environments}
    with quiet_machine():
        for _ in range(options.repetitions):
            for name, environment in environments.items():
                seconds[name].append(in_a_process(options, environment))
    rows = [
        [name, 1e3 * statistics.median(times), 1e3 * min(times), 1e3 * max(times), median_ratio(times, seconds["small"])]
        for name, times in seconds.items()
    ]
    report("large_pages", COLUMNS, rows, options.output, batch_size=options.batch_size, threads=options.threads)
    return 0


def median_step(options: argparse.Namespace) -> float:
    """Seconds."""
    torch.set_num_threads(options.threads)
    step = build_step(options.batch_size, **SHIPPED)
    seconds = []
    for _ in range(WARM_UP + options.steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[WARM_UP:])


def in_a_process(options: argparse.Namespace, environment: dict[str, str]) -> float:
    command = [
        sys.executable, "-m", "tests.benchmarks.bench_large_pages", "--child", f"--batch_size={options.batch_size}",
        f"--steps={options.steps}", f"--threads={options.threads}",
    ]  # fmt: skip
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    raise SystemExit(main())
