"""Laws of policies on published backbones: every family trains, comes back and acts; adapters are what their merge is."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from multimodal.checkpoint import load_checkpoint
from multimodal.images import ImageConfig
from multimodal.pretrained.load import load_published
from multimodal.training import TrainingConfig
from tests.published import MODELS, save_model
from tests.reaching import SPEC, write_cache
from tests.test_pretrained_prismatic import random_checkpoint
from vla.backbone import BackboneConfig
from vla.cli import main as cli
from vla.data import WindowMixture
from vla.export import write_folder
from vla.frame_cache import FrameCache
from vla.heads import HEADS, HeadConfig
from vla.interface import ActionChunk, Observation
from vla.merge import merge_policy
from vla.onnx_policy import load_onnx_policy
from vla.policy import load_policy
from vla.train import DatasetConfig, ModelConfig, PolicyConfig, TrainConfig, begin, open_windows, train_policy

FAMILIES = (*(name for name in MODELS if name not in ("llama_linear", "idefics3")), "openvla")


def write_tokenizer(folder: Path) -> None:
    """Words of the data set's one instruction, and what a prompt needs."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "go", "to", "the", "bright", "side", "USER:", "ASSISTANT:"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}')


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backbones")
    for name in FAMILIES:
        if name == "openvla":
            random_checkpoint(root / name)
        else:
            save_model(name, root / name)
        write_tokenizer(root / name)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache", episodes=4)


def settings(cache: Path, run: Path, backbone: Path, tune: str, *, dtype: str = "float32", **training) -> TrainConfig:
    size = 56 if backbone.name.startswith("qwen2_") else None
    return TrainConfig(
        dataset=DatasetConfig(root=cache, held_out_fraction=0.0),
        model=ModelConfig(preset="debug", action_horizon=3, num_bins=15),
        policy=PolicyConfig(BackboneConfig(path=str(backbone), tune=tune, lora_rank=4, dtype=dtype, image_size=size)),
        head=HeadConfig(mask_draws=2),
        images=ImageConfig(crop=32),
        training=TrainingConfig(
            **{"steps": 2, "batch_size": 4, "device": "cpu", "warmup_steps": 0, "ema_decay": 0.0, "learning_rate": 1e-2} | training
        ),
        output_dir=run,
    )


def observations(cache: Path) -> list[Observation]:
    frames = FrameCache.open(cache)
    return [
        Observation(
            {camera: np.array(frames.images[camera][9 * index]) for camera in SPEC.cameras}, np.array(frames.state[9 * index]),
            "Go to the bright side",
        )
        for index in range(2)
    ]  # fmt: skip


def act(folder: Path, cache: Path) -> list[ActionChunk]:
    return load_policy(folder).act(observations(cache))


def distance(first: list[ActionChunk], second: list[ActionChunk]) -> float:
    return max(float(np.abs(one.actions - two.actions).max()) for one, two in zip(first, second, strict=True))


def tune_of(name: str) -> str:
    """All three ways, dealt over the families."""
    return ("lora", "full", "frozen")[FAMILIES.index(name) % 3]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_comes_back_and_acts(backbones: Path, cache: Path, tmp_path: Path, name: str):
    tune = tune_of(name)
    folder = train_policy(settings(cache, tmp_path / "run", backbones / name, tune))
    chunks = act(folder, cache)
    assert all(np.isfinite(chunk.actions).all() and chunk.actions.shape == (3, 3) for chunk in chunks)
    assert distance(chunks, act(folder, cache)) == 0.0
    kept = load_checkpoint(folder).state
    published = [key for key in kept if key.startswith("vlm.decoder.") and "lora_" not in key]
    assert bool(published) == (tune == "full")  # what did not train is not stored again


