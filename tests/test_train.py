"""`vla train`: resume equals the uninterrupted run, a checkpoint alone makes the policy, mistakes are named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device

from multimodal.checkpoint import checkpoint_hash, load_checkpoint
from multimodal.config import get_preset
from multimodal.images import ImageConfig
from multimodal.losses import build_objective
from multimodal.tokenizer import train_tokenizer
from multimodal.training import TrainingConfig
from multimodal.training_log import read_log
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import VLMAssets
import vla.policy
from tests.reaching import SPEC, write_cache
from vla.cli import main as cli
from vla.action_head import HeadConfig
from vla.backbone import BackboneConfig
from vla.data import ActionWindows, WindowMixture
from vla.frame_cache import FrameCache, FrameCacheWriter
from vla.heads import HEADS
from vla.held_out import held_out_loss
from vla.interface import Observation
from vla.model import VLA
from vla.policy import load_policy
from vla.policy_loss import Collator, PolicyLoss
from vla.train import (
    DatasetConfig,
    ModelConfig,
    PolicyConfig,
    TrainConfig,
    build_assets,
    finished_policy,
    open_windows,
    train_policy,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache")


def settings(cache: Path, run: Path, **training) -> TrainConfig:
    return TrainConfig(
        dataset=DatasetConfig(root=cache, held_out_fraction=0.25),
        model=ModelConfig(preset="debug", action_horizon=4, num_bins=31),
        head=HeadConfig(mask_draws=2),
        images=ImageConfig(crop=32),
        training=TrainingConfig(**{"steps": 4, "batch_size": 6, "device": "cpu", "warmup_steps": 2} | training),
        output_dir=run,
    )


def observations(cache: Path, count: int) -> list[Observation]:
    frames = FrameCache.open(cache)
    return [
        Observation(
            {camera: np.array(frames.images[camera][7 * index]) for camera in SPEC.cameras},
            np.array(frames.state[7 * index]),
            "Go to the bright side",
        )
        for index in range(count)
    ]


def test_two_steps_and_a_resume_equal_four_steps_straight(cache, tmp_path):
    straight = train_policy(settings(cache, tmp_path / "straight", save_every=2))
    config = settings(cache, tmp_path / "halves", save_every=2)
    train_policy(config)
    for name in ("last", "000004"):  # as if it had been killed after step 2
        path = tmp_path / "halves" / "checkpoints" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    (tmp_path / "halves" / "checkpoints" / "last").symlink_to("000002")
    resumed = train_policy(replace(config, resume=True))
    first, second = load_checkpoint(straight).state, load_checkpoint(resumed).state
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert finished_policy(config) == resumed


def test_a_run_is_not_resumed_on_other_data(tmp_path):
    root = write_cache(tmp_path / "data")
    config = settings(root, tmp_path / "run", steps=1)
    train_policy(config)
    actions = np.load(root / "action.npy")
    np.save(root / "action.npy", 5 * actions)
    with pytest.raises(ValueError, match="other data.*action ranges"):
        train_policy(replace(config, resume=True))
    np.save(root / "action.npy", actions)
    np.save(root / "state.npy", 5 * np.load(root / "state.npy"))
    with pytest.raises(ValueError, match="other data.*state ranges"):
        train_policy(replace(config, resume=True))
    write_cache(root, episodes=12)
    with pytest.raises(ValueError, match="other data.*number of frames"):
        train_policy(replace(config, resume=True))


def test_a_run_that_begins_with_a_policy_has_its_horizon(trained, cache, tmp_path):
    """Else targets of other lengths meet its slots: an error from within torch, or half a chunk that nobody trains."""
    config = replace(settings(cache, tmp_path), start_from=trained, model=ModelConfig(preset="debug", action_horizon=8, num_bins=31))
    with pytest.raises(ValueError, match="chunks of 4 steps, this run asks for 8: give --model.action_horizon=4"):
        train_policy(config)


def test_settings_of_a_backbone_that_is_not_named_are_refused(trained, cache, tmp_path):
    config = replace(settings(cache, tmp_path), policy=PolicyConfig(BackboneConfig(tune="frozen")))
    for start_from in (None, trained):
        with pytest.raises(ValueError, match="settings but no path"):
            train_policy(replace(config, start_from=start_from))


def test_any_number_of_words_is_trained_on(tmp_path):
    words = [" ".join(f"word{100 * episode + index}" for index in range(100)) for episode in range(12)]
    frames = np.zeros((2, SPEC.image_size, SPEC.image_size, 3), dtype=np.uint8)
    with FrameCacheWriter(tmp_path / "cache", SPEC) as writer:
        for text in words:
            vectors = np.zeros((2, 3), dtype=np.float32)
            writer.add_episode({camera: frames for camera in SPEC.cameras}, vectors, vectors, instruction=text, task=0)
    config = settings(tmp_path / "cache", tmp_path / "run")
    assets = build_assets(config, WindowMixture(open_windows(config, held_out=False)))
    assert assets.model.vlm.vocab_size == 3 + 100 * sum(source.num_episodes for source in open_windows(config, held_out=False))


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_one_window_always_has_something_to_learn(head, trained, cache):
    """At an episode's end the known beginning could be all there is: a loss of 0 / 0, and a run that dies of it."""
    assets = replace(load_policy(trained).assets, head=HeadConfig(type=head, known_prefix=1.0, max_known_steps=3))
    if HEADS[head].slots != "tokens":
        assets = replace(assets, model=replace(assets.model, slots=HEADS[head].slots))
    model, loss = VLA(assets.model), PolicyLoss(assets, build_objective({"type": "cross_entropy"}))
    windows = ActionWindows(FrameCache.open(cache), 4)
    batch = Collator(assets)(windows.gather(np.array([FrameCache.open(cache).episode_starts[1] - 1])))
    assert batch.target.is_pad[0].tolist() == [False, True, True, True]
    for seed in range(10):
        assert loss(model, batch, torch.Generator().manual_seed(seed)).normalizer > 0


