"""Shards of one evaluation -> one evaluation folder (`vla merge-evaluations`)."""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


from sim.folder_lock import locked
from sim.results import INFO, ROWS, SETTINGS, EpisodeRow, append_row, differences, eval_info, latest_episodes, success_table, tally
from sim.shards import episode_list, parse_shard, shard_of
from vla.show import show


@dataclass(frozen=True)
class MergeConfig:
    """Settings of `vla merge-evaluations`."""

    folders: list[Path]  # what `vla eval --shard=i/n` wrote, every i
    output_dir: Path  # a new evaluation folder; `vla eval --resume=true` can go on in it


def merge(config: MergeConfig) -> list[EpisodeRow]:
    """The rows of the whole evaluation, written to output_dir as `vla eval` without shards would have; films are copied.

    Raises ValueError unless the folders are all shards of one evaluation, each once, and have each episode once;
    FileNotFoundError for a folder without an evaluation.
    """
    folders = [Path(folder).expanduser() for folder in config.folders]
    settings = [read_settings(folder) for folder in folders]
    check_shards(folders, settings)
    latest: dict[tuple[int, int], tuple[EpisodeRow, Path]] = {}
    for folder in folders:
        own = {(row.task, row.episode): row for row in latest_episodes(folder / ROWS)}
        check_whole(folder, read_settings(folder), own.keys())
        twice = sorted(own.keys() & latest.keys())
        if twice:
            raise ValueError(f"task {twice[0][0]}, episode {twice[0][1]} is in {latest[twice[0]][1]} and in {folder}.")
        latest |= {key: (row, folder) for key, row in own.items()}
    output = Path(config.output_dir).expanduser()
    rows = [latest[key][0] for key in sorted(latest)]
    with locked(output):
        if (output / ROWS).exists():
            raise ValueError(f"{output} holds an evaluation already; use another --output_dir.")
        identity = {key: value for key, value in settings[0].items() if key not in ("tasks", "episodes")} | {"shard": None}
        (output / SETTINGS).write_text(json.dumps(identity, indent=1))
        for key in sorted(latest):
            row, folder = latest[key]
            copy_film(row, folder, output)
            append_row(output / ROWS, asdict(row))
        infos = [json.loads((folder / INFO).read_text()) for folder in folders if (folder / INFO).exists()]
        seconds = sum(info["overall"]["eval_s"] for info in infos)
        info = eval_info(rows, seconds=seconds, episodes_run=len(rows), config=identity)
        (output / INFO).write_text(json.dumps(info, indent=1))
    return rows


def read_settings(folder: Path) -> dict[str, Any]:
    if not (folder / SETTINGS).is_file() or not (folder / ROWS).is_file():
        raise FileNotFoundError(f"no evaluation in {folder}: {SETTINGS} or {ROWS} is missing; `vla eval` makes one.")
    return json.loads((folder / SETTINGS).read_text())


def check_shards(folders: Sequence[Path], settings: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless these are all shards of one evaluation."""
    if not folders:
        raise ValueError("Which shards? Give --folders='[FOLDER, FOLDER]'.")
    for folder, other in zip(folders, settings):
        changed = differences(settings[0] | {"shard": None}, other | {"shard": None})
        if changed:
            raise ValueError(f"{folder} is of another evaluation than {folders[0]}: {changed}.")
        if other.get("shard") is None:
            raise ValueError(f"{folder} is no shard: it was evaluated without --shard.")
    found = [parse_shard(each["shard"]) for each in settings]
    count = found[0][1]
    expected = [(index, count) for index in range(count)]
    if sorted(found) != expected:
        names = sorted(f"{index}/{total}" for index, total in found)
        raise ValueError(f"The shards are {', '.join(names)}; needed once each: 0/{count} to {count - 1}/{count}.")


def check_whole(folder: Path, settings: dict[str, Any], found: Collection[tuple[int, int]]) -> None:
    """Raise ValueError unless a shard has all of its episodes."""
    every = episode_list(settings["tasks"], settings["episodes"])
    missing = sorted(set(shard_of(every, settings["shard"])) - set(found))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} episodes, the first is number {missing[0][1]} of task {missing[0][0]}; finish it "
            "with `vla eval --resume=true`."
        )


def copy_film(row: EpisodeRow, folder: Path, output: Path) -> None:
    """An episode's film, and its gif, if there are any."""
    if row.video is None:
        return
    for path in (folder / row.video, (folder / row.video).with_suffix(".gif")):
        if path.exists():
            target = output / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)


def main(argv: list[str]) -> None:
    """`vla merge-evaluations`."""
    from vla.cli import parse_config

    config = parse_config(MergeConfig, argv, verb="merge-evaluations")
    rows = merge(config)
    show(success_table(rows, f"{rows[0].suite}, {rows[0].split} starts, {len(config.folders)} shards"))
    print(f"{tally(rows)}. Rows and eval_info.json: {config.output_dir}")
