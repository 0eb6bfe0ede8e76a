"""Laws of the OpenVLA layout, whose class no transformers has: its table of names and shapes, and a forward pass written here.

The reference follows openvla/openvla, prismatic/extern/hf (read 2026-11): both ViTs' second to last blocks, DINOv2 first, side by
side; fc1, GELU, fc2, GELU, fc3; patches between the first token and the rest; a causal Llama.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from multimodal.pretrained.keys import renamed
from multimodal.pretrained.load import load_published
from multimodal.pretrained.prismatic import PRISMATIC, action_ids, build
from multimodal.vlm import VLM

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
OPENVLA: dict[str, Any] = {  # what decides the model in openvla/openvla-7b's config.json
    "model_type": "openvla", "timm_model_ids": [DINO, SIGLIP], "image_sizes": [224, 224], "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True, "pad_to_multiple_of": 64, "n_action_bins": 256,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2}
TINY = {**OPENVLA, "image_sizes": [28, 28], "n_action_bins": 200, "text_config": {"model_type": "llama", **TEXT}, "vit_options": [VIT, VIT]}


def published_shapes() -> dict[str, list[int]]:
    """Names and shapes of openvla/openvla-7b, written out from the published code and config."""
    shapes: dict[str, list[int]] = {}

    def vit(prefix: str, width: int, depth: int, mlp: int, *, scaled: bool) -> None:
        shapes[f"{prefix}.patch_embed.proj.weight"] = [width, 3, 14, 14]
        shapes[f"{prefix}.patch_embed.proj.bias"] = [width]
        shapes[f"{prefix}.pos_embed"] = [1, 256, width]
        shapes[f"{prefix}.norm.weight"] = shapes[f"{prefix}.norm.bias"] = [width]
        for block in range(depth):
            at = f"{prefix}.blocks.{block}"
            linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
            for name, (rows, columns) in linears.items():
                shapes[f"{at}.{name}.weight"], shapes[f"{at}.{name}.bias"] = [rows, columns], [rows]
            for name in ("norm1", "norm2"):
                shapes[f"{at}.{name}.weight"] = shapes[f"{at}.{name}.bias"] = [width]
            if scaled:
                shapes[f"{at}.ls1.scale_factor"] = shapes[f"{at}.ls2.scale_factor"] = [width]

    vit("vision_backbone.featurizer", 1024, 24, 4096, scaled=True)
    shapes["vision_backbone.featurizer.cls_token"] = [1, 1, 1024]
    shapes["vision_backbone.featurizer.reg_token"] = [1, 4, 1024]
    vit("vision_backbone.fused_featurizer", 1152, 27, 4304, scaled=False)
    pool = "vision_backbone.fused_featurizer.attn_pool"
    shapes[f"{pool}.latent"] = [1, 1, 1152]
    for name, (rows, columns) in {
        "q": (1152, 1152), "kv": (2304, 1152), "proj": (1152, 1152), "mlp.fc1": (4304, 1152), "mlp.fc2": (1152, 4304),
    }.items():  # fmt: skip
        shapes[f"{pool}.{name}.weight"], shapes[f"{pool}.{name}.bias"] = [rows, columns], [rows]
    shapes[f"{pool}.norm.weight"] = shapes[f"{pool}.norm.bias"] = [1152]
    for name, (rows, columns) in {"fc1": (8704, 2176), "fc2": (4096, 8704), "fc3": (4096, 4096)}.items():
        shapes[f"projector.{name}.weight"], shapes[f"projector.{name}.bias"] = [rows, columns], [rows]
    for layer in range(32):
        at = f"language_model.model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = [4096, 4096]
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = [11008, 4096]
        shapes[f"{at}.mlp.down_proj.weight"] = [4096, 11008]
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = [4096]
    shapes["language_model.model.norm.weight"] = [4096]
    shapes["language_model.model.embed_tokens.weight"] = shapes["language_model.lm_head.weight"] = [32064, 4096]
    return shapes


def test_every_published_name_has_its_place_and_shape():
    published = published_shapes()
    with torch.device("meta"):
        vlm = VLM(build(OPENVLA))
    ours = {name: list(value.shape) for name, value in vlm.state_dict().items()}
    found, unread = renamed(list(published), PRISMATIC.table)
    assert unread == []
    assert {name: published[theirs] for name, theirs in found.items()} == ours


def test_action_ids_are_the_last_of_the_unpadded_vocabulary():
    """Bin i of 256, from 1 at -1 to 256 at +1, is token 32000 - i (research note, section 1.1)."""
    ids = action_ids(OPENVLA)
    assert (ids[0], ids[-1], len(ids)) == (31744, 31999, 256)


def random_checkpoint(folder: Path) -> dict[str, Tensor]:
    """A small model in the published layout: its names by hand, its ViTs' from timm."""
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}
    for part, name in (("featurizer", DINO), ("fused_featurizer", SIGLIP)):
        vit = timm.create_model(name.split(".")[0], num_classes=0, img_size=28, **VIT)
        for key, value in vit.state_dict().items():
            published = key.replace(".gamma", ".scale_factor")
            weights[f"vision_backbone.{part}.{published}"] = value + 0.3 * torch.randn_like(value)
    sizes = {"fc1": (128, 32), "fc2": (32, 128), "fc3": (32, 32)}
    for name, (rows, columns) in sizes.items():
        weights[f"projector.{name}.weight"] = torch.randn(rows, columns) * columns**-0.5
        weights[f"projector.{name}.bias"] = torch.randn(rows)
    for key, value in llama().state_dict().items():
        scale = 0.3 if value.ndim == 1 else value.shape[-1] ** -0.5
        weights[f"language_model.{key}"] = value + scale * torch.randn_like(value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name].contiguous() for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


