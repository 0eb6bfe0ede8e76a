"""The corpus of described scenes on disk: the one owner of its schema, its writer and its reader. No torch.

    manifest.json               version, cameras, image size, rim, what it was made from
    train-00000.parquet ...     a row a scene: JPEG images, its texts, where it comes from, simulator truth as JSON
    held_out-00000.parquet ...  scenes that share no episode with the training ones

A text is a dialogue of questions and answers. Its `half` says which half of the templates it uses: training scenes only
the "training" half, held-out scenes both.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MANIFEST = "manifest.json"
TRAIN, HELD_OUT = "train", "held_out"
ROWS_PER_FILE = 2000


@dataclass(frozen=True)
class Dialogue:
    """One text on one scene."""

    kind: str  # "question", "answer", "description", "plan", "dialogue", "location", ...: see sim/language/texts.py
    family: str  # what a question asks for: "count", "side", ...; the kind otherwise
    half: str  # "training" or "held_out" templates
    is_exact: bool  # the single answer is the only right one
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    templates: tuple[str, ...] = ()  # ids of the templates used


@dataclass(frozen=True)
class DescribedScene:
    """One row."""

    suite: str
    layout: str  # which furniture and objects
    task: int
    start: int  # index within the split's starts
    period: int  # control periods since the episode's beginning
    split: str  # TRAIN or HELD_OUT
    is_new_layout: bool  # no training scene has this layout
    images: Mapping[str, bytes]  # camera -> JPEG
    texts: tuple[Dialogue, ...]
    truth: str  # JSON of the simulator's facts


@dataclass(frozen=True)
class Manifest:
    """What all rows share."""

    cameras: tuple[str, ...]
    image_size: int  # pixels, square
    rim: int  # pixels at each border in which nothing is told of: a crop may cut them off, but no more
    rows: Mapping[str, int]  # split -> scenes
    source: Mapping[str, Any] = field(default_factory=dict)  # how it was made


def schema(cameras: Sequence[str]) -> Any:
    """The pyarrow schema of a file."""
    import pyarrow as pa

    turn = pa.struct([("question", pa.string()), ("answer", pa.string())])
    text = pa.struct(
        [
            ("kind", pa.string()),
            ("family", pa.string()),
            ("half", pa.string()),
            ("is_exact", pa.bool_()),
            ("turns", pa.list_(turn)),
            ("templates", pa.list_(pa.string())),
        ]
    )
    columns = [("suite", pa.string()), ("layout", pa.string()), ("task", pa.int32()), ("start", pa.int64())]
    columns += [("period", pa.int32()), ("split", pa.string()), ("is_new_layout", pa.bool_())]
    columns += [(f"image.{camera}", pa.binary()) for camera in cameras]
    return pa.schema([*columns, ("texts", pa.list_(text)), ("truth", pa.string())])


def write_scenes(path: Path, scenes: Sequence[DescribedScene], cameras: Sequence[str]) -> None:
    """Write one file that is whole or absent. Raises ValueError if a scene lacks a camera's image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([_to_row(scene, cameras) for scene in scenes], schema=schema(cameras))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(table, partial, compression="zstd", row_group_size=100)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_scenes(path: Path, *, images: bool = True, truth: bool = True) -> Iterator[DescribedScene]:
    """The rows of one file in order; without images or truth their columns are not read."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    left_out = lambda name: (name.startswith("image.") and not images) or (name == "truth" and not truth)  # noqa: E731
    names = [name for name in file.schema_arrow.names if not left_out(name)]
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group, columns=names).to_pylist():
            yield _from_row(row)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Written last: a folder without it is no corpus."""
    text = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1)
    partial = root / f".{MANIFEST}.partial"
    partial.write_text(text)
    os.replace(partial, root / MANIFEST)


def read_manifest(root: Path) -> Manifest:
    """Raises FileNotFoundError if `root` holds no corpus, ValueError if it has another version."""
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"No corpus at {root} ({MANIFEST} is missing). Make one with `vla corpus --output_dir={root}`.")
    values = json.loads(path.read_text())
    version = values.pop("version")
    if version != VERSION:
        raise ValueError(f"Corpus {root} has version {version}, this code reads {VERSION}; make it again with `vla corpus`.")
    return Manifest(**{**values, "cameras": tuple(values["cameras"])})


def split_files(root: Path, split: str) -> list[Path]:
    """The files of a split in order. Raises FileNotFoundError if there are none."""
    files = sorted(Path(root).glob(f"{split}-[0-9]*.parquet"))
    if not files:
        raise FileNotFoundError(f"Corpus {root} has no scenes of split {split!r}.")
    return files


def file_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def _to_row(scene: DescribedScene, cameras: Sequence[str]) -> dict[str, Any]:
    missing = [camera for camera in cameras if camera not in scene.images]
    if missing:
        raise ValueError(
            f"Scene {scene.layout} {scene.start} lacks the image of {missing[0]!r}; it has {sorted(scene.images)}. The "
            f"corpus's cameras are {list(cameras)}."
        )
    texts = [
        {**asdict(text), "turns": [{"question": question, "answer": answer} for question, answer in text.turns]}
        for text in scene.texts
    ]
    plain = {name: value for name, value in vars(scene).items() if name not in ("images", "texts")}
    return {**plain, **{f"image.{camera}": scene.images[camera] for camera in cameras}, "texts": texts}


def _from_row(row: dict[str, Any]) -> DescribedScene:
    images = {name.removeprefix("image."): row.pop(name) for name in list(row) if name.startswith("image.")}
    texts = tuple(
        Dialogue(
            **{
                **text,
                "turns": tuple((turn["question"], turn["answer"]) for turn in text["turns"]),
                "templates": tuple(text["templates"]),
            }
        )
        for text in row.pop("texts")
    )
    return DescribedScene(**{"truth": "", **row}, images=images, texts=texts)
