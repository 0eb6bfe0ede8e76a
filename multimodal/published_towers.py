"""The image towers that published vision-language models were trained with: transformers' own modules, and timm's ViTs."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.config import VisionConfig, check_choice
from multimodal.projector import ungroup_patches


@dataclass(frozen=True)
class TowerClass:
    """Where transformers keeps a tower, and which settings of its config decide what it computes."""

    package: str  # transformers.models.X
    config: str
    model: str
    fields: tuple[str, ...]

    def load(self) -> tuple[type, type]:
        """Its config and model class. Raises ValueError naming the version to install if this transformers has none."""
        try:
            folder = f"transformers.models.{self.package}"
            config = getattr(importlib.import_module(f"{folder}.configuration_{self.package}"), self.config)
            return config, getattr(importlib.import_module(f"{folder}.modeling_{self.package}"), self.model)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"the installed transformers has no {self.model}: {error}. Install one that has: "
                "pip install 'transformers>=4.57,<6'"
            ) from error


_VIT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps")  # fmt: skip
_QWEN = ("depth", "hidden_size", "num_heads", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")

TOWERS: Mapping[str, TowerClass] = {
    "clip": TowerClass("clip", "CLIPVisionConfig", "CLIPVisionModel", (*_VIT, "projection_dim")),
    "siglip": TowerClass("siglip", "SiglipVisionConfig", "SiglipVisionModel", (*_VIT, "vision_use_head")),
    "idefics3": TowerClass("idefics3", "Idefics3VisionConfig", "Idefics3VisionTransformer", _VIT),
    "smolvlm": TowerClass("smolvlm", "SmolVLMVisionConfig", "SmolVLMVisionTransformer", _VIT),
    "qwen2_vl": TowerClass(
        "qwen2_vl", "Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel",
        (*_QWEN, "embed_dim", "mlp_ratio", "hidden_act"),
    ),  # fmt: skip
    "qwen2_5_vl": TowerClass(
        "qwen2_5_vl", "Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel",
        (*_QWEN, "intermediate_size", "hidden_act", "out_hidden_size", "window_size", "fullatt_block_indexes"),
    ),  # fmt: skip
}


def tower_options(name: str, config: Any) -> dict[str, Any]:
    """Of a transformers vision config what decides the tower, as plain values for VisionConfig.options."""
    return {field: getattr(config, field) for field in TOWERS[name].fields if hasattr(config, field)}


def build_transformers_tower(config: VisionConfig) -> tuple[nn.Module, int, int]:
    """The tower, its width and patches per image. Raises ValueError for an unknown name, or transformers without it."""
    check_choice("VisionConfig", "name", config.name, tuple(TOWERS))
    config_class, model_class = TOWERS[config.name].load()
    settings = config_class(**config.options)
    settings._attn_implementation = "sdpa"
    if config.name.startswith("qwen"):
        tower = _QwenTower(model_class(settings), settings.embed_dim if config.name == "qwen2_vl" else settings.hidden_size)
        return tower, tower.width, (config.image_size // tower.patch_size) ** 2
    tower = _HiddenStates(model_class(settings), config)
    return tower, settings.hidden_size, (config.image_size // settings.patch_size) ** 2 + config.keep_class_token


class _HiddenStates(nn.Module):
    """Hidden state `stage` of a CLIP or SigLIP tower: 0 the embeddings, n block n's output; `last` of towers with a final norm."""

    def __init__(self, model: nn.Module, config: VisionConfig) -> None:
        super().__init__()
        self.model = getattr(model, "vision_model", model)  # transformers 4 wraps what transformers 5 is
        self.patch_size = model.config.patch_size
        self.stage, self.has_class_token = config.stage, config.name == "clip"
        self.drops_class_token = self.has_class_token and not config.keep_class_token

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.model.embeddings.patch_embedding.weight.dtype)
        if self.stage == -1 and not self.has_class_token:
            states = self.model(images).last_hidden_state  # after the final norm, which no hidden state has seen
        else:
            states = self.model(images, output_hidden_states=True).hidden_states[self.stage]
        return states[:, 1:] if self.drops_class_token else states


class _QwenTower(nn.Module):
    """Qwen2-VL's and Qwen2.5-VL's ViT without its merger, which is our Projector. Images of any size in whole groups."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.side, self.frames = model.spatial_merge_size, model.config.temporal_patch_size
        self.patch_size, self.width = model.config.patch_size, width
        model.merger = _Regrouped(width * self.side**2)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        grid = torch.tensor([[1, rows, columns]] * len(images), device=images.device)
        pixels = self.flat_patches(images.to(self.model.patch_embed.proj.weight.dtype))
        found = self.model(pixels, grid_thw=grid)
        groups = found if isinstance(found, Tensor) else found.pooler_output  # transformers 4, 5
        return ungroup_patches(groups.view(len(images), -1, groups.shape[-1]), (rows, columns), self.side)

    def flat_patches(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N * rows * columns, 3 * frames * patch^2]: a still image repeated, patches group by group."""
        count, channels, height, width = images.shape
        size, side = self.patch_size, self.side
        if height % (size * side) or width % (size * side):
            raise ValueError(
                f"Images of {height} x {width} pixels; this tower reads multiples of {size * side} (ImageConfig.size)."
            )
        x = images.reshape(count, channels, height // size // side, side, size, width // size // side, side, size)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [N, rows / side, columns / side, side, side, channels, size, size]
        x = x.unsqueeze(6).expand(*x.shape[:6], self.frames, size, size)
        return x.reshape(-1, channels * self.frames * size * size)


class _Regrouped(nn.Module):
    """Stands where the merger was: the patches of a group side by side, so that windows can be undone group by group."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, patches: Tensor) -> Tensor:
        return patches.reshape(-1, self.width)


def build_timm_vit(config: VisionConfig) -> tuple[nn.Module, int, int]:
    """One or several ViTs of timm whose patch features stand side by side (Prismatic: DINOv2 and SigLIP)."""
    tower = _TimmViTs(config)
    return tower, sum(vit.embed_dim for vit in tower.vits), tower.vits[0].patch_embed.num_patches


class _TimmViTs(nn.Module):
    """Output of block `stage` of each ViT, without its final norm and class tokens, channels concatenated.

    Images arrive as (x - 0.5) / 0.5 and are normalised again as each ViT was trained: options["means"], ["stds"].
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        import timm

        names = config.name.split("+")
        options = config.options.get("vits", [{}] * len(names))
        pretrained = config.pretrained is not None
        self.vits = nn.ModuleList(
            timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=config.image_size, **given)
            for name, given in zip(names, options, strict=True)
        )
        self.stage, self.patch_size = config.stage, self.vits[0].patch_embed.patch_size[0]
        half = [[0.5] * 3] * len(names)
        self.means, self.stds = config.options.get("means", half), config.options.get("stds", half)

    def forward(self, images: Tensor) -> Tensor:
        features = []
        for vit, mean, std in zip(self.vits, self.means, self.stds, strict=True):
            shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
            own = (images * 0.5 + 0.5 - shift) / scale
            stage = len(vit.blocks) + self.stage if self.stage < 0 else self.stage
            maps = vit.forward_intermediates(
                own.to(vit.patch_embed.proj.weight.dtype), indices=[stage], norm=False, output_fmt="NLC", intermediates_only=True
            )
            features.append(maps[0])
        return torch.cat(features, dim=-1)
