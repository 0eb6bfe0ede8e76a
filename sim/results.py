"""Episode rows on disk, success rates with their intervals, tables, and eval_info.json."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

ROWS, SETTINGS, INFO = "episodes.jsonl", "settings.json", "eval_info.json"  # an evaluation's files, see sim/evaluate.py


@dataclass(frozen=True)
class EpisodeRow:
    """One evaluated episode. An exception is an `error`, counted apart: it says nothing about the policy's skill."""

    suite: str
    task: int
    instruction: str
    episode: int
    split: str
    initial_state_index: int
    seed: int
    success: bool
    steps: int
    error: str | None  # exception text
    wall_s: float
    chunks: int
    rounds: float | None  # mean per chunk
    policy_ms: float | None  # mean per chunk
    jerk: float | None
    video: str | None  # path relative to the output folder
    mujoco: str
    robosuite: str
    torch: str
    remask: str
    renderer: str
    gl: str  # OpenGL backend: egl, osmesa, glfw
    assets: str  # where meshes and textures came from, stand-ins named
    checkpoint: str  # sha256 of the checkpoint folder
    git_commit: str
    perturbation: str = "none"  # "camera-3": kind and severity
    moved: dict[str, float] | None = None  # bodies that the episode moved by 5 cm or more, and how far, m; None: not recorded


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and force it to disk; a line torn by a crash is cut off first."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows; [] if there is no file. A last line without its newline was torn by a crash and is left out.

    Raises ValueError naming the line if another line is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}). Delete that line to go on.") from error
    return rows


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What a resumed run must not change but did, e.g. "split was 'validation', is 'official'"; "" if nothing.

    A setting that one side lacks is None there: what is written only when it is not the default counts too.
    """
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)


def read_episodes(path: Path) -> list[EpisodeRow]:
    """Rows of an evaluation. Raises ValueError if they lack a field of EpisodeRow without default or carry another one."""
    names = {field.name for field in fields(EpisodeRow)}
    needed = {field.name for field in fields(EpisodeRow) if field.default is MISSING}
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        if not needed <= row.keys() <= names:
            raise ValueError(
                f"{path}, line {number} has other fields than this version writes: {sorted(row.keys() ^ names)}. "
                "Use a new --output_dir."
            )
    return [EpisodeRow(**row) for row in rows]


def latest_episodes(path: Path) -> list[EpisodeRow]:
    """The latest row of each episode, by task and number: one that was run again after an error has two."""
    rows = {(row.task, row.episode): row for row in read_episodes(path)}
    return [rows[key] for key in sorted(rows)]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a success rate, 95 % by default; (0, 1) for n = 0. Wilson 1927, JASA 22:209."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} episodes.")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, min(rate, (centre - spread) / scale)), min(1.0, max(rate, (centre + spread) / scale))  # rounding


@dataclass(frozen=True)
class Tally:
    """Counts of some episodes; errors are in no rate."""

    successes: int
    episodes: int  # without errors
    errors: int

    @property
    def rate(self) -> float:
        """Share of episodes solved; nan without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.episodes)

    def __str__(self) -> str:
        if not self.episodes:
            return f"no episode finished, {self.errors} errors"
        low, high = self.interval
        text = f"{self.successes}/{self.episodes} = {100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        return text + (f", {self.errors} errors" if self.errors else "")