def test_weights_and_hash_are_of_one_checkpoint_though_last_moves_on(trained, tmp_path, monkeypatch):
    for name in ("000001", "000002"):
        shutil.copytree(trained, tmp_path / name / "policy")
    other = json.loads((tmp_path / "000002" / "policy" / "provenance.json").read_text()) | {"seed": 99}
    (tmp_path / "000002" / "policy" / "provenance.json").write_text(json.dumps(other))
    last, load_model = tmp_path / "last", vla.policy.load_model
    last.symlink_to("000001")

    def slow(*given):
        last.unlink()
        last.symlink_to("000002")
        return load_model(*given)

    monkeypatch.setattr(vla.policy, "load_model", slow)
    assert load_policy(last / "policy").content_hash == checkpoint_hash(tmp_path / "000001" / "policy")


def test_a_device_that_is_not_there_is_said_before_weights_are_read(trained):
    with pytest.raises(ValueError, match="device 'abacus' cannot be used: .*Without a GPU: cpu"):
        load_policy(trained, device="abacus")


def test_the_words_are_those_of_the_chosen_tasks(tmp_path):
    frames = np.zeros((4, SPEC.image_size, SPEC.image_size, 3), dtype=np.uint8)
    with FrameCacheWriter(tmp_path / "cache", SPEC) as writer:
        for task, text in enumerate(("go left", "stay exactly where you happen to be standing now")):
            vectors = np.zeros((4, 3), dtype=np.float32)
            writer.add_episode({camera: frames for camera in SPEC.cameras}, vectors, vectors, instruction=text, task=task)
    config = settings(tmp_path / "cache", tmp_path / "run")
    config = replace(config, dataset=DatasetConfig(root=tmp_path / "cache", tasks=[0], held_out_fraction=0.0))
    assets = build_assets(config, WindowMixture(open_windows(config, held_out=False)))
    assert "left" in assets.text_tokenizer.vocabulary and "stay" not in assets.text_tokenizer.vocabulary
    assert assets.model.text_length == 3 + config.model.text_slack


def test_a_batch_goes_whole_to_the_trainers_device(trained, cache):
    windows = ActionWindows(FrameCache.open(cache), 4)
    batch = send_to_device(Collator(load_policy(trained).assets)(windows.gather(np.arange(2))), torch.device("meta"))
    tensors = [batch.images, batch.state, batch.text_ids, batch.text_mask, *batch.target]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_held_out_loss_is_the_training_loss_without_augmentation_and_of_one_draw_of_masks(trained, cache):
    policy = load_policy(trained)
    loss = PolicyLoss(policy.assets, build_objective({"type": "cross_entropy"}))
    windows = WindowMixture([ActionWindows(FrameCache.open(cache), 4)])
    found = held_out_loss(policy, loss, windows, count=8)
    assert found == held_out_loss(policy, loss, windows, count=8)
    batch = Collator(policy.assets)(windows.gather(np.linspace(0, len(windows) - 1, 8).astype(int)))
    plain = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    terms = [loss(policy.model, batch, plain[i], augment=augment) for i, augment in ((0, False), (1, True), (2, False))]
    means = [float(each.loss_sum.detach() / each.normalizer) for each in terms]
    assert found == pytest.approx(means[0], rel=1e-6) and means[0] != means[1] and means[0] != means[2]


def test_data_sets_too_small_to_hold_an_episode_out_are_trained_on_alone_and_beside_others(cache, tmp_path):
    """As `vla dagger` does: a round may have no held-out episode; the error is then that of the data sets that have."""
    roots = [write_cache(tmp_path / name, episodes=count) for name, count in (("many", 10), ("few", 2))]
    config = settings(cache, tmp_path / "run")
    train_policy(replace(config, dataset=DatasetConfig(root=roots, held_out_fraction=0.1)))
    assert {"validation/action_error", "validation/loss"} <= set(read_log(tmp_path / "run")[-1])
    train_policy(replace(config, dataset=DatasetConfig(root=roots[1], held_out_fraction=0.1), output_dir=tmp_path / "alone"))
    assert "validation/action_error" not in read_log(tmp_path / "alone")[-1]


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    config = settings(cache, tmp_path_factory.mktemp("run"), steps=120, batch_size=16, learning_rate=3e-3, ema_decay=0.9)
    return train_policy(config)


