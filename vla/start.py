"""The first step of a policy on a backbone: a published one, or a vision-language model trained here (`vla train-vlm`).

What of it becomes the policy's: prompt, images and sizes, weights, and which of them train.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multimodal.compressor import CompressorConfig
from multimodal.images import ImageConfig
from multimodal.pretrained.load import Published, fingerprint, load_published
from multimodal.pretrained.prismatic import PRISMATIC, action_ids
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import load_vlm
from vla.action_tokenizer import ActionTokenizer
from vla.backbone import DTYPES, BackboneConfig, Base, adapt, policy_vlm_config, scale_new_parts, trained_part
from vla.lora import inject
from vla.model import VLA
from vla.policy import PolicyAssets


@dataclass(frozen=True)
class Start:
    """What a training run begins with."""

    assets: PolicyAssets
    model: VLA
    save: Callable[[Path, dict[str, Tensor]], None]  # writes a policy folder from the training model's state


def begin_on_published(config: BackboneConfig, fresh: PolicyAssets, instructions: Sequence[str], text_slack: int) -> Start:
    """A policy for fresh's robot and data on the published model of `config`.

    fresh: what the data and the settings give without a backbone. instructions: all of the training data; text_slack: ids
    beyond the longest. Raises what `load_published` and its tokenizer raise.
    """
    published = load_published(config.path, revision=config.revision, dtype=DTYPES[config.dtype], image_size=config.image_size)
    tokenizer = published.tokenizer()
    vlm_config = policy_vlm_config(published.vlm.config, fresh.model.vlm)
    model_config = replace(
        fresh.model,
        vlm=vlm_config,
        prompt=tokenizer.prompt,
        text_length=max(len(tokenizer.encode(text)) for text in instructions) + text_slack,
    )
    base = None
    if config.tune != "full":
        base = Base(
            str(config.path), config.revision, fingerprint(published.folder), config.dtype, config.image_size, config.lora_rank,
            config.lora_alpha,
        )  # fmt: skip
    provenance = fresh.provenance | {"backbone": asdict(config) | {"family": published.family}}
    assets = replace(
        fresh, model=model_config, text_tokenizer=tokenizer, images=image_config(published, fresh.images), base=base, provenance=provenance
    )
    action_rows = published_action_rows(published, fresh.action_tokenizer)
    model = VLA(model_config, adapt(published.vlm, vlm_config))
    scale_new_parts(model)
    if action_rows is not None:
        take_action_rows(model, *action_rows)
    freeze(model.vlm, config)
    if base is None:
        return Start(assets, model, assets.save)
    own = trained_part(model)
    return Start(assets, model, lambda folder, state: assets.save(folder, own(state)))


def begin_on_vlm(path: Path, fresh: PolicyAssets, instructions: Sequence[str], text_slack: int) -> Start:
    """A policy for fresh's robot and data whose backbone is the model of `vla train-vlm` at `path`: its weights, shapes and
    words; everything trains.

    Raises ValueError if the model sees other cameras or another size than the run prepares.
    """
    loaded = load_vlm(path)
    found = loaded.assets
    if found.cameras != fresh.spec.cameras:
        cameras = fresh.spec.cameras
        raise ValueError(f"--start_from sees the cameras {found.cameras}, the data set has {cameras}; collect those.")
    if found.images.output_size != fresh.images.output_size:
        raise ValueError(
            f"--start_from sees {found.images.output_size} pixels, this run prepares {fresh.images.output_size}; set "
            f"--images.size={found.images.output_size}."
        )
    model_config = replace(
        fresh.model,
        vlm=loaded.model.config,
        text_length=max(len(found.tokenizer.encode(text)) for text in instructions) + text_slack,
    )
    provenance = fresh.provenance | {"start_from": str(path), "vlm": loaded.content_hash}
    images = replace(fresh.images, mean=found.images.mean, std=found.images.std)  # the tower's range, whatever the crops
    assets = replace(fresh, model=model_config, text_tokenizer=found.tokenizer, images=images, provenance=provenance)
    return Start(assets, VLA(model_config, loaded.model), assets.save)


def add_compressor(model: VLA, config: CompressorConfig) -> VLA:
    """The policy with a fresh compressor before its prefix; every other weight is what it was."""
    grown = VLA(replace(model.config, compressor=config), model.vlm)
    grown.load_state_dict(grown.state_dict() | model.state_dict())
    return grown


def freeze(vlm: VLM, config: BackboneConfig) -> None:
    """Leave what `config.tune` names to train. A tower and projector that the published model never had always do."""
    if config.tune == "full":
        return
    if config.tune == "lora":
        parts = ("decoder",) if vlm.config.image_positions else ("decoder", "projector")
        inject(vlm, parts, config.lora_rank, config.lora_alpha, config.lora_dropout)
    else:
        vlm.requires_grad_(False)
    if vlm.config.image_positions:
        vlm.image_positions.requires_grad_(True)
        for module in (vlm.vision, vlm.projector):
            module.requires_grad_(True)


def image_config(published: Published, given: ImageConfig) -> ImageConfig:
    """Crops and colours as given, size and range as the published tower takes them."""
    vision = published.vlm.config.vision
    if vision is None:
        return given
    return replace(given, size=vision.image_size, mean=published.mean, std=published.std)


def published_action_rows(published: Published, tokenizer: ActionTokenizer) -> tuple[Tensor, Tensor] | None:
    """Of a model that speaks actions (OpenVLA) the embedding and head rows that mean ours: two [V + 1, width], or None.

    A motion id takes the row of the bin that holds its place in -1 .. 1 (bin i of n from the lowest, i = digitize(value, n
    edges)); the binary ids and the mask take the mean of all, since what a gripper's ends mean is each data set's own.
    """
    if published.family != PRISMATIC.name or "n_action_bins" not in published.raw:
        return None
    ids = action_ids(published.raw)
    values = np.linspace(-1.0, 1.0, tokenizer.num_bins)
    bins = np.digitize(values, np.linspace(-1.0, 1.0, len(ids)))  # 1 .. n
    rows = torch.as_tensor(ids[-1] + 1 - bins)

    def taken(table: Tensor) -> Tensor:
        mean = table[ids[0] : ids[-1] + 1].float().mean(0, keepdim=True)
        return torch.cat([table[rows].float(), mean.expand(tokenizer.vocab_size + 1 - len(rows), -1)]).detach()

    return taken(published.vlm.text_embedding.weight), taken(published.vlm.head_weight)


@torch.no_grad()
def take_action_rows(model: VLA, embedding: Tensor, head: Tensor) -> None:
    """Start the policy's action tables from published rows [V + 1, width]."""
    model.action_embedding.weight.copy_(embedding)
    model.action_head.weight.copy_(head[:-1])