@torch.no_grad()
def logits_reference(weights: dict[str, Tensor], frames: Tensor, ids: Tensor) -> Tensor:
    """frames float [B, 3, 28, 28] in [0, 1], ids [B, T] whose first is <s> -> logits [B, 4 + T, V]."""
    features = []
    towers = (("featurizer", DINO, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ("fused_featurizer", SIGLIP, (0.5,) * 3, (0.5,) * 3))
    for part, name, mean, std in towers:
        vit = timm.create_model(name.split(".")[0], num_classes=0, img_size=28, **VIT).eval()
        prefix = f"vision_backbone.{part}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        vit.load_state_dict({key.replace(".scale_factor", ".gamma"): value for key, value in own.items()})
        pixels = (frames - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        features.append(vit.get_intermediate_layers(pixels, n={len(vit.blocks) - 2})[0])
    x = torch.cat(features, dim=2)
    for name, last in (("fc1", False), ("fc2", False), ("fc3", True)):
        x = F.linear(x, weights[f"projector.{name}.weight"], weights[f"projector.{name}.bias"])
        x = x if last else F.gelu(x)
    model = llama()
    prefix = "language_model."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})
    words = model.get_input_embeddings()(ids)
    return model(inputs_embeds=torch.cat([words[:, :1], x, words[:, 1:]], dim=1)).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("prismatic") / "openvla"
    return folder, random_checkpoint(folder)


@torch.no_grad()
def test_logits_equal_the_written_out_forward_pass(checkpoint: tuple[Path, dict[str, Tensor]]):
    folder, weights = checkpoint
    vlm = load_published(folder).vlm
    generator = torch.Generator().manual_seed(1)
    frames, ids = torch.rand(2, 3, 28, 28, generator=generator), torch.randint(3, 300, (2, 6), generator=generator)
    words = vlm.embed_text(ids)
    images = vlm.image_features((frames - 0.5) / 0.5)
    sequence = torch.cat([words[:, :1], images, words[:, 1:]], dim=1)
    length = sequence.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    logits = vlm.logits(vlm.decoder(sequence, mask, torch.arange(length).expand(2, -1)))
    expected = logits_reference(weights, frames, ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-4


def test_a_single_tower_has_two_projector_layers():
    single = {**TINY, "timm_model_ids": [SIGLIP], "image_sizes": [28], "timm_override_act_layers": [None], "vit_options": [VIT]}
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in VLM(build(single)).state_dict().items() if name.startswith("projector")}
    assert shapes == {
        "projector.layers.0.weight": [32, 16], "projector.layers.0.bias": [32],
        "projector.layers.1.weight": [32, 32], "projector.layers.1.bias": [32],
    }  # fmt: skip
