"""Policies on published backbones: what a policy folder holds of one, and how the model comes back from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from multimodal.config import VLMConfig, check_choice
from multimodal.decoder import EMBEDDING_STD, initialise
from multimodal.pretrained.load import Published, fingerprint, lay_out, load_published
from multimodal.vlm import VLM
from vla.lora import merged, split_adapters, to_our_name
from vla.model import VLA, VLAConfig

TUNES = ("full", "lora", "frozen")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BackboneConfig:
    """The published checkpoint that a policy starts from, and what of it trains. What the policy adds always trains."""

    path: str | None = None  # model folder, or Hub repository "owner/name"; none: the preset, from scratch
    revision: str | None = None  # of a Hub repository: branch, tag or commit
    tune: str = "full"  # full: all weights; lora: adapters on decoder and projector; frozen: nothing of it
    lora_rank: int = 32
    lora_alpha: float = 16.0  # adapters add alpha / rank times their product
    lora_dropout: float = 0.0
    dtype: str = "float32"  # of the published weights: float32, or bfloat16 with tune lora or frozen
    image_size: int | None = None  # pixels, for towers that read several sizes (Qwen2-VL); default: the tower's own

    def __post_init__(self) -> None:
        check_choice("BackboneConfig", "tune", self.tune, TUNES)
        check_choice("BackboneConfig", "dtype", self.dtype, tuple(DTYPES))
        if self.tune == "full" and self.dtype != "float32":
            raise ValueError(
                f"BackboneConfig.dtype {self.dtype} cannot take the small steps of full training; use float32 (with "
                "--training.precision=bf16 the arithmetic is bf16 anyway), or tune=lora."
            )
        if self.lora_rank < 1:
            raise ValueError(f"BackboneConfig.lora_rank is {self.lora_rank}; it must be at least 1.")


@dataclass(frozen=True)
class Base:
    """Published weights that a policy folder's own are laid over."""

    path: str
    revision: str | None
    fingerprint: str  # multimodal.pretrained.load.fingerprint of its files
    dtype: str
    image_size: int | None
    lora_rank: int
    lora_alpha: float


def read_base(base: Base) -> Published:
    """Raises ValueError if the published files are not those that the policy was trained on, else as `load_published`."""
    published = load_published(base.path, revision=base.revision, dtype=DTYPES[base.dtype], image_size=base.image_size)
    found = fingerprint(published.folder)
    if found != base.fingerprint:
        raise ValueError(
            f"The policy was trained on {base.path} with fingerprint {base.fingerprint}; the files there now have {found}. Restore "
            "them, or use a merged policy (vla merge), which needs no base."
        )
    return published


def adapt(vlm: VLM, config: VLMConfig) -> VLM:
    """The published model as a policy's backbone: no language head, and config's image tower if it has none of its own."""
    if vlm.config.vision is not None:
        vlm.config, vlm.head = config, None
        return vlm
    seeing = lay_out(config, torch.float32)
    seeing.decoder, seeing.text_embedding = vlm.decoder, vlm.text_embedding
    seeing.projector = nn.Linear(seeing.vision.width, config.decoder.hidden_size)
    initialise(seeing.projector)
    seeing.image_positions = nn.Parameter(torch.randn(config.num_cameras, seeing.tokens_per_image, config.decoder.hidden_size))
    return seeing


def rebuild(config: VLAConfig, base: Base | None, weights: Mapping[str, Tensor], source: str | Path) -> VLA:
    """The model of a policy folder: its weights alone, or laid over (adapters: merged into) those of its base.

    Raises ValueError naming weights that are missing, unexpected or of another shape, and what `read_base` raises.
    """
    if base is None:
        model = VLA(config, lay_out(config.vlm, torch.float32))
        check_names(model, weights, set(model.state_dict()), source)
        model.load_state_dict(dict(weights), strict=True, assign=True)
        return model
    model = VLA(config, adapt(read_base(base).vlm, config.vlm))
    adapters, own = split_adapters(weights)
    state = model.state_dict()
    check_names(model, {**own, **{name: state[name] for name in adapters if name in state}}, own_names(model), source)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, pair in adapters.items():
            parameters[name].data = merged(parameters[name], pair, base.lora_rank, base.lora_alpha)
    model.load_state_dict(own, strict=False)
    return model


def own_names(model: VLA) -> set[str]:
    """Weights that no base can give: all but the backbone's; of a backbone without a tower of its own the tower's too."""
    fresh = ("vlm.vision.", "vlm.projector.", "vlm.image_positions") if model.config.vlm.image_positions else ()
    return {name for name in model.state_dict() if not name.startswith("vlm.") or name.startswith(fresh)}


def check_names(model: VLA, weights: Mapping[str, Tensor], required: set[str], source: str | Path) -> None:
    """Raises ValueError unless `weights` hold all required names and only the model's, in its shapes."""
    state = model.state_dict()
    missing, unexpected = sorted(required - weights.keys()), sorted(weights.keys() - state.keys())
    shapes = [name for name, value in weights.items() if name in state and value.shape != state[name].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"The weights in {source} do not fit the policy of their config: missing {missing[:4]}, unexpected {unexpected[:4]}, "
            f"of another shape {shapes[:4]}. Restore the folder, or train again."
        )


def trained_part(model: VLA) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Which of a training model's state a policy folder keeps beside its base: what trains, and buffers, under our names."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return lambda state: {to_our_name(name): value for name, value in state.items() if name not in frozen}


def scale_new_parts(model: VLA) -> None:
    """Give what the policy adds the size of the backbone's text embeddings, beside which it stands.

    Published embeddings are small (Llama: 0.02 per entry); tokens of the size that suits a fresh model would drown them.
    """
    table = model.vlm.text_embedding.weight[:1024].detach()
    size = float(table.float().square().mean().sqrt()) * model.config.vlm.text_scale
    third = size / 3**0.5  # three of them are summed, for tokens as for steps
    with torch.no_grad():
        model.state_projector.weight.mul_(size)
        for name in ("action_embedding", "step_embedding", "dim_embedding"):
            if hasattr(model, name):
                nn.init.normal_(getattr(model, name).weight, std=third)
        if hasattr(model, "step_slots"):
            for weight in (model.step_slots.value.weight, model.step_slots.time[-1].weight, model.step_slots.place):
                weight.mul_(third / EMBEDDING_STD)
        if model.config.vlm.image_positions:
            model.vlm.image_positions.mul_(size / 2**0.5)
            model.vlm.projector.weight.mul_(size / 2**0.5)


def policy_vlm_config(published: VLMConfig, fresh: VLMConfig) -> VLMConfig:
    """The published model's configuration as a policy's: its cameras, no language head, the preset's tower where it has none."""
    own = replace(published, num_cameras=fresh.num_cameras, tie_embeddings=True)
    return own if published.vision is not None else replace(own, vision=fresh.vision, image_positions=True)
