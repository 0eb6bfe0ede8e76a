"""The weights of a published checkpoint: one safetensors file or several, memory-mapped, under the names they were saved by."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """Tensors by name. Reading one maps its file, so it costs no memory until it is used, and no copy in its own dtype."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if weights, or files that the index names, are missing; ValueError for a damaged one."""
        self.folder = folder
        self._file_of = _read_index(folder) if (folder / INDEX).is_file() else _read_single(folder)
        self._open: dict[str, safe_open] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype it is stored in."""
        return self._handle(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def _handle(self, name: str) -> safe_open:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _opened(self.folder / file)
        return self._open[file]


def _read_index(folder: Path) -> Mapping[str, str]:
    file_of = json.loads((folder / INDEX).read_text())["weight_map"]
    files = sorted(set(file_of.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder / INDEX} names {absent}, which are not there. Download the folder again: hf download."
        )
    stored = {name: file for file in files for name in _opened(folder / file).keys()}
    lost = sorted(name for name, file in file_of.items() if stored.get(name) != file)
    if lost or len(stored) != len(file_of):
        extra = sorted(stored.keys() - file_of.keys())
        raise ValueError(
            f"{folder / INDEX} does not fit its files: not where it says {lost[:4]}, not in it {extra[:4]}. Download again."
        )
    return file_of


def _read_single(folder: Path) -> Mapping[str, str]:
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_opened(folder / SINGLE).keys(), SINGLE)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles:
        raise FileNotFoundError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which could run code when read. Take a revision with "
            f"safetensors, or convert it: python -c \"from transformers import AutoModel as M; M.from_pretrained('{folder}')"
            f".save_pretrained('{folder}-safe')\""
        )
    raise FileNotFoundError(
        f"{folder} holds neither {SINGLE} nor {INDEX}. Is it a model folder? Download it: hf download ID --local-dir {folder}"
    )


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}. Download it again.") from error


def as_stored_or(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`; untouched (still mapped) if there is none, it has that dtype already, or holds integers."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
