"""A published checkpoint becomes our modules: configuration, memory-mapped weights, tokenizer, image range."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from multimodal.config import VLMConfig
from multimodal.layers import Rotary, rotary_frequencies
from multimodal.pretrained.families import Description, describe
from multimodal.pretrained.keys import Table, read_weights, renamed
from multimodal.pretrained.shards import Shards
from multimodal.pretrained.source import local_folder
from multimodal.pretrained.text import PublishedTokenizer, load_tokenizer
from multimodal.vision import VisionTower
from multimodal.vlm import VLM


@dataclass(frozen=True)
class Published:
    """A checkpoint that was read."""

    folder: Path
    family: str
    vlm: VLM
    mean: tuple[float, ...]  # of image values in [0, 1], per channel
    std: tuple[float, ...]
    raw: dict[str, Any]  # its config.json

    def tokenizer(self) -> PublishedTokenizer:
        """Raises FileNotFoundError with the command that makes a missing one."""
        return load_tokenizer(self.folder, describe(self.folder).family.prompt)


def load_published(
    path: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None, image_size: int | None = None
) -> Published:
    """The model in a folder or Hub repository.

    dtype: of all weights; None: as stored, whereupon they stay mapped from their files and cost memory as they are touched.
    image_size: pixels, for towers that read several sizes (Qwen2-VL). Strict: raises ValueError naming every weight that is
    unread, missing or of another shape, FileNotFoundError or OSError for what is not there, each with what to type.
    """
    folder = local_folder(path, revision)
    description = describe(folder)
    shards = Shards(folder)
    config = description.vlm
    if image_size is not None and config.vision is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    table = description.family.table
    names = [name for name in shards.names if not _is_tied_copy(config, table, shards, name)]
    found, _ = renamed(names, table)
    # A stored head that is not the embedding is a head of its own, whatever the config says (as transformers 5 takes it).
    config = replace(config, tie_embeddings=config.tie_embeddings and "head.weight" not in found)
    vlm = lay_out(config, dtype or _stored_dtype(shards, found))
    weights = read_weights(shards, names, table, vlm.state_dict(), dtype, description.family.name)
    vlm.load_state_dict(weights, strict=True, assign=True)
    mean, std = _normalisation(description)
    return Published(folder, description.family.name, vlm.eval(), mean, std, dict(description.raw))


def lay_out(config: VLMConfig, dtype: torch.dtype) -> VLM:
    """A VLM whose decoder, embeddings and projector have no memory yet ("meta") and are to be assigned; its tower is real.

    Towers of other libraries keep constants that only their constructors compute, so they are built, in `dtype`.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        tower = None if config.vision is None else VisionTower(config.vision)
    finally:
        torch.set_default_dtype(previous)
    with torch.device("meta"):
        vlm = VLM(config, tower)
    for module in vlm.modules():
        if isinstance(module, Rotary):
            module.inverse_frequency = rotary_frequencies(module.config)
    return vlm


def _is_tied_copy(config: VLMConfig, table: Table, shards: Shards, name: str) -> bool:
    """Is this a copy of the embedding that a model stores as its head, though it ties the two?"""
    if not config.tie_embeddings or "head.weight" not in renamed([name], table)[0]:
        return False
    embedding = renamed(shards.names, table)[0].get("text_embedding.weight")
    if embedding is None or shards.shape(name) != shards.shape(embedding):
        return False
    first, second = shards[name], shards[embedding]
    return torch.equal(first[:8], second[:8]) and torch.equal(first, second)  # most differ in the first rows


def _stored_dtype(shards: Shards, found: dict[str, str]) -> torch.dtype:
    """The dtype of the embedding table, which is that of the model."""
    return shards[found["text_embedding.weight"]].dtype if "text_embedding.weight" in found else torch.float32


def _normalisation(description: Description) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The image mean and deviation of preprocessor_config.json, or the family's."""
    path = description.folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    if description.family.knows_transformers and "image_mean" in settings and "image_std" in settings:
        return tuple(settings["image_mean"]), tuple(settings["image_std"])
    return description.family.mean, description.family.std


def fingerprint(folder: Path) -> str:
    """16 hex digits of the settings and weights; of a large file its size and 16 blocks of 64 KiB, evenly spaced, count."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in range(16):
                file.seek(block * max(size - 65536, 0) // 15)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16]
