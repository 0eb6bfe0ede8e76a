"""A draft on disk: a folder like every other checkpoint, which names the target that it was trained for."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from multimodal.checkpoint import load_checkpoint, load_weights, save_checkpoint
from serve.draft_model import DraftModel, DraftModelConfig
from serve.target import Target, cast

FORMAT = "remask-draft-1"


@dataclass(frozen=True)
class DraftAssets:
    """All of a draft but its weights."""

    model: DraftModelConfig
    target: str  # content hash of the target's checkpoint
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the checkpoint folder, atomically."""
        config = {"format": FORMAT, "draft": self.model.to_dict(), "target": self.target}
        blobs = {"provenance.json": json.dumps(self.provenance, indent=1)}
        save_checkpoint(folder, model_state=weights, config=config, blobs=blobs)


def load_draft(path: Path | str, target: Target) -> DraftModel:
    """The draft of a checkpoint folder, for `target`, in the target's type and on its device.

    Raises FileNotFoundError without a checkpoint, ValueError for one whose shapes do not fit the target. A draft of another
    target's weights is warned of: it guesses badly, and answers stay right.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.config.get("format") != FORMAT:
        found = checkpoint.config.get("format")
        raise ValueError(f"{path} holds format {found!r}; a draft has {FORMAT!r} (made by `vla train-draft`).")
    if target.name and checkpoint.config["target"] != target.name:
        warnings.warn(
            f"The draft {path} was trained for target {checkpoint.config['target']}, this one is {target.name}: answers are "
            "right, but few drafts will be accepted. Train one with `vla train-draft`.",
            stacklevel=2,
        )
    config = DraftModelConfig.from_dict(checkpoint.config["draft"])
    ids = checkpoint.state["head_ids"].tolist() if "head_ids" in checkpoint.state else None
    model = DraftModel(config, target.vlm, ids)
    load_weights(model, checkpoint.state, path)
    weight = target.vlm.text_embedding.weight
    return cast(model, weight.dtype).to(weight.device)
