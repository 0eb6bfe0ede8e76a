"""The bound corpus on disk: the one owner of its schema, its writer and its reader. No torch, no pickle.

    manifest.json          version, classes with their words and prompts, shapes and ranges of the sensors, rows, source
    train-00000.npz ...    rows of one split: codes of every sensor [n, *shape] (see sensors.py), class, start
    validation-, test-     the same classes, of other starts and other shapes and colours of the objects
    unseen-                two classes that no other split has, for zero-shot
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.bind.sensors import SENSORS, sensor_table

VERSION = 1
MANIFEST = "manifest.json"
TRAIN, VALIDATION, TEST, UNSEEN = SPLITS = ("train", "validation", "test", "unseen")
LABEL, START = "label", "start"  # columns beside the sensors'


@dataclass(frozen=True)
class ObjectClass:
    """What is told of a class in words."""

    name: str  # "milk carton"
    shape: str  # "box": shared by several classes, so that words alone say what an unseen class is like
    material: str  # "cardboard"
    is_seen: bool  # False: in split "unseen" only
    prompts: tuple[str, ...]  # sentences that are true of it


@dataclass(frozen=True)
class BoundManifest:
    """What all rows share."""

    classes: tuple[ObjectClass, ...]  # `label` counts in them; the unseen ones last
    shapes: Mapping[str, tuple[int, ...]]  # of one sample, per sensor
    rows: Mapping[str, int]  # split -> samples
    source: Mapping[str, Any] = field(default_factory=dict)  # how it was made

    @property
    def num_seen(self) -> int:
        return sum(kind.is_seen for kind in self.classes)


def write_rows(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Write one file that is whole or absent. rows: codes per sensor, `label` and `start`, each [n, ...]."""
    expected = {*SENSORS, LABEL, START}
    if set(rows) != expected or len({len(values) for values in rows.values()}) != 1:
        raise ValueError(f"Rows have columns {sorted(rows)}; expected {sorted(expected)}, all of one length.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Inverse of `write_rows`."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def read_split(root: Path, split: str) -> dict[str, np.ndarray]:
    """All rows of a split in the order of their files. Raises FileNotFoundError or ValueError."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; allowed: {', '.join(SPLITS)}.")
    files = sorted(Path(root).glob(f"{split}-[0-9]*.npz"))
    if not files:
        raise FileNotFoundError(
            f"Bound corpus {root} has no samples of split {split!r}; make it again with `vla corpus --bind`."
        )
    parts = [read_rows(path) for path in files]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def file_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.npz"


def write_manifest(root: Path, manifest: BoundManifest) -> None:
    """Written last: a folder without it is no corpus."""
    values = {"version": VERSION, "sensors": sensor_table(), **asdict(manifest)}
    partial = root / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(values, indent=1))
    os.replace(partial, root / MANIFEST)


def read_manifest(root: Path | str) -> BoundManifest:
    """Raises FileNotFoundError if `root` holds no bound corpus, ValueError if its version or its sensors differ from ours."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"No bound corpus at {root} ({MANIFEST} is missing). Make one with `vla corpus --bind --output_dir={root}`."
        )
    values = json.loads(path.read_text())
    version, sensors = values.pop("version"), values.pop("sensors", None)
    if sensors is None:
        raise ValueError(f"{root} holds a corpus of described scenes; a bound one is made with `vla corpus --bind`.")
    if version != VERSION or sensors != sensor_table():
        differing = [name for name, row in sensor_table().items() if sensors.get(name) != row]
        raise ValueError(
            f"Bound corpus {root} has version {version} and differs in {differing or 'no sensor'}; this code reads version "
            f"{VERSION} with its own ranges. Make it again with `vla corpus --bind`."
        )
    classes = tuple(ObjectClass(**{**kind, "prompts": tuple(kind["prompts"])}) for kind in values["classes"])
    shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
    return BoundManifest(classes, shapes, values["rows"], values["source"])
