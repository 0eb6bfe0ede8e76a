"""Laws of the published layouts: ImageBind's weights give an independent reading's vectors; wrappers start as what they wrap."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.bind.centers import SemanticCenters
from multimodal.bind.encoder_checks import check_encoder
from multimodal.bind.layouts.imagebind import STEMS, load_imagebind_tower, tower_shape
from multimodal.bind.layouts.languagebind import LanguageBindEncoder, languagebind_encoder
from multimodal.bind.layouts.published import (
    ClapPicture,
    PreparedPictures,
    clap_encoder,
    open_clip_encoder,
    transformers_picture_encoder,
)
from multimodal.bind.layouts.unibind import UniBindEncoder, unibind_centers
from multimodal.bind.modalities import box_of

WIDTH, HEADS, OUT, BLOCKS = 16, 2, 12, 2
SHAPES = {"vision": (3, 28, 28), "audio": (1, 26, 36), "depth": (1, 32, 32), "thermal": (1, 32, 32), "imu": (6, 32)}
KERNELS = {"vision": (3, 2, 14, 14), "audio": (1, 16, 16), "depth": (1, 16, 16), "thermal": (1, 16, 16), "imu": (48,)}
PATCHES = {"vision": 4, "audio": 6, "depth": 4, "thermal": 4, "imu": 4}


def random_state(modality: str) -> dict[str, Tensor]:
    """A small checkpoint with the names and forms of ImageBind's."""
    draw = lambda *shape: torch.randn(*shape) * 0.3  # noqa: E731
    pre, trunk, head = (f"modality_{part}.{modality}." for part in ("preprocessors", "trunks", "heads"))
    helper = "" if modality == "imu" else "pos_embedding_helper."
    state = {
        f"{pre}cls_token": draw(1, 1, WIDTH),
        f"{pre}{helper}pos_embed": draw(1, PATCHES[modality] + 1, WIDTH),
        f"{pre}{STEMS[modality]}.weight": draw(WIDTH, *KERNELS[modality]),
        f"{head}0.weight": 1 + draw(WIDTH),
        f"{head}0.bias": draw(WIDTH),
        f"{head}{3 if modality == 'imu' else 2}.weight": draw(OUT, WIDTH),
    }
    if modality == "vision":
        state |= {f"{trunk}pre_transformer_layer.0.weight": 1 + draw(WIDTH), f"{trunk}pre_transformer_layer.0.bias": draw(WIDTH)}
    else:
        norm = f"{pre}{STEMS[modality].split('.')[0]}.norm_layer."
        state |= {f"{norm}weight": 1 + draw(WIDTH), f"{norm}bias": draw(WIDTH)}
        state[f"modality_postprocessors.{modality}.1.log_logit_scale"] = torch.tensor(5.0).log()
    for index in range(BLOCKS):
        block = f"{trunk}blocks.{index}."
        sizes = {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,), "attn.out_proj.weight": (WIDTH, WIDTH),
                 "attn.out_proj.bias": (WIDTH,), "mlp.fc1.weight": (32, WIDTH), "mlp.fc1.bias": (32,), "mlp.fc2.weight": (WIDTH, 32),
                 "mlp.fc2.bias": (WIDTH,), "norm_1.bias": (WIDTH,), "norm_2.bias": (WIDTH,)}  # fmt: skip
        if modality != "vision":
            sizes |= {"attn.bias_k": (1, 1, WIDTH), "attn.bias_v": (1, 1, WIDTH)}
        state |= {block + name: draw(*size) for name, size in sizes.items()}
        state |= {f"{block}norm_{number}.weight": 1 + draw(WIDTH) for number in (1, 2)}
    return state