@pytest.mark.parametrize("name", ["llava", "qwen2"])  # a tower of its own, and one that starts from scratch
def test_two_steps_and_a_resume_equal_four_steps_straight(backbones: Path, cache: Path, tmp_path: Path, name: str):
    straight = train_policy(settings(cache, tmp_path / "straight", backbones / name, "lora", steps=4, save_every=2))
    config = settings(cache, tmp_path / "halves", backbones / name, "lora", steps=4, save_every=2)
    train_policy(config)
    checkpoints = tmp_path / "halves" / "checkpoints"
    (checkpoints / "last").unlink()
    shutil.rmtree(checkpoints / "000004")  # as if it had been killed after step 2
    (checkpoints / "last").symlink_to("000002")
    resumed = train_policy(replace(config, resume=True))
    first, second = load_checkpoint(straight).state, load_checkpoint(resumed).state
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "dtype"), [("openvla", "float32"), ("qwen2", "float32"), ("smolvlm", "bfloat16")])
def test_a_merged_policy_needs_no_base_and_acts_as_before(backbones: Path, cache: Path, tmp_path: Path, name: str, dtype: str):
    base = Path(shutil.copytree(backbones / name, tmp_path / name))
    folder = train_policy(settings(cache, tmp_path / "run", base, "lora", dtype=dtype, precision="bf16" if dtype != "float32" else "fp32"))
    before = act(folder, cache)
    assert cli(["merge", f"--policy.path={folder}", f"--output_dir={tmp_path / 'merged'}"]) == 0
    shutil.rmtree(base)
    assert distance(act(tmp_path / "merged", cache), before) <= 1e-6
    decoder = [value for key, value in load_checkpoint(tmp_path / "merged").state.items() if key.startswith("vlm.decoder.")]
    assert {value.dtype for value in decoder} == {getattr(torch, dtype)}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_on_a_backbone_in_half_precision(backbones: Path, cache: Path, tmp_path: Path, head: str):
    config = settings(cache, tmp_path / "run", backbones / "qwen3", "lora", dtype="bfloat16")
    chunks = act(train_policy(replace(config, head=HeadConfig(type=head, mask_draws=2))), cache)
    assert all(np.isfinite(chunk.actions).all() for chunk in chunks)


def test_a_merge_of_a_whole_policy_is_refused(backbones: Path, cache: Path, tmp_path: Path):
    folder = train_policy(settings(cache, tmp_path / "run", backbones / "qwen2", "full"))
    with pytest.raises(ValueError, match="holds all of its weights"):
        merge_policy(folder, tmp_path / "merged")


def test_our_merge_is_pefts(backbones: Path, cache: Path, tmp_path: Path):
    """The model that trained, adapters beside its layers, gives the hidden states of the model that comes back."""
    config = settings(cache, tmp_path / "run", backbones / "llava", "lora")
    start = begin(config, WindowMixture(open_windows(config, held_out=False)))
    for name, parameter in start.model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    start.save(tmp_path / "policy", start.model.state_dict())
    found = load_policy(tmp_path / "policy").model
    images, state = torch.randn(2, 2, 3, 28, 28), torch.randn(2, 3)
    ids = torch.randint(4, 9, (2, start.assets.model.text_length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    tokens = torch.randint(0, 15, (2, 9))
    with torch.no_grad():
        hidden = [
            model.action_hidden(tokens, model.prefill(*model.embed_prefix(images, state, ids, mask)))
            for model in (start.model.eval(), found)
        ]
    assert (hidden[0] - hidden[1]).abs().max() <= 1e-4 and hidden[0].std() > 0.1


def test_the_cached_prefix_is_exact_on_a_published_backbone(backbones: Path, cache: Path, tmp_path: Path):
    """With M-RoPE positions and a prompt around images: cached slots equal one pass over everything."""
    config = settings(cache, tmp_path / "run", backbones / "qwen2_vl", "full")
    model = begin(config, WindowMixture(open_windows(config, held_out=False))).model.eval()
    images, state = torch.randn(2, 2, 3, 56, 56), torch.randn(2, 3)
    ids = torch.randint(4, 9, (2, model.config.text_length))
    mask = torch.arange(ids.shape[1]) < torch.tensor([[ids.shape[1]], [5]])
    tokens = torch.randint(0, 15, (2, 9))
    with torch.no_grad():
        embeddings, is_real = model.embed_prefix(images, state, ids, mask)
        assert embeddings.shape[1] == model.prefix_length
        cached = model.action_hidden(tokens, model.prefill(embeddings, is_real))
        assert (cached - model.action_hidden_uncached(tokens, embeddings, is_real)).abs().max() <= 1e-4
    rows = model.grid_positions[1].tolist()
    around = len(model.config.prompt.before_ids) + len(model.config.prompt.image_before_ids)
    assert rows[around : around + 4] == [around, around, around + 1, around + 1]  # 2 x 2 tokens of the first camera


def test_openvlas_action_rows_start_the_policys_action_tables(backbones: Path, cache: Path, tmp_path: Path):
    config = settings(cache, tmp_path / "run", backbones / "openvla", "frozen")
    model = begin(config, WindowMixture(open_windows(config, held_out=False))).model
    vlm = load_published(backbones / "openvla").vlm
    low, high = 320 - 64 - 1, 320 - 64 - 200  # ids of bins 1 and 200: the table ends with 64 rows of padding
    for row, published in ((0, low), (14, high)):
        assert torch.equal(model.action_embedding.weight[row], vlm.text_embedding.weight[published])
        assert torch.equal(model.action_head.weight[row], vlm.head.weight[published])


def test_another_base_than_the_one_trained_on_is_refused(backbones: Path, cache: Path, tmp_path: Path):
    base = Path(shutil.copytree(backbones / "mistral", tmp_path / "mistral"))
    folder = train_policy(settings(cache, tmp_path / "run", base, "frozen"))
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, base / "model.safetensors")
    with pytest.raises(ValueError, match="fingerprint.*vla merge"):
        load_policy(folder)


def test_full_training_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="use float32"):
        BackboneConfig(path="x", tune="full", dtype="bfloat16")


