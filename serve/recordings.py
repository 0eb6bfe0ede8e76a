"""Run folders of `vla eval` as the page replays them: which there are, their episodes, their films. Reads files only.

The files are sim/evaluate.py's: episodes.jsonl and videos/ under one folder per evaluation. Rows are read leniently (a
page shows what is there), paths strictly (nothing outside the folder is ever opened).
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.protocol.refusal import Code, Refusal
from serve.protocol.schemas import Episode, Run

ROWS, FILMS = "episodes.jsonl", "videos"
MAX_ROWS = 10_000
MAX_RUNS = 200


def list_runs(root: Path) -> list[Run]:
    """Every folder below `root` that holds an evaluation, newest first."""
    folders = [path.parent for path in root.glob(f"*/{ROWS}") if path.is_file()]
    folders.sort(key=lambda folder: (folder / ROWS).stat().st_mtime, reverse=True)
    runs = []
    for folder in folders[:MAX_RUNS]:
        rows = _rows(folder)
        suite = str(rows[0].get("suite", "")) if rows else ""
        runs.append(Run(name=folder.name, suite=suite, episodes=len(rows), films=sum(bool(row.get("video")) for row in rows)))
    return runs


def list_episodes(root: Path, name: str) -> list[Episode]:
    """The rows of one run. Raises Refusal if there is no such run."""
    episodes = []
    for row in _rows(_run(root, name)):
        try:
            episodes.append(Episode.model_validate(row))
        except ValidationError:
            continue  # of another version; the page shows what it can
    return episodes


def film(root: Path, name: str, path: str) -> Path:
    """The file of a film that a row names. Raises Refusal for anything else."""
    folder = _run(root, name)
    file = (folder / path).resolve()
    if not file.is_relative_to((folder / FILMS).resolve()) or file.suffix not in (".mp4", ".gif", ".png") or not file.is_file():
        raise Refusal(Code.NOT_FOUND, f"Run {name!r:.80} has no film {path!r:.120}.")
    return file


def _run(root: Path, name: str) -> Path:
    folder = root / name
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name or not (folder / ROWS).is_file():
        raise Refusal(Code.NOT_FOUND, f"There is no run {name!r:.80}; GET /runs lists them.")
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Complete lines; one that is torn or damaged is left out."""
    rows = []
    for line in (folder / ROWS).read_text(errors="replace").splitlines()[:MAX_ROWS]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
