"""Success of the scripted experts: `vla experts`. Renders nothing, so an episode takes about a second."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sim.environment import Environment
from sim.experts.programs import NoisyExpert, build_expert
from sim.results import Tally, mean
from sim.seeds import start
from sim.suites import build_environment, get_suite
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
    output: Path | None = None  # JSON file, default: REMASK_HOME/experts/<suite>-<split>.json

    def __post_init__(self) -> None:
        suite = get_suite(self.suite)
        unknown = [task for task in self.tasks or () if not 0 <= task < suite.num_tasks]
        if unknown:
            raise ValueError(f"--tasks: {self.suite} has no task {unknown[0]}; allowed: 0 to {suite.num_tasks - 1}.")
        if self.episodes < 1:
            raise ValueError(f"--episodes={self.episodes}: at least 1.")
        start(self.split, 0)

    @property
    def task_list(self) -> list[int]:
        return list(range(get_suite(self.suite).num_tasks)) if self.tasks is None else sorted(set(self.tasks))

    @property
    def step_limit(self) -> int:
        return self.max_steps or get_suite(self.suite).max_steps["openpi"]

    @property
    def path(self) -> Path:
        return Path(self.output or remask_home() / "experts" / f"{self.suite}-{self.split}.json").expanduser()


@dataclass(frozen=True)
class Attempt:
    """One episode of an expert."""

    task: int
    index: int  # of the start within its split
    success: bool
    steps: int
    wall_s: float


def attempt(environment: Environment, task: int, index: int, config: MeasureConfig) -> Attempt:
    """Run the expert from one start until success or the step limit."""
    begin, where = time.perf_counter(), start(config.split, index)
    environment.reset(task, where)
    expert = NoisyExpert(build_expert(environment, task), config.noise, where.seed)
    steps, success = 0, False
    while not success and steps < config.step_limit:
        executed, _ = expert.act(environment.world())
        success = environment.step(executed)
        steps += 1
    return Attempt(task, index, success, steps, round(time.perf_counter() - begin, 3))


def measure(environment: Environment, config: MeasureConfig) -> list[Attempt]:
    """`config.episodes` attempts of every task, task by task, since a LIBERO model holds one task."""
    jobs = [(task, index) for task in config.task_list for index in range(config.episodes)]
    bar = tqdm(jobs, unit="episode", disable=None)  # shown on a terminal only
    return [attempt(environment, task, index, config) for task, index in bar]


def summary(attempts: Sequence[Attempt]) -> dict[str, float | int | list[float] | None]:
    count = Tally(sum(a.success for a in attempts), len(attempts), 0)
    return {
        "successes": count.successes,
        "episodes": count.episodes,
        "interval_95": list(count.interval),
        "mean_steps": mean(a.steps for a in attempts if a.success),
        "max_steps": max((a.steps for a in attempts if a.success), default=None),
        "wall_s": mean(a.wall_s for a in attempts),
    }


def report(environment: Environment, config: MeasureConfig, attempts: Sequence[Attempt]) -> dict:
    """What the JSON file holds: settings, a summary per task and over all, every attempt."""
    tasks = {
        str(task): {
            "instruction": environment.instruction(task),
            **summary([a for a in attempts if a.task == task]),
        }
        for task in config.task_list
    }
    settings = {**dataclasses.asdict(config), "output": str(config.path), "max_steps": config.step_limit}
    return {
        "config": settings,
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
    environment = build_environment(config.suite)
    try:
        results = report(environment, config, measure(environment, config))
    finally:
        environment.close()
    config.path.parent.mkdir(parents=True, exist_ok=True)
    config.path.write_text(json.dumps(results, indent=1))
    Console().print(table(results, f"scripted experts, {config.suite}, {config.split} starts"))
    print(f"written: {config.path}")
    return 0
