"""manifest.json of an exported policy: all of it but the graphs and the text tokenizer, which it names with their hashes.

    manifest.json    this
    *.onnx           the graphs, see vla/onnx_graphs.py; *.onnx.data beside one whose weights exceed 2 GB
    tokenizer.json   the text tokenizer
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "remask-onnx-policy-1"


@dataclass(frozen=True)
class OnnxManifest:
    """Plain values, as JSON holds them; who uses a part builds its class from it."""

    precision: str  # float32 | float16 | int8
    opset: int
    text_length: int  # instruction ids at most
    action_horizon: int
    head: dict[str, Any]  # HeadConfig
    decode: dict[str, Any]  # DecodeConfig, how the policy decodes by default
    images: dict[str, Any]  # ImageConfig
    spec: dict[str, Any]  # RobotSpec
    statistics: dict[str, Any]  # Statistics of the state
    action_tokenizer: dict[str, Any]  # ActionTokenizer
    graphs: dict[str, Any]  # name -> file, inputs and outputs with dtype and shape
    files: dict[str, str]  # file name -> sha256
    source: dict[str, Any]  # hash and provenance of the checkpoint
    versions: dict[str, str | None]
    parity: dict[str, Any]  # what the gate measured, see vla/onnx_parity.py

    def save(self, folder: Path) -> None:
        values = {"format": FORMAT} | asdict(self)
        (folder / MANIFEST).write_text(json.dumps(values, indent=1, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> "OnnxManifest":
        """Raises FileNotFoundError without a manifest, ValueError for another format or a file that was changed."""
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"No ONNX policy at {folder}: {MANIFEST} is missing. `vla export --policy.path=CHECKPOINT "
                f"--output_dir={folder}` makes one."
            )
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}). Export the policy again.") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(
                f"{path} has format {found!r}, this version reads {FORMAT!r}. Give the folder that `vla export` wrote, or "
                "export the policy again."
            )
        manifest = cls(**{field.name: values[field.name] for field in fields(cls)})
        for name, expected in manifest.files.items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks {name}, which its {MANIFEST} names. Copy the whole folder.")
            if sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is not the file that was exported (sha256 differs). Copy the folder again.")
        return manifest


def is_onnx_policy(folder: Path) -> bool:
    """Whether the folder claims to be one; `OnnxManifest.load` says whether it is."""
    return (folder / MANIFEST).is_file()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(folder: Path) -> str:
    """First 16 hex digits of the manifest's sha256: it holds those of all other files, so this stands for the policy."""
    return sha256(folder / MANIFEST)[:16]


def as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a JSON object as the tuples that frozen dataclasses hold."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
