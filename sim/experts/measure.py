"""Success of the scripted experts: `vla experts`. Renders nothing, so an episode takes about a second.

While it runs, finished episodes lie in `<output>.rows.jsonl`; the same command goes on after an interruption.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sim.environment import Environment
from sim.episode_worker import version
from sim.experts.programs import NoisyExpert, build_expert
from sim.job_queue import ErrorCount, JobQueue
from sim.results import Tally, append_row, differences, mean, read_rows
from sim.seeds import start
from sim.suites import build_environment, get_suite
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs, serve_jobs
from vla.cli import parse_config
from vla.home import remask_home


@dataclass(frozen=True)
class MeasureConfig:
    """Settings of `vla experts`."""

    suite: str = "robosuite_lift"
    tasks: list[int] | None = None  # default: all
    episodes: int = 20  # per task
    split: str = "validation"  # starts: train, validation or official
    noise: float = 0.0  # standard deviation of the disturbance of executed motion, action units
    max_steps: int | None = None  # default: the suite's openpi limit
    workers: int = 1  # simulator processes
    output: Path | None = None  # JSON file, default: REMASK_HOME/experts/<suite>-<split>.json

    def __post_init__(self) -> None:
        suite = get_suite(self.suite)
        unknown = [task for task in self.tasks or () if not 0 <= task < suite.num_tasks]
        if unknown:
            raise ValueError(f"--tasks: {self.suite} has no task {unknown[0]}; allowed: 0 to {suite.num_tasks - 1}.")
        if self.episodes < 1:
            raise ValueError(f"--episodes={self.episodes}: at least 1.")
        if self.workers < 1:
            raise ValueError(f"--workers={self.workers}: at least 1 simulator process.")
        suite.check_starts(self.split, self.episodes)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with its beginning, the experts' code among it."""
        settings = {"suite": self.suite, "split": self.split, "noise": self.noise, "max_steps": self.step_limit}
        return {**settings, "experts": code_hash(), "mujoco": version("mujoco")}

    @property
    def rows_path(self) -> Path:
        return self.path.with_suffix(".rows.jsonl")

    @property
    def task_list(self) -> list[int]:
        return list(range(get_suite(self.suite).num_tasks)) if self.tasks is None else sorted(set(self.tasks))

    @property
    def step_limit(self) -> int:
        return self.max_steps or get_suite(self.suite).max_steps["openpi"]

    @property
    def path(self) -> Path:
        return Path(self.output or remask_home() / "experts" / f"{self.suite}-{self.split}.json").expanduser()


@functools.cache
def code_hash() -> str:
    """Of the experts' source and their geometry: attempts of two versions belong to no one table. 12 hex digits."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(folder.glob("*.py")), folder.parent / "boxes.py"):
        if path.name != Path(__file__).name:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Attempt:
    """One episode of an expert."""

    task: int
    index: int  # of the start within its split
    success: bool
    steps: int
    wall_s: float
    error: str | None = None  # an exception's text; such an episode counts in no rate


@dataclass(frozen=True)
class Job:
    """One start of one task."""

    task: int
    index: int


def attempt(environment: Environment, expert: Callable[..., Any], config: MeasureConfig, job: Job) -> Attempt:
    """Run the expert from one start until success or the step limit."""
    begin, where = time.perf_counter(), start(config.split, job.index)
    environment.reset(job.task, where)
    noisy = NoisyExpert(expert(environment, job.task), config.noise, where.seed)
    steps, success = 0, False
    while not success and steps < config.step_limit:
        executed, _ = noisy.act(environment.world())
        success = environment.step(executed)
        steps += 1
    return Attempt(job.task, job.index, success, steps, round(time.perf_counter() - begin, 3))


def work(
    connection: Connection, config: MeasureConfig, build: Callable[..., Environment], expert: Callable[..., Any]
) -> None:
    """A simulator process: attempts the starts it is given. Imports no torch of ours."""

    def begin() -> tuple[dict[str, Any], Callable[[Job], Attempt]]:
        environment = build(config.suite)
        instructions = {task: environment.instruction(task) for task in config.task_list}
        return {"instructions": instructions, "assets": getattr(environment, "assets", "unknown")}, functools.partial(attempt, environment, expert, config)

    serve_jobs(connection, begin)


def measure(
    config: MeasureConfig,
    *,
    build: Callable[..., Environment] = build_environment,
    expert: Callable[..., Any] = build_expert,
) -> tuple[dict[str, Any], list[Attempt]]:
    """Facts of the world ("instructions" by task, "assets"), and `config.episodes` attempts of every task, in order, whatever
    the number of workers.

    build, expert: module-level functions (tests give fakes). A process keeps to its task, since a LIBERO model holds one.
    Raises ValueError if the rows on disk are another run's, ChildProcessError if episodes keep ending with exceptions.
    """
    attempts = {Job(row["task"], row["index"]): Attempt(**row) for row in open_rows(config)}
    wanted = [Job(task, index) for task in config.task_list for index in range(config.episodes)]
    queue = JobQueue([job for job in wanted if job not in attempts])
    facts: dict[str, Any] = {}

    missing = len(queue)
    with tqdm(total=len(wanted), initial=len(wanted) - missing, unit="episode", disable=None) as bar:
        errors = ErrorCount(bar.write)

        def finished(job: Job, outcome: Done | Failed | Died) -> None:
            queue.finish(job)
            bar.update()
            if isinstance(outcome, Done):
                attempts[job] = outcome.result
                append_row(config.rows_path, dataclasses.asdict(outcome.result))
            else:  # not stored: an exception says nothing of the start, so that a resumed run tries it again
                attempts[job] = Attempt(job.task, job.index, False, 0, 0.0, str(outcome))
                errors.add(f"task {job.task}, start {job.index}", outcome)

        with WorkerPool(max(1, min(config.workers, missing)), work, (config, build, expert)) as pool:
            run_jobs(pool, queue.next_job, started=facts.update, finished=finished)
    return facts, [attempts[job] for job in wanted]


def open_rows(config: MeasureConfig) -> list[dict[str, Any]]:
    """The rows of an interrupted run; begins the file. Raises ValueError if they are another run's."""
    rows = read_rows(config.rows_path)
    if not rows:
        config.rows_path.parent.mkdir(parents=True, exist_ok=True)
        append_row(config.rows_path, config.identity)
        return []
    changed = differences(rows[0], config.identity)
    if changed:
        raise ValueError(
            f"{config.rows_path} holds an unfinished run with other settings: {changed}. Delete it or use another --output."
        )
    return rows[1:]


