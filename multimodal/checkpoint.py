"""One folder is one model: model.safetensors, config.yaml and named blobs; written atomically, loaded strictly.

Nothing here pickles: weights are safetensors, settings are YAML (safe loader), blobs are bytes that their owner parses.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
CARD = "README.md"  # describes a folder and decides nothing: no part of what is loaded or hashed


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor]  # parameter or buffer name -> tensor on the CPU
    blobs: dict[str, bytes]  # file name -> content, e.g. tokenizer.json, statistics.json, schema.json, versions.json

    def text(self, name: str) -> str:
        """Blob `name` as UTF-8. Raises ValueError naming the blobs there are."""
        if name not in self.blobs:
            raise ValueError(f"Checkpoint {self.folder} holds no {name!r}; it holds {sorted(self.blobs)}.")
        return self.blobs[name].decode()


def save_checkpoint(
    folder: str | Path,
    *,
    model_state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    blobs: Mapping[str, bytes | str] | None = None,
) -> Path:
    """Write the folder, or replace it, so that a crash at any moment leaves the old one or the new one.

    Names that share one tensor (tied embeddings) are stored once and come back under each name.
    Raises OSError(ENOSPC) on a full disk, with the old folder untouched and the temporary one removed.
    """
    folder = Path(folder)
    blobs = blobs or {}
    taken = [name for name in blobs if name in (WEIGHTS, CONFIG) or Path(name).name != name or name.startswith(".")]
    if taken:
        raise ValueError(f"Blob names must be plain file names other than {WEIGHTS!r} and {CONFIG!r}; got {taken}.")
    with replaced_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, model_state)
        (temporary / CONFIG).write_text(yaml.safe_dump(dict(config), sort_keys=False))
        for name, content in blobs.items():
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read every file of the folder. Raises FileNotFoundError saying what is missing and where one may be."""
    folder = _existing(Path(folder))
    blobs = {path.name: path.read_bytes() for path in _files(folder) if path.name not in (WEIGHTS, CONFIG)}
    config = yaml.safe_load((folder / CONFIG).read_text()) or {}
    return Checkpoint(folder, config, read_tensors(folder / WEIGHTS), blobs)


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], source: str | Path, *, only: Collection[str] | None = None
) -> None:
    """Copy `state` into `model`; every name and shape must agree, of the whole model or of the names `only`.

    Raises ValueError that lists missing names, unexpected names and differing shapes; the model is then unchanged.
    """
    expected = {name: value for name, value in model.state_dict().items() if only is None or name in only}
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        details = "\n".join(f"  {len(names)} {what}: {_shortened(names)}" for what, names in parts if names)
        raise ValueError(f"The weights in {source} do not fit the model built from their config:\n{details}")
    model.load_state_dict(dict(state), strict=only is None)


def checkpoint_hash(folder: str | Path) -> str:
    """First 16 hex digits of a SHA-256 over the names and contents of every file but the card; equal folders have equal hashes."""
    digest = hashlib.sha256()
    for path in _files(_existing(Path(folder))):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the name `folder` when the block ends well, and vanishes otherwise.

    A folder cannot be renamed over another, so an old one first steps aside to `.NAME.previous`; a crash between the two
    renames leaves that one, which `load_checkpoint` and `checkpoint_hash` then read. One writer at a time.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    previous = _previous(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        old = "the previous one is untouched" if folder.exists() else "nothing half-written is left"
        raise OSError(
            errno.ENOSPC, f"disk full while writing {folder}; {old}. Free space there or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; aliases of one tensor are stored once. Raises OSError(ENOSPC) on a full disk."""
    first_name: dict[tuple, str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() > 0 and identity in first_name:
            aliases[name] = first_name[identity]
            continue
        first_name[identity] = name
        stored[name] = _owned(tensor)
    try:  # one metadata entry only: safetensors writes several in random order, and equal weights must be equal files
        save_file(stored, path, metadata={"aliases": json.dumps(aliases)})
    except SafetensorError as error:  # safetensors wraps the operating system's error into its text
        if f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):
            raise OSError(errno.ENOSPC, str(error), str(path)) from error
        raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Inverse of `write_tensors`, on the CPU. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}. Copy it again or use another one.") from error
    return tensors | {name: tensors[target] for name, target in aliases.items()}


def _owned(tensor: Tensor) -> Tensor:
    """The values on the CPU, contiguous, sharing storage with no other tensor that is written."""
    tensor = tensor.detach().to("cpu").contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _existing(folder: Path) -> Path:
    """The folder with links resolved (so that a moving `last` cannot mix two checkpoints), or its `.previous`."""
    for candidate in (folder.resolve(), _previous(folder.resolve())):
        if (candidate / WEIGHTS).is_file() and (candidate / CONFIG).is_file():
            return candidate
    nested = [path for path in ("policy", "checkpoints/last/policy") if (folder / path / WEIGHTS).is_file()]
    hint = f" Did you mean {folder / nested[0]}?" if nested else ""
    raise FileNotFoundError(f"No checkpoint at {folder}: it needs {WEIGHTS} and {CONFIG}.{hint}")


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".") and path.name != CARD)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shortened(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
