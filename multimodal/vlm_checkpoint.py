"""A checkpoint folder that alone makes a vision-language model: config, tokenizer, image settings, cameras, weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from multimodal.checkpoint import CONFIG, checkpoint_hash, load_checkpoint, load_weights, save_checkpoint
from multimodal.config import VLMConfig
from multimodal.device import check_device
from multimodal.images import ImageConfig
from multimodal.tokenizer import TextTokenizer
from multimodal.vlm import VLM

FORMAT = "remask-vlm-1"


@dataclass(frozen=True)
class VLMAssets:
    """All of a VLM but its weights."""

    config: VLMConfig
    tokenizer: TextTokenizer
    images: ImageConfig
    cameras: tuple[str, ...]  # in the order of the images axis
    image_size: int  # pixels of the frames that `images` prepares
    provenance: dict[str, Any] = field(default_factory=dict)  # corpus, seed, steps

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint folder, atomically."""
        images = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.images).items()}
        save_checkpoint(
            folder,
            model_state=weights,
            config={"format": FORMAT, "vlm": vlm_config_to_dict(self.config), "images": images},
            blobs={
                "tokenizer.json": self.tokenizer.to_json(),
                "schema.json": json.dumps({"cameras": list(self.cameras), "image_size": self.image_size}, indent=1),
                "provenance.json": json.dumps(self.provenance, indent=1),
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> tuple["VLMAssets", dict[str, Tensor]]:
        """The assets and the weights. Raises FileNotFoundError or ValueError saying what is wrong with the folder."""
        checkpoint = load_checkpoint(folder)
        config = checkpoint.config
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{checkpoint.folder} holds format {config.get('format')!r}; a vision-language model has {FORMAT!r}. Name the "
                "`policy` folder of a run of `vla train-vlm`."
            )
        images = {name: tuple(value) if isinstance(value, list) else value for name, value in config["images"].items()}
        schema = json.loads(checkpoint.text("schema.json"))
        assets = cls(
            config=VLMConfig.from_dict(config["vlm"]),
            tokenizer=TextTokenizer.from_json(checkpoint.text("tokenizer.json")),
            images=ImageConfig(**images),
            cameras=tuple(schema["cameras"]),
            image_size=schema["image_size"],
            provenance=json.loads(checkpoint.text("provenance.json")),
        )
        return assets, checkpoint.state


@dataclass(frozen=True)
class LoadedVLM:
    """What `load_vlm` gives."""

    model: VLM  # in eval mode
    assets: VLMAssets
    content_hash: str  # of the folder


def is_vlm(path: Path | str) -> bool:
    """Whether a folder holds a vision-language model (rather than a policy, a draft or nothing)."""
    config = Path(path).expanduser() / CONFIG
    return config.is_file() and yaml.safe_load(config.read_text()).get("format") == FORMAT


def load_vlm(path: str | Path, *, device: str = "cpu") -> LoadedVLM:
    """The model of a checkpoint folder.

    Raises FileNotFoundError without a checkpoint, ValueError for one that does not fit or a device that is not there.
    """
    check_device(device)
    assets, weights = VLMAssets.load(path)
    vision = assets.config.vision and replace(assets.config.vision, pretrained=None)  # the weights are here
    model = VLM(replace(assets.config, vision=vision))
    load_weights(model, weights, path)
    return LoadedVLM(model.to(device).eval(), assets, checkpoint_hash(path))


def vlm_config_to_dict(config: VLMConfig) -> dict[str, Any]:
    """Plain dicts, lists and numbers, as YAML writes them; `VLMConfig.from_dict` is the inverse."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
