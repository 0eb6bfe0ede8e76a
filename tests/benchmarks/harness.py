"""What every benchmark shares: quiet the machine, time interleaved, print a table, write JSON.

A benchmark compares variants within one run: each repetition times every variant once, so that a change in the
machine's load hits all of them, and medians of ratios are quoted.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from sim.evaluate import git_commit

_OWN_VERBS = (
    *("demo", "collect", "corpus", "train", "train-vlm", "train-bind", "train-draft", "calibrate", "dagger"),
    *("eval", "experts"),
)


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--repetitions", type=int, default=9, help="interleaved timings of each variant")
    arguments.add_argument("--threads", type=int, default=1, help="threads of torch and BLAS")
    arguments.add_argument("--output", type=Path, default=None, help="JSON file; default outputs/bench/NAME.json")
    return arguments


@contextmanager
def quiet_machine() -> Iterator[None]:
    """Stop this user's running `vla collect|train|train-vlm|eval|...` processes for the time of the block."""
    paused = [pid for pid in _background_jobs() if _signal(pid, signal.SIGSTOP)]
    if paused:
        print(f"paused {len(paused)} background processes of this project")
    try:
        time.sleep(0.2)
        print(f"load averages {', '.join(f'{value:.2f}' for value in os.getloadavg())} on {os.cpu_count()} cores")
        yield
    finally:
        for pid in paused:
            _signal(pid, signal.SIGCONT)


def interleaved(
    variants: Mapping[str, Callable[[], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant, `repetitions` times in turn, after one untimed call of each.

    clock: time.process_time counts what this process computed and not what it waited for on a busy machine (single-threaded
    work only: threads add up).
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, run in variants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over repetitions of paired ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def report(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], output: Path | None, **facts: Any) -> None:
    """Print the rows as a table and write them with command, commit, machine and versions to JSON."""
    from rich.table import Table

    from vla.show import show

    table = Table(title=name, *columns)
    for row in rows:
        table.add_row(*("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    show(table)
    path = output or Path("outputs") / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        **facts,
        "command": sys.argv[1:],
        "git_commit": git_commit(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in ("torch", "mujoco", "timm")},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    path.write_text(json.dumps(record, indent=2))
    print(f"wrote {path}")


def _background_jobs() -> list[int]:
    """Process ids of this user's `vla VERB` runs and their workers, this process's ancestors excepted."""
    spared, pid = set(), os.getpid()
    while pid > 1:
        spared.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    jobs, parents = [], {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        called = {Path(word).name for word in words[:3]}
        if {"vla", "vla.cli"} & called and set(words) & set(_OWN_VERBS):
            jobs.append(int(entry.name))
    for child, parent in parents.items():  # spawned workers
        if parent in jobs and child not in jobs:
            jobs.append(child)
    return [job for job in jobs if job not in spared]


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
