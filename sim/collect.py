"""Expert episodes -> LeRobotDataset v3.0 and frame cache: `vla collect`.

A data set folder while it is collected, and when it is packed:

    episodes/task_003-start_000017.npz   finished demonstrations, whole or absent; removed once packed
    settings.json attempts.jsonl         what was asked for; every start that was tried, with its outcome
    collect.json                         expert success with intervals, attempts per hour, sizes
    meta/ data/                          the LeRobotDataset (not with --cache_only)
    cache/                               the frame cache that training reads

Which starts are used depends on neither the number of workers nor interruptions: per task the first `episodes_per_task`
training starts that the expert solves.
"""

import functools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from sim import demonstration, packing
from sim.environment import Environment
from sim.experts.programs import build_expert
from sim.folder_lock import locked
from sim.job_queue import ErrorCount, choose_task
from sim.results import Tally, append_row, differences, read_rows
from sim.seeds import start
from sim.suites import build_environment, get_suite
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs, serve_jobs
from vla.home import remask_home
from vla.interface import RobotSpec
from vla.show import show

SPLIT = "train"
TRIES = 2  # of a start that raises an exception; then it counts as not solved, since it would raise for ever
PATIENCE = 20  # starts tried after which a task is given up while fewer than a quarter of them are solved


@dataclass(frozen=True)
class CollectConfig:
    """Settings of `vla collect`."""

    suite: str = "robosuite_lift"
    output_dir: Path | None = None  # default: REMASK_HOME/datasets/<suite>
    tasks: list[int] | None = None  # default: all
    episodes_per_task: int = 50  # successful ones
    workers: int = 2  # simulator processes
    noise: float = 0.0  # standard deviation added to executed motion, action units
    random_starts: bool = False  # the hand begins at a random pose within reach, more or less open
    mishaps: float = 0.0  # probability that an episode's hand is pushed once, or made to let go of what it carries
    image_size: int | None = None  # pixels, default: the suite's
    mesh_detail: float = 1.0  # share of the meshes' triangles drawn; 0.15 draws about 3 times faster without a GPU, nearly the same frames
    max_steps: int | None = None  # default: the suite's openpi limit
    cache_only: bool = False  # build the frame cache without a LeRobotDataset

    @property
    def root(self) -> Path:
        return Path(self.output_dir or remask_home() / "datasets" / self.suite).expanduser()

    @property
    def task_list(self) -> list[int]:
        return list(range(get_suite(self.suite).num_tasks)) if self.tasks is None else sorted(set(self.tasks))

    @property
    def step_limit(self) -> int:
        return self.max_steps or get_suite(self.suite).max_steps["openpi"]

    @property
    def frame_bytes(self) -> int:
        suite = get_suite(self.suite)
        return len(suite.cameras) * 3 * (self.image_size or suite.image_size) ** 2

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed collection must share with its beginning."""
        return {
            "suite": self.suite,
            "split": SPLIT,
            "noise": self.noise,
            "random_starts": self.random_starts,
            "mishaps": self.mishaps,
            "image_size": self.image_size or get_suite(self.suite).image_size,
            "mesh_detail": self.mesh_detail,
            "max_steps": self.step_limit,
        }


@dataclass(frozen=True)
class Job:
    """One training start of one task."""

    task: int
    index: int


class Schedule:
    """Which start to try next: per task in order, never more at once than successes are missing."""

    def __init__(self, tasks: list[int], episodes_per_task: int, attempts: list[dict[str, Any]]) -> None:
        self.episodes_per_task = episodes_per_task
        self.outcomes: dict[int, dict[int, bool]] = {task: {} for task in tasks}  # task -> start index -> success
        self.running: dict[int, set[int]] = {task: set() for task in tasks}
        for attempt in attempts:
            if attempt["task"] in self.outcomes:
                self.outcomes[attempt["task"]][attempt["index"]] = attempt["success"]

    def next_job(self, last: Job | None) -> Job | None:
        waiting = {task: self._missing(task) - len(self.running[task]) for task in self.outcomes}
        busy = {task: len(indices) for task, indices in self.running.items()}
        task = choose_task(waiting, last.task if last else None, busy)
        if task is None:
            return None
        index = 0
        while index in self.outcomes[task] or index in self.running[task]:
            index += 1
        self.running[task].add(index)
        return Job(task, index)

    def finish(self, job: Job, success: bool) -> None:
        self.running[job.task].discard(job.index)
        self.outcomes[job.task][job.index] = success

    def put_back(self, job: Job) -> None:
        """The start is tried again."""
        self.running[job.task].discard(job.index)

    def solved(self, task: int) -> list[int]:
        """Start indices of the demonstrations wanted, in order."""
        return sorted(index for index, success in self.outcomes[task].items() if success)[: self.episodes_per_task]

    def is_hopeless(self, task: int) -> bool:
        outcomes = self.outcomes[task].values()
        return len(outcomes) >= PATIENCE and sum(outcomes) < len(outcomes) / 4

    @property
    def num_solved(self) -> int:
        return sum(len(self.solved(task)) for task in self.outcomes)

    def _missing(self, task: int) -> int:
        return 0 if self.is_hopeless(task) else self.episodes_per_task - len(self.solved(task))


def work(
    connection: Connection, config: CollectConfig, build: Callable[..., Environment], expert: Callable[..., Any]
) -> None:
    """A simulator process: records the starts it is given and stages the successes. Imports no torch of ours."""

    def begin() -> tuple[dict[str, Any], Callable[[Job], dict[str, Any]]]:
        environment = build(config.suite, image_size=config.image_size, mesh_detail=config.mesh_detail)
        return environment.spec.to_dict(), functools.partial(attempt, config, environment, expert)

    serve_jobs(connection, begin)


def attempt(config: CollectConfig, environment: Environment, expert: Callable[..., Any], job: Job) -> dict[str, Any]:
    """Record one start, stage it if it succeeds, return its outcome; "disk" holds the text of a failed write."""
    began = time.perf_counter()
    episode = demonstration.record(
        environment,
        expert(environment, job.task),
        task=job.task,
        start=start(SPLIT, job.index),
        max_steps=config.step_limit,
        noise=config.noise,
        random_start=config.random_starts,
        mishaps=config.mishaps,
    )
    outcome = {"success": episode.success, "steps": len(episode.action)}
    if episode.success:
        try:
            demonstration.save(episode, demonstration.staged_path(config.root / "episodes", job.task, job.index))
        except OSError as error:
            outcome["disk"] = str(error)
    return {**outcome, "wall_s": round(time.perf_counter() - began, 3)}


def collect(
    config: CollectConfig,
    *,
    build: Callable[..., Environment] = build_environment,
    expert: Callable[..., Any] = build_expert,
) -> dict[str, Any]:
    """Collect and pack; returns what collect.json holds. build, expert: module-level functions (tests give fakes).

    Raises ValueError if the folder holds another collection, the disk is too small or the expert cannot do a task,
    OSError if the disk fills up or the simulator does not run. What is staged stays, and the same command goes on.
    """
    check_tasks(config)
    with locked(config.root):
        return collect_into(config.root, config, build, expert)


def collect_into(
    root: Path, config: CollectConfig, build: Callable[..., Environment], expert: Callable[..., Any]
) -> dict[str, Any]:
    """`collect` once the folder is ours."""
    attempts = open_collection(config)
    schedule = Schedule(config.task_list, config.episodes_per_task, attempts)
    check_space(config, schedule)
    began, already = time.perf_counter(), len(attempts)
    spec = run_attempts(config, schedule, attempts, build, expert)
    seconds = time.perf_counter() - began
    hopeless = [task for task in config.task_list if schedule.is_hopeless(task)]
    if hopeless:
        raise ValueError(
            f"The expert solves fewer than a quarter of the starts of tasks {hopeless} of {config.suite}; see "
            f"{root / 'attempts.jsonl'}. Leave them out with --tasks: what the others have staged is kept."
        )
    report = {
        **config.identity,
        "episodes_per_task": config.episodes_per_task,
        "expert": {str(task): summary(attempts, [task]) for task in config.task_list},
        "expert_all": summary(attempts, config.task_list),
        "workers": config.workers,
        "collect_s": round(seconds, 1),
        "attempts_per_hour": round(3600 * (len(attempts) - already) / seconds) if len(attempts) > already else None,
    }
    staged = root / "episodes"
    paths = [demonstration.staged_path(staged, task, index) for task in config.task_list for index in schedule.solved(task)]
    report["staged_bytes"] = packing.folder_bytes(staged)
    print(f"Packing {len(paths)} demonstrations ({report['staged_bytes'] / 1e9:.2f} GB staged) ...")
    began = time.perf_counter()
    report |= packing.pack(root, spec, paths, source=f"vla collect, {config.suite}", cache_only=config.cache_only)
    report["pack_s"] = round(time.perf_counter() - began, 1)
    (root / "collect.json").write_text(json.dumps(report, indent=1))
    shutil.rmtree(staged)
    print_report(report, root)
    return report


def run_attempts(
    config: CollectConfig, schedule: Schedule, attempts: list[dict[str, Any]], build: Callable, expert: Callable
) -> RobotSpec:
    """Try starts in W processes until the schedule is content, appending each outcome to `attempts` and to the file."""
    specs: list[dict[str, Any]] = []
    raised = times_raised(read_rows(config.root / "attempts.jsonl"))
    total = config.episodes_per_task * len(config.task_list)
    with tqdm(total=total, initial=schedule.num_solved, unit="episode", desc=config.suite) as bar:
        errors = ErrorCount(bar.write)

        def finished(job: Job, outcome: Done | Failed | Died) -> None:
            error = None if isinstance(outcome, Done) else str(outcome)
            result = {"success": False, "steps": 0, "wall_s": 0.0} if error else outcome.result
            if "disk" in result:
                raise OSError(f"{result['disk']}. All staged episodes are whole: make room and run the same command again.")
            row = {"task": job.task, "index": job.index, "seed": start(SPLIT, job.index).seed, **result, "error": error}
            row |= {"died": True} if isinstance(outcome, Died) else {}
            append_row(config.root / "attempts.jsonl", row)
            attempts.append(row)
            if error:
                raised.update(times_raised([row]))
                if raised[job.task, job.index] < TRIES:
                    schedule.put_back(job)
                else:
                    schedule.finish(job, False)
                errors.add(f"task {job.task}, start {job.index}", error)
                return
            schedule.finish(job, row["success"])
            bar.set_postfix_str(f"expert {tally(attempts, config.task_list)}", refresh=False)
            bar.update(schedule.num_solved - bar.n)

        with WorkerPool(min(config.workers, total), work, (config, build, expert)) as pool:
            run_jobs(pool, schedule.next_job, started=specs.append, finished=finished)
    return RobotSpec.from_dict(specs[0])


def check_tasks(config: CollectConfig) -> None:
    """Raise ValueError on tasks that the suite lacks or numbers that make no sense."""
    count = get_suite(config.suite).num_tasks
    unknown = [task for task in config.task_list if not 0 <= task < count]
    if unknown or not config.task_list:
        raise ValueError(f"Suite {config.suite!r} has no tasks {unknown}; allowed: 0 to {count - 1}.")
    if config.episodes_per_task < 1 or not 0 <= config.noise <= 1 or not 0 <= config.mishaps <= 1:
        raise ValueError(
            f"episodes_per_task is {config.episodes_per_task}, noise {config.noise} and mishaps {config.mishaps}; allowed: "
            "at least 1, 0 to 1 and 0 to 1."
        )


def open_collection(config: CollectConfig) -> list[dict[str, Any]]:
    """Make or reopen the folder; returns the attempts whose outcome still stands. Raises ValueError if it is another's."""
    root = config.root
    if (root / "cache" / "manifest.json").exists():
        raise ValueError(f"{root} is collected and packed already: train on it, or name another --output_dir.")
    staged = root / "episodes"
    staged.mkdir(parents=True, exist_ok=True)
    for partial in staged.glob("*.partial"):  # of a process that was killed while writing
        partial.unlink()
    settings = root / "settings.json"
    if settings.exists():
        changed = differences(json.loads(settings.read_text()), config.identity)
        if changed:
            raise ValueError(f"{root} was begun with other settings: {changed}. Use another --output_dir.")
    settings.write_text(json.dumps(config.identity, indent=1))
    rows = read_rows(root / "attempts.jsonl")
    raised, latest = times_raised(rows), {(attempt["task"], attempt["index"]): attempt for attempt in rows}
    return [
        attempt
        for (task, index), attempt in latest.items()
        if (attempt["error"] is None or raised[task, index] >= TRIES)
        and (not attempt["success"] or demonstration.staged_path(staged, task, index).exists())
    ]


