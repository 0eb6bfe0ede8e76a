"""Run folders of `vla eval` as the page replays them: which there are, their episodes, their films. Reads files only.

The files are sim/evaluate.py's: episodes.jsonl and videos/ under one folder per evaluation. Rows are read leniently (a
page shows what is there), paths strictly (nothing outside the folder is ever opened).
"""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.protocol.refusal import Code, Refusal
from serve.protocol.schemas import Episode, Run

ROWS, FILMS = "episodes.jsonl", "videos"
MAX_ROWS = 10_000
MAX_RUNS = 200
MAX_NAME = 200  # bytes of a folder's name that is looked for; file systems have about 255


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
    try:
        file = (folder / path).resolve()
        is_film = file.is_relative_to((folder / FILMS).resolve()) and file.suffix in (".mp4", ".gif", ".png") and file.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a null byte
        is_film = False
    if not is_film:
        raise Refusal(Code.NOT_FOUND, f"Run {name!r:.80} has no film {path!r:.120}.")
    return file


def _run(root: Path, name: str) -> Path:
    folder = root / name
    is_name = Path(name).name == name and name not in ("", ".", "..") and "\0" not in name and len(os.fsencode(name)) <= MAX_NAME
    if not is_name or not (folder / ROWS).is_file():
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
