"""What evaluations count for runs: those of a run's checkpoint, all of one setting, each start once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sim.compare import key
from sim.merge_evaluations import read_settings
from sim.results import ROWS, EpisodeRow, differences, latest_episodes, tally
from sim.scaling.runs import Run

NO_SETTING = ("checkpoint", "image_size", "action_horizon", "shard", "tasks", "episodes")  # settings of the policy, of a shard
NEXT = "Name in --evaluations only those of one setting, e.g. one folder of a study."


@dataclass(frozen=True)
class Evaluation:
    """One folder of `vla eval`."""

    folder: Path
    checkpoint: str
    setting: dict[str, Any]  # what every policy is asked and how: suite, split, protocol, decode, perturb, mesh_detail, ...
    rows: list[EpisodeRow]  # the latest of each episode


def read_evaluations(folders: Iterable[Path]) -> list[Evaluation]:
    """Evaluations in `folders` and one folder below, each once. Raises FileNotFoundError for none, or one without settings."""
    found: dict[Path, Evaluation] = {}
    for folder in folders:
        here = [path for path in (folder, *sorted(folder.glob("*"))) if (path / ROWS).exists()]
        if not here:
            raise FileNotFoundError(f"no evaluation in {folder} or one folder below: {ROWS} makes one (`vla eval`).")
        for path in here:
            settings = read_settings(path)
            setting = {name: value for name, value in settings.items() if name not in NO_SETTING}
            found[path.resolve()] = Evaluation(path, settings["checkpoint"], setting, latest_episodes(path / ROWS))
    return list(found.values())


def with_evaluations(runs: Sequence[Run], evaluations: Iterable[Evaluation]) -> tuple[list[Run], dict[str, Any]]:
    """The runs with what was solved by their last checkpoints, and the setting of all these evaluations; {} without any.

    Raises ValueError if their successes are no one quantity: settings or runs' tasks differ, or a start would count twice.
    """
    own = [each for each in evaluations if each.checkpoint in {run.checkpoint for run in runs}]
    check_setting(own)
    rows = rows_by_checkpoint(own)
    check_tasks({run.folder: rows[run.checkpoint] for run in runs if run.checkpoint in rows})
    counts = [tally(rows.get(run.checkpoint, ())) for run in runs]
    counted = [replace(run, solved=count.successes, episodes=count.episodes) for run, count in zip(runs, counts, strict=True)]
    return counted, own[0].setting if own else {}


def check_setting(evaluations: Sequence[Evaluation]) -> None:
    """Raise ValueError naming what two evaluations were not asked alike."""
    for each in evaluations:
        changed = differences(evaluations[0].setting, each.setting)
        if changed:
            raise ValueError(f"{each.folder} was evaluated otherwise than {evaluations[0].folder}: {changed}. {NEXT}")


def rows_by_checkpoint(evaluations: Iterable[Evaluation]) -> dict[str, list[EpisodeRow]]:
    """Shards and further tasks add up. Raises ValueError if two evaluations of one checkpoint share a start."""
    rows: dict[str, list[EpisodeRow]] = {}
    holder: dict[tuple, Path] = {}
    for each in evaluations:
        for row in each.rows:
            first = holder.setdefault((each.checkpoint, *key(row)), each.folder)
            if first != each.folder:
                raise ValueError(f"task {row.task}, episode {row.episode} is in {first} and in {each.folder}. {NEXT}")
        rows.setdefault(each.checkpoint, []).extend(each.rows)
    return rows


def check_tasks(rows: Mapping[str, Sequence[EpisodeRow]]) -> None:
    """rows: of each run. Raises ValueError if their tasks differ: some are harder."""
    tasks = {name: sorted({row.task for row in some}) for name, some in rows.items()}
    first = next(iter(tasks), "")
    for name, asked in tasks.items():
        if asked != tasks[first]:
            raise ValueError(f"run {name} was evaluated on tasks {asked}, {first} on {tasks[first]}; evaluate both alike.")