def reference(state: dict[str, Tensor], modality: str, x: Tensor) -> Tensor:
    """ImageBind's description read afresh: torch's own multi-head attention with bias_k and bias_v, sequence first."""
    pre, trunk, head = (f"modality_{part}.{modality}." for part in ("preprocessors", "trunks", "heads"))
    stem = state[f"{pre}{STEMS[modality]}.weight"]
    if modality == "imu":
        rows = [x[:, :, start : start + 8].reshape(len(x), 48) for start in range(0, x.shape[2], 8)]
        tokens = torch.stack(rows, 1) @ stem.T
    elif modality == "vision":
        tokens = F.conv3d(torch.stack([x, x], 2), stem, stride=(2, 14, 14)).flatten(2).transpose(1, 2)
    else:
        tokens = F.conv2d(x, stem, stride=10 if modality == "audio" else 16).flatten(2).transpose(1, 2)
    if modality != "vision":
        norm = f"{pre}{STEMS[modality].split('.')[0]}.norm_layer."
        tokens = F.layer_norm(tokens, (WIDTH,), state[f"{norm}weight"], state[f"{norm}bias"], 1e-5)
    helper = "" if modality == "imu" else "pos_embedding_helper."
    tokens = torch.cat([state[f"{pre}cls_token"].repeat(len(x), 1, 1), tokens], 1) + state[f"{pre}{helper}pos_embed"]
    if modality == "vision":
        layer = f"{trunk}pre_transformer_layer.0."
        tokens = F.layer_norm(tokens, (WIDTH,), state[f"{layer}weight"], state[f"{layer}bias"], 1e-6)
    tokens = tokens.transpose(0, 1)
    for index in range(BLOCKS):
        start = f"{trunk}blocks.{index}."
        block = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=modality != "vision")
        weights = {name.removeprefix("attn."): value for name, value in block.items() if name.startswith("attn.")}
        attention.load_state_dict(weights)
        normed = F.layer_norm(tokens, (WIDTH,), block["norm_1.weight"], block["norm_1.bias"], 1e-6)
        tokens = tokens + attention(normed, normed, normed, need_weights=False)[0]
        normed = F.layer_norm(tokens, (WIDTH,), block["norm_2.weight"], block["norm_2.bias"], 1e-6)
        inner = F.gelu(F.linear(normed, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        tokens = tokens + F.linear(inner, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    first = F.layer_norm(tokens[0], (WIDTH,), state[f"{head}0.weight"], state[f"{head}0.bias"], 1e-6)
    return F.normalize(first @ state[f"{head}{3 if modality == 'imu' else 2}.weight"].T, dim=-1)


@pytest.mark.parametrize("modality", list(STEMS))
def test_imagebind_layout_equals_an_independent_reading(modality: str) -> None:
    torch.manual_seed(1)
    state = random_state(modality)
    tower = load_imagebind_tower(state, modality, num_heads=HEADS)
    low, high = tower.box.low, tower.box.high
    x = low + (high - low) * torch.rand(3, *SHAPES[modality])
    with torch.no_grad():
        assert torch.allclose(tower.embed(x), reference(state, modality, x), atol=2e-6)
    check_encoder(tower, x, OUT)
    assert tower.logit_scale == pytest.approx(1 / 0.07 if modality == "vision" else 5.0)


def test_an_imagebind_tower_names_what_is_missing() -> None:
    state = random_state("depth")
    with pytest.raises(ValueError, match="depth_stem.*not in ImageBind's layout"):
        tower_shape({name: value for name, value in state.items() if "stem" not in name}, "depth")
    del state["modality_trunks.depth.blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="1 missing: blocks.1.up.bias"):
        load_imagebind_tower(state, "depth", num_heads=HEADS)
    with pytest.raises(ValueError, match="allowed: vision"):
        tower_shape(state, "smell")
    with pytest.raises(ValueError, match="give num_heads"):
        tower_shape(state, "depth", 5)


def clip_model() -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**part, "vocab_size": 99, "max_position_embeddings": 16, "projection_dim": 24}
    vision = {**part, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def siglip_model() -> torch.nn.Module:
    from transformers import SiglipConfig, SiglipModel

    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**part, "image_size": 32, "patch_size": 8}
    text = {**part, "vocab_size": 99, "max_position_embeddings": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


@pytest.mark.parametrize("build", [clip_model, siglip_model])
@pytest.mark.parametrize("modality", ["image", "depth", "thermal"])
def test_transformers_towers_are_encoders(build, modality: str) -> None:
    torch.manual_seed(0)
    encoder = transformers_picture_encoder(build(), modality)
    box = box_of(modality)
    pictures = torch.rand(2, 3 if modality == "image" else 1, 40, 40)
    check_encoder(encoder, box.low + (box.high - box.low) * pictures, encoder.dimension)


def test_a_picture_in_the_box_meets_the_tower_as_its_own_processor_makes_it() -> None:
    from transformers import CLIPImageProcessor

    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    expected = processor(images=[pixels[0].permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
    prepare = PreparedPictures(box_of("image"), 32, processor.image_mean, processor.image_std)
    assert torch.allclose(prepare(pixels / 255), expected, atol=1e-6)


def test_open_clip_models_are_encoders() -> None:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2}
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    encoder = open_clip_encoder(model, "image")
    pictures = torch.rand(2, 3, 32, 32)
    check_encoder(encoder, pictures, 24)
    with torch.no_grad():
        assert torch.allclose(encoder.embed(pictures), model.encode_image(encoder.prepare(pictures), normalize=True), atol=1e-6)


def clap_model() -> torch.nn.Module:
    from transformers import ClapConfig, ClapModel

    audio = {
        "spec_size": 64, "num_mel_bins": 64, "patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 16,
        "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4, "hidden_size": 32, "enable_fusion": False,
        "num_hidden_layers": 2,
    }  # fmt: skip
    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=24)).eval()


def test_clap_hears_waveforms() -> None:
    torch.manual_seed(0)
    encoder = clap_encoder(clap_model())
    check_encoder(encoder, torch.rand(2, 5120) * 2 - 1, 24)


def test_claps_picture_equals_its_own_extractor() -> None:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding="repeat")
    waveform = torch.sin(torch.arange(480_000) / 48_000 * 2 * torch.pi * 440) * torch.linspace(0, 1, 480_000)
    expected = extractor(waveform.numpy(), sampling_rate=48_000, return_tensors="pt")["input_features"]
    picture = ClapPicture(frames=1000, sample_rate=48_000)(waveform[None])
    assert picture.shape[-1] == expected.shape[-1]
    assert torch.allclose(picture, expected[:, :, :1000].float(), atol=0.05)  # decibels


def film_encoder(frames: int) -> LanguageBindEncoder:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPVisionConfig(**part, image_size=32, patch_size=8, projection_dim=24)
    return languagebind_encoder(CLIPVisionModelWithProjection(config), "video" if frames > 1 else "depth", frames=frames)


def test_attention_over_time_without_effect_leaves_the_mean_of_frames() -> None:
    encoder, film = film_encoder(4), torch.rand(2, 3, 4, 32, 32)
    check_encoder(encoder, film, 24)
    with torch.no_grad():
        assert not torch.allclose(encoder.embed(film), encoder.embed(film.flip(2)), atol=1e-4)  # it hears the order
        for layer in encoder.model.vision_model.encoder.layers:
            layer.temporal_embedding.zero_()
            layer.temporal_attn.out_proj.weight.zero_()
            layer.temporal_attn.out_proj.bias.zero_()
        single = film_encoder(1)
        kept = {name: value for name, value in encoder.state_dict().items() if "temporal" not in name}
        single.load_state_dict({name.replace(".layer.", "."): value for name, value in kept.items()})
        pooled = [single.model(pixel_values=encoder.prepare(film[:, :, t])).image_embeds for t in range(4)]
        assert torch.allclose(encoder.embed(film), F.normalize(torch.stack(pooled).mean(0), dim=-1), atol=1e-5)


def test_fresh_adapters_change_nothing_and_trained_ones_merge() -> None:
    encoder, film = film_encoder(2), torch.rand(2, 3, 2, 32, 32)
    with torch.no_grad():
        before = encoder.embed(film)
        encoder.add_lora(2, 4.0)
        assert torch.allclose(encoder.embed(film), before, atol=1e-6)
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        assert trained and sum(p.numel() for p in trained) < sum(p.numel() for p in encoder.parameters()) / 4
        for parameter in trained:
            parameter.normal_(std=0.2)
        after = encoder.eval().embed(film)
        assert not torch.allclose(after, before, atol=1e-3)
        encoder.merge_lora()
        assert torch.allclose(encoder.embed(film), after, atol=1e-5)
        assert not any("lora" in name for name in encoder.state_dict())


def test_a_languagebind_checkpoint_loads_by_its_own_names() -> None:
    encoder, other = film_encoder(2), film_encoder(2)
    published = {name.replace(".layer.", "."): torch.randn_like(value) if value.is_floating_point() else value
                 for name, value in encoder.model.state_dict().items()}  # fmt: skip
    other.load_published(published)
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(other.model.state_dict()[name.replace("layers.1.", "layers.1.layer.")], published[name])
    del published[name]
    with pytest.raises(ValueError, match="1 missing"):
        other.load_published(published)


def test_unibind_starts_as_its_base_and_its_sharp_score_is_the_nearest_center() -> None:
    base = load_imagebind_tower(random_state("depth"), "depth", num_heads=HEADS)
    encoder = UniBindEncoder(base).eval()
    x = torch.rand(2, 1, 32, 32) * 0.5 + 0.25
    check_encoder(encoder, x, OUT)
    with torch.no_grad():
        embedding = encoder.embed(x)
        assert torch.allclose(embedding, base.embed(x), atol=1e-6)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    centers = SemanticCenters(("a", "b"), F.normalize(torch.randn(2, 5, OUT), dim=-1))
    nearest = torch.einsum("bd,kjd->bkj", embedding, centers.vectors).amax(-1)
    assert torch.allclose(unibind_centers(centers).scores(embedding), nearest, atol=2e-3)