def tally(rows: Iterable[EpisodeRow]) -> Tally:
    rows = list(rows)
    valid = [row for row in rows if row.error is None]
    return Tally(sum(row.success for row in valid), len(valid), len(rows) - len(valid))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None of none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def success_table(rows: Sequence[EpisodeRow], title: str) -> Table:
    """Success per task and over all with 95 % Wilson intervals; err: exceptions, in no rate.

    steps: mean of solved episodes; rounds and ms: per chunk; s: wall time per episode.
    """
    table = Table(title=title)
    table.add_column("task", no_wrap=True)
    table.add_column("instruction")  # the one that wraps where the terminal is narrow
    for heading in ("solved", "%", "95 %", "err", "steps", "rounds", "ms", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_task = _group_by_task(rows)
    for task, episodes in by_task.items():
        table.add_row(str(task), episodes[0].instruction, *_cells(episodes))
    if len(by_task) > 1:
        table.add_section()
        table.add_row("all", f"{len(by_task)} tasks", *_cells(rows))
    return table


def eval_info(
    rows: Sequence[EpisodeRow], *, seconds: float, episodes_run: int, config: dict[str, Any]
) -> dict[str, Any]:
    """What eval_info.json holds: every key of lerobot-eval's, and intervals, errors, episodes and config beside them.

    As there, pc_success is in percent and the reward is 1 at success, else 0. Errors are left out of per-task lists.
    seconds, episodes_run: of this run; a resumed one did not run all rows.
    """
    suites = sorted({row.suite for row in rows})
    per_task = []
    for suite in suites:
        for task, episodes in _group_by_task([row for row in rows if row.suite == suite]).items():
            valid = [row for row in episodes if row.error is None]
            rewards = [float(row.success) for row in valid]
            metrics = {
                "sum_rewards": rewards,
                "max_rewards": rewards,
                "successes": [row.success for row in valid],
                "video_paths": [row.video for row in valid if row.video],
            }
            extra = {"instruction": episodes[0].instruction, "summary": _summary(episodes)}
            per_task.append({"task_group": suite, "task_id": task, "metrics": metrics, **extra})
    return {
        "per_task": per_task,
        "per_group": {suite: _summary([row for row in rows if row.suite == suite]) for suite in suites},
        "overall": {
            **_summary(rows),
            "eval_s": seconds,
            "eval_ep_s": seconds / episodes_run if episodes_run else None,
        },
        "config": config,
        "episodes": [asdict(row) for row in rows],
    }


def _summary(rows: Sequence[EpisodeRow]) -> dict[str, Any]:
    count = tally(rows)
    reward = count.rate if count.episodes else None
    return {
        "avg_sum_reward": reward,
        "avg_max_reward": reward,
        "pc_success": None if reward is None else 100 * reward,
        "n_episodes": count.episodes,
        "video_paths": [row.video for row in rows if row.video],
        "n_successes": count.successes,
        "n_errors": count.errors,
        "pc_success_interval_95": [100 * bound for bound in count.interval],
        "rounds": mean(row.rounds for row in rows),
        "policy_ms": mean(row.policy_ms for row in rows),
        "jerk": mean(row.jerk for row in rows if row.error is None),
    }


def _cells(rows: Sequence[EpisodeRow]) -> list[str]:
    count = tally(rows)
    low, high = count.interval
    solved_steps = mean(row.steps for row in rows if row.error is None and row.success)
    rounds, policy_ms = mean(row.rounds for row in rows), mean(row.policy_ms for row in rows)
    return [
        f"{count.successes}/{count.episodes}",
        f"{100 * count.rate:.1f}" if count.episodes else "-",
        f"{100 * low:.0f}-{100 * high:.0f}" if count.episodes else "-",
        str(count.errors),
        "-" if solved_steps is None else f"{solved_steps:.0f}",
        "-" if rounds is None else f"{rounds:.1f}",
        "-" if policy_ms is None else f"{policy_ms:.0f}",
        f"{mean(row.wall_s for row in rows):.1f}",
    ]


def _group_by_task(rows: Iterable[EpisodeRow]) -> dict[int, list[EpisodeRow]]:
    groups: dict[int, list[EpisodeRow]] = {}
    for row in sorted(rows, key=lambda row: (row.task, row.episode)):
        groups.setdefault(row.task, []).append(row)
    return groups


def _cut_torn_line(file) -> None:
    """Truncate an open binary file to its last complete line."""
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        block = min(4096, position)
        file.seek(position - block)
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            file.truncate(position - block + newline + 1)
            return
        position -= block
    if end:
        file.truncate(0)