def times_raised(attempts: Iterable[dict[str, Any]]) -> Counter[tuple[int, int]]:
    """How often each start ended with an exception; a process that died says nothing of its start."""
    return Counter((row["task"], row["index"]) for row in attempts if row["error"] is not None and not row.get("died"))


def check_space(config: CollectConfig, schedule: Schedule) -> None:
    """Raise ValueError if the missing episodes, at half the step limit each, will not fit on the disk."""
    missing = config.episodes_per_task * len(config.task_list) - schedule.num_solved
    episode_bytes = config.frame_bytes * config.step_limit // 2
    packing.check_disk(config.root, missing * episode_bytes, f"Collecting {missing} episodes")


def tally(attempts: list[dict[str, Any]], tasks: list[int]) -> Tally:
    mine = [attempt for attempt in attempts if attempt["task"] in tasks]
    errors = sum(attempt["error"] is not None for attempt in mine)
    return Tally(sum(attempt["success"] for attempt in mine), len(mine) - errors, errors)


def summary(attempts: list[dict[str, Any]], tasks: list[int]) -> dict[str, Any]:
    """Expert success over some tasks, with its 95 % interval, and mean length of what it solved."""
    count = tally(attempts, tasks)
    steps = [attempt["steps"] for attempt in attempts if attempt["task"] in tasks and attempt["success"]]
    return {
        "successes": count.successes,
        "episodes": count.episodes,
        "errors": count.errors,
        "interval_95": count.interval,
        "mean_steps": round(sum(steps) / len(steps), 1) if steps else None,
    }


def print_report(report: dict[str, Any], root: Path) -> None:
    table = Table(title=f"Expert on {report['suite']}, training starts")
    for heading in ("task", "solved", "95 %", "errors", "mean steps"):
        table.add_column(heading, justify="right")
    for task, row in [*report["expert"].items(), ("all", report["expert_all"])]:
        low, high = row["interval_95"]
        solved = f"{row['successes']}/{row['episodes']}"
        table.add_row(task, solved, f"{100 * low:.1f} - {100 * high:.1f}", str(row["errors"]), str(row["mean_steps"]))
    show(table)
    parts = {name.removesuffix("_bytes"): report[name] for name in report if name.endswith("_bytes")}
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items())
    rate = f"{report['attempts_per_hour']} attempts per hour, " if report["attempts_per_hour"] else ""
    print(f"{rate}{sizes}. Packed in {report['pack_s']} s. Next: vla train --dataset.root={root}")


def main(argv: list[str]) -> None:
    """`vla collect`."""
    from vla.cli import parse_config

    collect(parse_config(CollectConfig, argv, verb="collect"))
