"""A compressed prefix: cached equals uncached, its weights learn, folders and graphs carry it; without one nothing changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from multimodal.compressor import ALIKE, KEEP_ALL, MODES, CompressorConfig
from multimodal.config import get_preset
from multimodal.images import ImageConfig
from multimodal.onnx_compare import compare_graph
from multimodal.onnx_runner import OnnxRunner
from multimodal.onnx_writer import write_graph
from multimodal.tokenizer import train_tokenizer
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import VLMAssets
from tests.reaching import SPEC, write_cache
from tests.test_train import observations, settings
from tests.tiny_policy import write_policy
from vla.cli import parse_config
from vla.export import CheckData, ExportConfig, ExportSource, export_policy
from vla.model import VLA, VLAConfig
from vla.onnx_graphs import vision_graph
from vla.onnx_policy import load_onnx_policy
from vla.policy import load_policy
from vla.train import TrainConfig, train_policy

# 64 pixels are 16 tokens of each of two cameras
COMPRESSORS = {
    "prune": (CompressorConfig("prune", prune_ratio=4), 4),
    "pool": (CompressorConfig("pool", pool_ratio=4), 4),
    "pool uneven": (CompressorConfig("pool", pool_ratio=2), 9),  # 3 x 3 of 4 x 4
    "pool 1d": (CompressorConfig("pool", pool="1d", pool_ratio=3), 6),
    "conv": (CompressorConfig("conv"), 6),
    "resample": (CompressorConfig("resample", queries=3), 3),
    "concat": (CompressorConfig("concat", prune_ratio=8, pool_ratio=16), 2 + 1 + 6 + 2),
}


def build_model(compressor: CompressorConfig = KEEP_ALL, slots: str = "tokens", **decoder) -> VLA:
    torch.manual_seed(0)
    preset = get_preset("debug")
    vision, shape = replace(preset.vision, image_size=64), replace(preset.decoder, **decoder)
    vlm = replace(preset, vision=vision, decoder=shape, vocab_size=20)
    sizes = {"text_length": 6, "action_horizon": 4, "action_dim": 3, "num_action_ids": 17}
    model = VLA(VLAConfig(vlm, compressor=compressor, slots=slots, **sizes)).eval()
    for name, parameter in model.named_parameters():  # away from the tame initialisation, so that an error shows
        parameter.data.mul_(1.0 if name.startswith("vlm.vision.") else 2.0)
    return model


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 2, 3, 64, 64, generator=generator)
    text_mask = torch.arange(6) < torch.tensor([6, 3, 1])[:batch, None]
    text = torch.randint(0, 20, (batch, 6), generator=generator) * text_mask
    return images, torch.randn(batch, 8, generator=generator), text, text_mask


def test_without_a_compressor_a_policy_is_what_it_was_bit_for_bit(tmp_path: Path):
    """Weights, prefix, folder: nothing of it is there, and a folder of before reads as one that keeps all."""
    model = build_model()
    assert not [name for name in model.state_dict() if name.startswith("compressor")]
    images, *rest = inputs()
    before = model.join_prefix(model.vlm.embed_images(images), *rest)
    assert all(map(torch.equal, model.embed_prefix(images, *rest), before))
    assert model.num_image_tokens == model.vlm.num_image_tokens == 32
    config = yaml.safe_load((write_policy(tmp_path / "policy") / "config.yaml").read_text())
    assert "compressor" not in config["model"] and VLAConfig.from_dict(config["model"]).compressor == KEEP_ALL


@pytest.mark.parametrize("slots", ["tokens", "steps"])
def test_a_compressor_leaves_the_other_weights_of_a_seed_alone(slots: str):
    plain, compressed = build_model(slots=slots).state_dict(), build_model(COMPRESSORS["resample"][0], slots).state_dict()
    assert all(torch.equal(value, compressed[name]) for name, value in plain.items())
    assert {name.split(".")[0] for name in compressed.keys() - plain.keys()} == {"compressor"}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("positions", ["rotary", "mrotary"])
def test_cached_rounds_equal_the_uncached_path_and_positions_have_no_gap(name: str, positions: str):
    compressor, count = COMPRESSORS[name]
    model = build_model(compressor, positions=positions, rotary_sections=(4, 2, 2) if positions == "mrotary" else ())
    embeddings, is_real = model.embed_prefix(*inputs())
    assert embeddings.shape[1] == model.prefix_length == 2 * count + 1 + 6 and model.num_image_tokens == 2 * count
    found = model.positions(3, 0, model.prefix_length + 12, embeddings.device)  # [3, T] or, on each axis, [3, 3, T]
    assert torch.equal(found, torch.arange(model.prefix_length + 12).expand_as(found))
    prefix = model.prefill(embeddings, is_real)
    for seed in range(2):
        tokens = torch.randint(0, 18, (3, 12), generator=torch.Generator().manual_seed(seed))
        uncached = model.action_hidden_uncached(tokens, embeddings, is_real)
        torch.testing.assert_close(model.action_hidden(tokens, prefix), uncached, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_does_not_depend_on_its_batch_mates_and_repeats(name: str):
    model = build_model(COMPRESSORS[name][0])
    images = inputs()[0]
    together = model.embed_images(images)
    assert torch.equal(together, model.embed_images(images))
    torch.testing.assert_close(model.embed_images(images[1:2])[0], together[1], atol=1e-5, rtol=1e-4)


def test_each_camera_is_compressed_by_itself():
    model = build_model(COMPRESSORS["pool"][0])
    images = inputs()[0]
    tokens = model.vlm.embed_images(images).view(3, 2, 4, 4, -1)  # cameras, rows, columns
    pooled = model.embed_images(images).view(3, 2, 2, 2, -1)
    torch.testing.assert_close(pooled[:, 1, 0, 1], tokens[:, 1, :2, 2:].mean((1, 2)))


@pytest.mark.parametrize("name", ["conv", "resample", "concat"])
def test_gradients_reach_the_compressor_and_what_is_before_it(name: str):
    model = build_model(COMPRESSORS[name][0])
    hidden = model.action_hidden(torch.full((3, 12), 17), model.prefill(*model.embed_prefix(*inputs())))
    hidden.square().sum().backward()
    weights = dict(model.compressor.named_parameters())
    # The key's bias moves all scores of a query alike, and softmax does not see it.
    assert weights and all(weight.grad.abs().sum() > 0 for key, weight in weights.items() if key != "resampler.key.bias")
    assert model.vlm.image_positions.grad.abs().sum() > 0 and next(model.vlm.vision.parameters()).grad.abs().sum() > 0


GUIDED = [CompressorConfig(mode, prune="guided") for mode in ("prune", "concat")]


@pytest.mark.parametrize("compressor", [*(CompressorConfig(mode) for mode in MODES if mode not in ALIKE), *GUIDED])
def test_what_needs_a_question_or_leaves_nothing_is_refused_with_what_is_allowed(compressor: CompressorConfig):
    with pytest.raises(ValueError, match="Allowed: none, prune, pool, conv, resample, concat|Set prune: uniform"):
        VLAConfig(compressor=compressor)


def test_a_config_survives_its_dictionary():
    config = build_model(COMPRESSORS["resample"][0]).config
    assert VLAConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


# ---------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache")


def compressing(cache: Path, run: Path, compressor: CompressorConfig, **training) -> TrainConfig:
    """32 pixels: 4 tokens of each camera."""
    config = settings(cache, run, **{"steps": 1, "ema_decay": 0.0} | training)
    return replace(config, model=replace(config.model, compressor=compressor))


def test_the_yaml_names_a_compressor(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: {preset: desk-s, compressor: {mode: pool, pool_ratio: 4}}\n")
    found = parse_config(TrainConfig, [f"--config_path={tmp_path / 'run.yaml'}"]).model.compressor
    assert found == CompressorConfig("pool", pool_ratio=4)
    assert parse_config(TrainConfig, ["--model.preset=desk-s"]).model.compressor == KEEP_ALL


RESAMPLE = CompressorConfig("resample", queries=2)


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"steps": 120, "batch_size": 16, "learning_rate": 3e-3, "precision": "bf16"}
    return train_policy(compressing(cache, tmp_path_factory.mktemp("run"), RESAMPLE, **training))


def test_a_compressed_policy_learns_to_look_and_comes_back(trained: Path, cache: Path):
    policy = load_policy(trained)
    assert policy.model.config.compressor == RESAMPLE and policy.model.num_image_tokens == 4
    shown = observations(cache, 10)
    bright = [np.sign(item.images["base"][:, 18:].mean() - item.images["base"][:, :18].mean()) for item in shown]
    assert [np.sign(chunk.actions[0, 0]) for chunk in policy.act(shown)] == bright


def test_a_run_on_a_policy_without_a_compressor_adds_a_fresh_one(cache: Path, tmp_path: Path):
    plain = train_policy(compressing(cache, tmp_path / "plain", KEEP_ALL))
    grown = train_policy(replace(compressing(cache, tmp_path / "grown", RESAMPLE, learning_rate=1e-12), start_from=plain))
    before, after = load_policy(plain).model, load_policy(grown).model
    assert after.config == replace(before.config, compressor=RESAMPLE)
    for name, weight in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), weight, atol=1e-6, rtol=0)


def test_a_run_on_a_policy_with_a_compressor_keeps_it_and_takes_no_other(trained: Path, cache: Path, tmp_path: Path):
    before = load_policy(trained).model.compressor
    for asked in (KEEP_ALL, RESAMPLE):
        config = compressing(cache, tmp_path / asked.mode, asked, learning_rate=1e-12)
        after = load_policy(train_policy(replace(config, start_from=trained))).model.compressor
        torch.testing.assert_close(dict(after.state_dict()), dict(before.state_dict()), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="leave out model.compressor"):
        train_policy(replace(compressing(cache, tmp_path / "other", replace(RESAMPLE, queries=3)), start_from=trained))


def test_a_policy_on_a_vision_language_model_takes_a_fresh_one(cache: Path, tmp_path: Path):
    words = train_tokenizer(["Go to the bright side"])
    vlm_config = replace(get_preset("debug"), vocab_size=words.vocab_size)
    vlm = VLM(vlm_config)
    VLMAssets(vlm_config, words, ImageConfig(crop=32), SPEC.cameras, SPEC.image_size).save(tmp_path / "vlm", vlm.state_dict())
    config = replace(compressing(cache, tmp_path / "run", RESAMPLE, learning_rate=1e-12), start_from=tmp_path / "vlm")
    begun = load_policy(train_policy(config)).model
    assert begun.config.compressor == RESAMPLE and begun.num_image_tokens == 4
    torch.testing.assert_close(begun.vlm.projector.weight, vlm.projector.weight, atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.check
@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_vision_graph_compresses_as_torch_does(name: str, tmp_path: Path):
    graph = vision_graph(build_model(COMPRESSORS[name][0]))
    runner = OnnxRunner(write_graph(graph, tmp_path), threads=1)
    for batch in (1, 3):
        (part,), _ = compare_graph(graph, runner, {"images": inputs(batch)[0].numpy()}, "random")
        assert part.max_abs < 5e-5


def test_an_export_passes_the_gate_and_acts_alike(trained: Path, cache: Path, tmp_path: Path):
    export_policy(ExportConfig(policy=ExportSource(str(trained)), output_dir=tmp_path / "export", dataset=CheckData(cache, 80)))
    policies = load_onnx_policy(tmp_path / "export", threads=1), load_policy(trained)
    for ours, theirs in zip(*(policy.act(observations(cache, 3)) for policy in policies), strict=True):
        np.testing.assert_allclose(ours.actions, theirs.actions, atol=1e-4)