def summary(attempts: Sequence[Attempt]) -> dict[str, float | int | list[float] | None]:
    errors = sum(a.error is not None for a in attempts)
    count = Tally(sum(a.success for a in attempts), len(attempts) - errors, errors)
    return {
        "successes": count.successes,
        "episodes": count.episodes,
        "errors": count.errors,
        "interval_95": list(count.interval),
        "mean_steps": mean(a.steps for a in attempts if a.success),
        "max_steps": max((a.steps for a in attempts if a.success), default=None),
        "wall_s": mean(a.wall_s for a in attempts),
    }


def report(config: MeasureConfig, facts: dict[str, Any], attempts: Sequence[Attempt]) -> dict:
    """What the JSON file holds: settings, what they ran on, a summary per task and over all, every attempt."""
    tasks = {
        str(task): {
            "instruction": facts["instructions"][task],
            **summary([a for a in attempts if a.task == task]),
        }
        for task in config.task_list
    }
    settings = {**dataclasses.asdict(config), "output": str(config.path), "max_steps": config.step_limit}
    return {
        "config": settings,
        "made_with": {"experts": code_hash(), "assets": facts["assets"], **{name: version(name) for name in ("mujoco", "robosuite")}},
        "tasks": tasks,
        "all": summary(attempts),
        "attempts": [dataclasses.asdict(a) for a in attempts],
    }


def table(results: dict, title: str) -> Table:
    """Success per task and over all with 95 % Wilson intervals; steps are those of solved episodes."""
    view = Table(title=title)
    view.add_column("task")
    view.add_column("instruction", no_wrap=True, max_width=24)
    for heading in ("success", "95 %", "steps", "most", "s"):
        view.add_column(heading, justify="right")
    rows = list(results["tasks"].items())
    if len(rows) > 1:
        rows.append(("all", {"instruction": f"{len(rows)} tasks", **results["all"]}))
    for name, row in rows:
        low, high = row["interval_95"]
        steps = "-" if row["mean_steps"] is None else f"{row['mean_steps']:.1f}"
        view.add_row(
            name,
            row["instruction"],
            f"{row['successes']}/{row['episodes']}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            steps,
            str(row["max_steps"] or "-"),
            f"{row['wall_s']:.2f}",
        )
    return view


def main(argv: Sequence[str]) -> int:
    config = parse_config(MeasureConfig, argv, verb="experts")
    results = report(config, *measure(config))
    config.path.write_text(json.dumps(results, indent=1))
    config.rows_path.unlink()
    Console().print(table(results, f"scripted experts, {config.suite}, {config.split} starts"))
    print(f"written: {config.path}")
    return 0