def test_the_command_line_names_the_backbone(backbones: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "train", f"--dataset.root={cache}", f"--output_dir={tmp_path / 'run'}", f"--policy.backbone.path={backbones / 'qwen3'}",
        "--policy.backbone.tune=lora", "--policy.backbone.lora_rank=4", "--model.preset=debug", "--model.action_horizon=3",
        "--dataset.held_out_fraction=0", "--images.crop=32", "--training.batch_size=2", "--training.device=cpu", "--steps=1",
    ]  # fmt: skip
    assert cli(words) == 0
    assert "qwen3" in capsys.readouterr().out


@pytest.mark.parametrize("head", HEADS)
def test_every_head_makes_a_policy_of_a_backbone_with_grid_positions(backbones: Path, cache: Path, tmp_path: Path, head: str):
    config = settings(cache, tmp_path / "run", backbones / "qwen2_vl", "lora", steps=1)
    chunks = act(train_policy(replace(config, head=HeadConfig(type=head))), cache)
    assert all(np.isfinite(chunk.actions).all() for chunk in chunks)


def test_a_run_begins_with_a_policy_of_adapters_as_it_acted_and_leaves_one_that_needs_no_base(
    backbones: Path, cache: Path, tmp_path: Path
):
    config = settings(cache, tmp_path / "run", backbones / "llava", "lora")
    first = train_policy(config)
    still = replace(config.training, steps=1, learning_rate=1e-12)
    later = replace(config, policy=PolicyConfig(), start_from=first, training=still, output_dir=tmp_path / "later")
    second = train_policy(later)
    assert distance(act(first, cache), act(second, cache)) < 1e-4
    assets = load_policy(second).assets
    assert assets.base is None and assets.images.mean == load_policy(first).assets.images.mean
    assert assets.provenance["start_from"] == str(first) and assets.provenance["backbone"]["path"] == str(backbones / "llava")
    with pytest.raises(ValueError, match="Drop the other"):
        train_policy(replace(later, policy=config.policy))


def test_an_exported_policy_of_a_backbone_reads_the_backbones_prompt(backbones: Path, cache: Path, tmp_path: Path):
    """Tokenizer and template travel: on llava's, the words stand within a conversation."""
    policy = load_policy(train_policy(settings(cache, tmp_path / "run", backbones / "llava", "full")))
    (tmp_path / "onnx").mkdir()
    write_folder(policy, tmp_path / "onnx", "float32")
    exported = load_onnx_policy(tmp_path / "onnx")
    text = "Go to the bright side"
    assert policy.assets.model.prompt.template != "{instruction}"
    assert exported.text_tokenizer.encode(text) == policy.assets.text_tokenizer.encode(text)
    assert distance(policy.act(observations(cache)), exported.act(observations(cache))) < 1e-4
