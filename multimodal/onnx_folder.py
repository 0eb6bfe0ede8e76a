"""What every exported folder shares: manifest.json, which names the other files with their hashes. No torch.

    manifest.json    format, settings, parity, sha256 of the other files
    *.onnx           the graphs; *.onnx.data beside one whose weights exceed 2 GB
    tokenizer.json   where the model reads text
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


def save_manifest(folder: Path, format: str, values: Mapping[str, Any]) -> None:
    """Write the manifest."""
    (folder / MANIFEST).write_text(json.dumps({"format": format, **values}, indent=1, allow_nan=False))


def load_manifest(folder: Path, format: str, kind: str, made_by: str) -> dict[str, Any]:
    """The manifest's values, every file checked. kind: what the folder should hold; made_by: the command that makes one.

    Raises FileNotFoundError without a manifest, ValueError for another format or a file that was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"No ONNX {kind} at {folder}: {MANIFEST} is missing. `{made_by}` makes one.")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Export the {kind} again.") from error
    if not isinstance(values, dict) or values.get("format") != format:
        found = values.get("format") if isinstance(values, dict) else None
        raise ValueError(
            f"{path} has format {found!r}, this version reads {format!r}. Give the folder that `{made_by}` wrote, or export "
            f"the {kind} again."
        )
    for name, expected in values["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its {MANIFEST} names. Copy the whole folder.")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not the file that was exported (sha256 differs). Copy the folder again.")
    return values


def check_new_folder(output: Path) -> None:
    """Raise ValueError if `output` exists and is neither empty nor an earlier export."""
    is_export = (output / MANIFEST).is_file() and any(output.glob("*.onnx"))
    if output.exists() and not is_export and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} holds something else than an export; choose a new folder (--output_dir).")


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_hash(folder: Path) -> str:
    """First 16 hex digits of the manifest's sha256: it holds those of all other files, so this stands for the folder."""
    return sha256(folder / MANIFEST)[:16]


def as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a JSON object as the tuples that frozen dataclasses hold."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