def test_the_policy_learns_to_look(trained, cache):
    """Left or right can only be read off the picture; chance is half of the episodes."""
    chunks = load_policy(trained).act(observations(cache, 10))
    sides = [np.sign(chunk.actions[0, 0]) for chunk in chunks]
    bright = [np.sign(o.images["base"][:, 18:].mean() - o.images["base"][:, :18].mean()) for o in observations(cache, 10)]
    assert sides == bright


def test_a_chunk_does_not_depend_on_its_batch_mates(trained, cache):
    policy = load_policy(trained, decode={"token_temperature": 1.0, "rounds": 3})
    seeds = list(range(5))
    together = policy.act(observations(cache, 5), seeds=seeds)
    for index, observation in enumerate(observations(cache, 5)):
        (alone,) = policy.act([observation], seeds=[seeds[index]])
        np.testing.assert_allclose(alone.actions, together[index].actions, atol=1e-4)


def test_known_actions_begin_the_chunk_unchanged(trained, cache):
    known = np.array([[0.123, -0.05, 1.0], [0.4, 0.02, -1.0]], dtype=np.float32)
    chunk, free = load_policy(trained).act(observations(cache, 2), known=[known, None])
    assert np.array_equal(chunk.actions[:2], known) and (chunk.info["confidence"][:2] == 1).all()
    assert chunk.actions.shape == (4, 3) and set(np.unique(free.actions[:, 2])) <= {-1.0, 1.0}


def test_a_missing_camera_is_named_with_those_of_the_checkpoint(trained, cache):
    (observation,) = observations(cache, 1)
    renamed = replace(observation, images={"front": observation.images["base"]})
    with pytest.raises(ValueError, match=r"'base'.*\['front'\].*\['base', 'wrist'\]"):
        load_policy(trained).act([renamed])


@pytest.mark.parametrize("head", HEADS)
def test_every_head_makes_a_policy(head, cache, tmp_path):
    config = settings(cache, tmp_path, steps=1)
    policy = load_policy(train_policy(replace(config, head=HeadConfig(type=head))))
    (chunk,) = policy.act(observations(cache, 1))
    assert np.isfinite(chunk.actions).all()


def test_a_run_begins_with_the_weights_and_scales_of_the_policy_it_is_given(trained, cache, tmp_path):
    config = replace(settings(cache, tmp_path, steps=1), start_from=trained)
    still = replace(config, training=replace(config.training, learning_rate=1e-12, ema_decay=0.0))
    begun, before = load_policy(train_policy(still)), load_policy(trained)
    assert begun.assets.statistics.to_json() == before.assets.statistics.to_json()
    for chunk, expected in zip(begun.act(observations(cache, 3)), before.act(observations(cache, 3)), strict=True):
        np.testing.assert_allclose(chunk.actions, expected.actions, atol=1e-3)  # running means of the tower move
    with pytest.raises(ValueError, match="different weights"):
        train_policy(replace(config, head=HeadConfig(type="l1"), output_dir=tmp_path / "other"))


def test_a_run_begins_on_a_vision_language_model(cache, tmp_path):
    """Its weights, words and shapes become the policy's backbone, and are still there, module by module, after training."""
    vlm_folder, images = tmp_path / "vlm", ImageConfig(crop=32)
    words = train_tokenizer(["Go to the bright side", "what stands left of the lamp?"])
    preset = get_preset("debug")
    assets = VLMAssets(replace(preset, vocab_size=words.vocab_size), words, images, SPEC.cameras, SPEC.image_size)
    torch.manual_seed(5)
    vlm = VLM(assets.config)
    assets.save(vlm_folder, vlm.state_dict())
    config = replace(settings(cache, tmp_path / "run", steps=1, learning_rate=1e-12, ema_decay=0.0), start_from=vlm_folder)
    begun = load_policy(train_policy(config))
    for name, weight in vlm.named_parameters():
        torch.testing.assert_close(begun.model.vlm.get_parameter(name), weight, atol=1e-6, rtol=0)
    assert begun.assets.text_tokenizer.to_json() == words.to_json() and begun.assets.provenance["start_from"] == str(vlm_folder)
    with pytest.raises(ValueError, match="--images.size=32"):
        train_policy(replace(config, images=ImageConfig(crop=30), output_dir=tmp_path / "other"))


def test_a_missing_data_set_is_one_line_that_names_the_command(tmp_path, capsys):
    assert cli(["train", f"--dataset.root={tmp_path / 'nothing'}", f"--output_dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "vla collect" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_policy_of_another_format_is_refused(trained, tmp_path):
    copy = tmp_path / "policy"
    shutil.copytree(trained, copy)
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("remask-policy-1", "remask-policy-0"))
    with pytest.raises(ValueError, match="remask-policy-0"):
        load_policy(copy)
