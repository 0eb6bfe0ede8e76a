"""A checkpoint folder that alone makes bound encoders: config, tokenizer, classes in words, weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from multimodal.bind.centers import SemanticCenters, build_centers
from multimodal.bind.corpus_file import ObjectClass
from multimodal.bind.encoders import BindConfig, BoundModel, TrunkConfig
from multimodal.checkpoint import checkpoint_hash, load_checkpoint, load_weights, save_checkpoint
from multimodal.device import check_device
from multimodal.tokenizer import TextTokenizer

FORMAT = "remask-bind-1"


@dataclass(frozen=True)
class BoundAssets:
    """All of a bound model but its weights."""

    config: BindConfig
    tokenizer: TextTokenizer
    classes: tuple[ObjectClass, ...]
    provenance: dict[str, Any] = field(default_factory=dict)  # corpus, training

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint folder, atomically."""
        shapes = {name: list(shape) for name, shape in self.config.shapes.items()}
        save_checkpoint(
            folder,
            model_state=weights,
            config={"format": FORMAT, "shapes": shapes, "trunk": asdict(self.config.trunk)},
            blobs={
                "tokenizer.json": self.tokenizer.to_json(),
                "classes.json": json.dumps([asdict(kind) for kind in self.classes], indent=1),
                "provenance.json": json.dumps(self.provenance, indent=1),
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> tuple["BoundAssets", dict[str, Tensor]]:
        """The assets and the weights. Raises FileNotFoundError or ValueError saying what is wrong with the folder."""
        checkpoint = load_checkpoint(folder)
        config = checkpoint.config
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{checkpoint.folder} holds format {config.get('format')!r}; bound encoders have {FORMAT!r}. Name the "
                "`policy` folder of a run of `vla train-bind`."
            )
        shapes = {name: tuple(shape) for name, shape in config["shapes"].items()}
        rows = json.loads(checkpoint.text("classes.json"))
        assets = cls(
            config=BindConfig(shapes, TrunkConfig(**config["trunk"])),
            tokenizer=TextTokenizer.from_json(checkpoint.text("tokenizer.json")),
            classes=tuple(ObjectClass(**{**row, "prompts": tuple(row["prompts"])}) for row in rows),
            provenance=json.loads(checkpoint.text("provenance.json")),
        )
        return assets, checkpoint.state


@dataclass(frozen=True)
class LoadedBound:
    """What `load_bound` gives."""

    model: BoundModel  # in eval mode, without gradients of its own
    assets: BoundAssets
    content_hash: str  # of the folder

    def centers(self, classes: tuple[int, ...] | None = None, pooling: str = "mean") -> SemanticCenters:
        """Centers of those classes (counts in assets.classes), by default of all that training saw."""
        kinds = self.assets.classes
        chosen = [kind for kind in kinds if kind.is_seen] if classes is None else [kinds[index] for index in classes]
        return build_centers(chosen, self.model.text.embed_sentences, pooling)


def load_bound(path: str | Path, *, device: str = "cpu") -> LoadedBound:
    """The model of a checkpoint folder.

    Raises FileNotFoundError without a checkpoint, ValueError for one that does not fit or a device that is not there.
    """
    check_device(device)
    assets, weights = BoundAssets.load(path)
    model = BoundModel(assets.config, assets.tokenizer)
    load_weights(model, weights, path)
    return LoadedBound(model.to(device).eval().requires_grad_(False), assets, checkpoint_hash(path))
