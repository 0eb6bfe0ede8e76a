"""LeRobot trains, resumes, saves and evaluates our policy by its own programs; the same weights act the same through both."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

import gymnasium
from lerobot.configs.policies import PreTrainedConfig
from lerobot.envs.factory import make_env
from lerobot.envs.utils import add_envs_task, preprocess_observation
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from multimodal.images import ImageConfig
from sim.gym_env import RobotEnv
from sim.lerobot_plugin.env_config import RemaskEnvConfig
from sim.rollout import rollout
from sim.seeds import start
from sim.suites import build_environment
from tests.point_world import PointWorld
from tests.reaching import SPEC, write_cache
from vla.action_head import HeadConfig
from vla.cli import main as cli
from vla.data import ActionWindows, WindowMixture
from vla.episodes import Episode
from vla.frame_cache import FrameCache, FrameCacheWriter
from vla.interface import Observation
from vla.lerobot_plugin.convert import from_lerobot, to_lerobot
from vla.lerobot_plugin.modeling_discrete_diffusion import DiscreteDiffusionPolicy
from vla.lerobot_writer import write_dataset
from vla.policy import PolicyAssets, load_policy
from vla.policy_loss import Collator
from vla.train import ModelConfig, TrainConfig, build_assets

HORIZON = 4
IMAGES = ImageConfig(crop=32)


def fresh_policy_folder(cache: Path, folder: Path, **decode) -> Path:
    """A checkpoint of ours with random weights, which have nothing in common that could hide a difference."""
    from vla.model import VLA

    config = TrainConfig(
        model=ModelConfig(preset="debug", action_horizon=HORIZON, num_bins=31), head=HeadConfig(mask_draws=2), images=IMAGES
    )
    mixture = WindowMixture([ActionWindows(FrameCache.open(cache), HORIZON)])
    assets = build_assets(config, mixture)
    assets = replace(assets, decode=replace(assets.decode, **decode))
    torch.manual_seed(1)
    model = VLA(assets.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assets.save(folder, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture(scope="module")
def ours(cache, tmp_path_factory) -> Path:
    return fresh_policy_folder(cache, tmp_path_factory.mktemp("ours") / "policy")


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory) -> Path:
    return to_lerobot(ours, tmp_path_factory.mktemp("theirs") / "policy", n_action_steps=3)


def observations(cache: Path, count: int) -> list[Observation]:
    frames = FrameCache.open(cache)
    return [
        Observation({camera: np.array(frames.images[camera][i]) for camera in SPEC.cameras}, frames.state[i], "Go to it")
        for i in range(0, 9 * count, 9)
    ]


def lerobot_batch(items: list[Observation]) -> dict:
    """What lerobot-eval hands a policy: its own preprocess_observation over a vector environment's arrays, and the task."""
    pixels = {camera: np.stack([item.images[camera] for item in items]) for camera in items[0].images}
    batch = preprocess_observation({"pixels": pixels, "agent_pos": np.stack([item.state for item in items])})
    return batch | {"task": [item.instruction for item in items]}


def loaded(folder: Path):
    """Policy, preprocessor, postprocessor as lerobot-eval makes them."""
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, str(folder))


def test_the_same_observation_gives_the_same_actions_bit_for_bit(ours, theirs, cache):
    """Also in a batch; and the queue plays n_action_steps of each chunk before it asks again."""
    policy, before, after = loaded(theirs)
    for count in (1, 3):
        items = observations(cache, 2 * count)
        policy.reset()
        played = []
        for step in range(6):
            batch = before(lerobot_batch(items[:count] if step < 3 else items[count:]))
            played.append(after(policy.select_action(batch)).numpy())
        expected = load_policy(ours).act(items[:count]), load_policy(ours).act(items[count:])
        for row in range(count):
            chunks = np.concatenate([part[row].actions[:3] for part in expected])
            np.testing.assert_array_equal(np.stack(played)[:, row], chunks)


def test_a_chunk_goes_on_with_the_tail_of_the_last(theirs, cache):
    policy, before, _ = loaded(theirs)
    policy.config.num_known = 1
    batch = before(lerobot_batch(observations(cache, 1)))
    chunk = policy.predict_action_chunk(batch)[0]
    for step in range(3):
        torch.testing.assert_close(policy.select_action(batch)[0], chunk[step], rtol=0, atol=0)
    torch.testing.assert_close(policy.select_action(batch)[0], chunk[3], rtol=0, atol=0)
    policy.reset()
    torch.testing.assert_close(policy.select_action(batch)[0], chunk[0], rtol=0, atol=0)


class Ball(PointWorld):
    """The point world as the robot that `observations` are about, with pictures large enough for the tower."""

    def __init__(self) -> None:
        super().__init__(image_size=36)
        self.assets = "none"


def build_ball(suite: str, *, image_size: int | None = None, protocol: str = "openpi") -> Ball:
    return Ball()


def test_a_closed_loop_is_the_rollout_of_vla_eval_step_for_step(tmp_path):
    """lerobot-eval's own loop, environments of a vector, seeds as starts; every action equal, bit for bit."""
    from lerobot.scripts.lerobot_eval import rollout as lerobot_rollout

    world, random = Ball(), np.random.default_rng(0)
    with FrameCacheWriter(tmp_path / "cache", world.spec) as writer:
        images = {camera: random.integers(0, 255, (9, 36, 36, 3), dtype=np.uint8) for camera in world.spec.cameras}
        action = np.concatenate([random.uniform(-1, 1, (9, 6)), np.where(np.arange(9) > 4, 1, -1)[:, None]], 1)
        writer.add_episode(images, random.normal(size=(9, 3)), action, instruction="reach ball 1", task=1)
    folder = fresh_policy_folder(tmp_path / "cache", tmp_path / "policy")
    policy, before, after = loaded(to_lerobot(folder, tmp_path / "lerobot"))
    options = {"split": "validation", "max_steps": 11, "layout": "lerobot", "build": build_ball}
    make = lambda: RobotEnv("libero_object", 1, **options)  # noqa: E731
    vector = gymnasium.vector.SyncVectorEnv([make], autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    for seed in (0, 1):
        played = lerobot_rollout(vector, policy, lambda x: x, lambda x: x, before, after, seeds=[seed])
        begin = start("validation", seed)
        expected = rollout(
            Ball(), load_policy(folder), task=1, start=begin, max_steps=11, execution_horizon=HORIZON
        )
        np.testing.assert_array_equal(played["action"][0].numpy(), expected.actions)
        assert bool(played["success"].any()) == expected.success


def test_a_lerobot_folder_is_a_checkpoint_of_ours_and_comes_back_as_one(ours, theirs, tmp_path):
    back = from_lerobot(theirs, tmp_path / "back")
    same = ("model.safetensors", "config.yaml", "schema.json", "statistics.json", "action_tokenizer.json", "tokenizer.json")
    for name in same:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes() == (back / name).read_bytes(), name
    assert {path.name for path in back.iterdir()} == {path.name for path in ours.iterdir()}
    assert PolicyAssets.load(theirs)[0].decode == PolicyAssets.load(ours)[0].decode
    with pytest.raises(FileExistsError, match="new folder"):
        to_lerobot(ours, theirs)
    with pytest.raises(ValueError, match="no config.json.*lerobot-train"):
        from_lerobot(ours, tmp_path / "other")


def test_saving_keeps_other_files_and_loading_gives_every_weight_back(theirs, tmp_path):
    policy, *_ = loaded(theirs)
    (tmp_path / "notes.txt").write_text("mine")
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").exists() and not list(tmp_path.glob(".saving-*"))
    again = DiscreteDiffusionPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config and not again.training
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_loss_is_that_of_vla_train(theirs, cache):
    policy, *_ = loaded(theirs)
    policy.train()
    windows = ActionWindows(FrameCache.open(cache), HORIZON)
    batch = windows.gather(np.array([0, 8, 25]))  # the second reaches past its episode's end
    assert batch.is_pad.any()
    pictures = torch.as_tensor(batch.images).permute(1, 0, 4, 2, 3) / 255  # [C, B, 3, H, W]
    given = {f"observation.images.{camera}": frames for camera, frames in zip(SPEC.cameras, pictures, strict=True)}
    given |= {"observation.state": torch.as_tensor(batch.state), "action": torch.as_tensor(batch.actions)}
    given |= {"action_is_pad": torch.as_tensor(batch.is_pad), "task": list(batch.instructions)}
    torch.manual_seed(3)
    loss, logged = policy.forward(given)
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    terms = policy._loss_step(policy.model, Collator(policy.assets)(batch), generator)
    torch.testing.assert_close(loss, terms.loss_sum / terms.normalizer, rtol=0, atol=0)
    assert logged["loss"] == loss.item()
    with pytest.raises(ValueError, match="use_rabc"):
        policy.forward(given, reduction="none")


def test_what_does_not_fit_is_named_with_the_next_move(theirs, cache, tmp_path):
    policy, before, _ = loaded(theirs)
    (item,) = observations(cache, 1)
    renamed = replace(item, images={"front": item.images["base"], "wrist": item.images["wrist"]})
    with pytest.raises(ValueError, match=r"lacks observation.images.base.*observation.images.front.*--rename_map"):
        policy.select_action(before(lerobot_batch([renamed])))
    small = replace(item, images={camera: image[:32, :32] for camera, image in item.images.items()})
    with pytest.raises(ValueError, match=r"\[3, 32, 32\].*\[3, 36, 36\].*--env.image_size=36"):
        policy.select_action(before(lerobot_batch([small])))
    policy.config.fit_images = True
    assert policy.select_action(before(lerobot_batch([small]))).shape == (1, 3)
    config = PreTrainedConfig.from_pretrained(theirs)
    with pytest.raises(ValueError, match="--policy.path"):
        DiscreteDiffusionPolicy(config)
    with pytest.raises(ValueError, match="head 'discrete_diffusion'"):
        DiscreteDiffusionPolicy.from_pretrained(theirs, config=replace(config, head=HeadConfig(type="l1")))
    with pytest.raises(ValueError, match="allowed: 1 to chunk_size 4"):
        replace(config, n_action_steps=5)
    shutil.copytree(theirs, tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="damaged"):
        DiscreteDiffusionPolicy.from_pretrained(tmp_path / "cut")


def test_lerobots_factory_makes_our_environments(monkeypatch):
    """Two in a vector, with the instruction where lerobot looks for it and observations under a policy's feature names."""
    monkeypatch.setitem(RobotEnv.__init__.__kwdefaults__, "build", build_ball)
    config = RemaskEnvConfig(task="libero_object", task_id=2, image_size=36, max_steps=3, camera_names={"wrist": "image2"})
    features = {config.features_map[key]: feature.shape for key, feature in config.features.items()}
    vector = make_env(config, n_envs=2)["remask"][0]
    observation, _ = vector.reset(seed=[0, 1])
    batch = add_envs_task(vector, preprocess_observation(observation))
    assert batch["task"] == ["reach ball 2", "reach ball 2"] and vector.call("_max_episode_steps") == (3, 3)
    assert batch["observation.images.image2"].shape == (2, 3, 36, 36) and features["observation.images.image2"] == (36, 36, 3)
    assert {key for key in batch if key.startswith("observation")} == {key for key in features if key != "action"}
    for _ in range(3):
        *_, info = vector.step(np.zeros((2, 7), np.float32))
    assert info["final_info"]["is_success"].tolist() == [False, False]
    with pytest.raises(ValueError, match="libero_object"):
        RemaskEnvConfig(task="libero_objects")


@pytest.fixture
def lerobot_train(monkeypatch, tmp_path):
    """lerobot-train's main in this process, as the command line calls it; logging and accelerate are put back."""
    import datasets.config
    from accelerate.state import AcceleratorState
    from lerobot.scripts import lerobot_train

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level

    def run(*arguments: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["lerobot-train", "--policy.discover_packages_path=vla.lerobot_plugin", *arguments])
        lerobot_train.main()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def test_lerobot_trains_resumes_and_fine_tunes_and_vla_runs_the_result(lerobot_train, cache, tmp_path):
    """On a data set of ours without its side file, so that all it knows are LeRobot's features."""
    frames = FrameCache.open(cache)
    parts = [slice(a, b) for a, b in zip(frames.episode_starts, frames.episode_starts[1:])]
    episodes = [
        Episode({c: frames.images[c][p] for c in SPEC.cameras}, frames.state[p], frames.action[p], "go there", 0)
        for p in parts
    ]
    root, run = tmp_path / "dataset", tmp_path / "run"
    write_dataset(root, SPEC, episodes)
    (root / "meta" / "remask.json").unlink()
    data = [f"--dataset.root={root}", "--dataset.repo_id=me/mine", "--batch_size=4", "--num_workers=0", "--save_freq=2"]
    shape = ["--policy.preset=debug", "--policy.chunk_size=4", "--policy.n_action_steps=4", "--policy.images.crop=32"]
    fresh = ["--policy.type=discrete_diffusion", "--policy.device=cpu", *shape]
    lerobot_train(*fresh, *data, "--steps=2", f"--output_dir={run}")
    last = run / "checkpoints" / "last"
    lerobot_train(f"--config_path={last}/pretrained_model/train_config.json", "--resume=true", "--steps=4")
    assert json.loads((last / "training_state" / "training_step.json").read_text()) == {"step": 4}
    assets, _ = PolicyAssets.load(last / "pretrained_model")
    assert replace(assets.spec, name=SPEC.name) == SPEC  # the gripper too was found in the data
    np.testing.assert_array_equal(assets.statistics.q99, np.quantile(frames.state.astype(np.float64), 0.99, axis=0))
    tuned = tmp_path / "tuned"
    more = [f"--policy.path={last}/pretrained_model", "--policy.decode.rounds=2", "--policy.push_to_hub=false"]
    lerobot_train(*more, *data, "--steps=1", f"--output_dir={tuned}")
    folder = tuned / "checkpoints" / "last" / "pretrained_model"
    (item,) = observations(cache, 1)
    item = replace(item, instruction="go there")
    (chunk,) = load_policy(folder).act([item])
    assert chunk.info["rounds"] <= 2 and PolicyAssets.load(folder)[0].decode.rounds == 2
    policy, before, _ = loaded(folder)
    np.testing.assert_array_equal(policy.predict_action_chunk(before(lerobot_batch([item])))[0].numpy(), chunk.actions)


def test_the_verb_converts_both_ways(ours, tmp_path, capsys):
    assert cli(["convert", f"--source={ours}", f"--output_dir={tmp_path / 'there'}"]) == 0
    assert "lerobot-eval --policy.path=" in capsys.readouterr().out
    assert cli(["convert", f"--source={tmp_path / 'there'}", f"--output_dir={tmp_path / 'back'}", "--to=remask"]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert cli(["convert", f"--source={tmp_path}", f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "No checkpoint at" in capsys.readouterr().err


@pytest.mark.check
def test_a_closed_loop_on_lift_is_the_rollout_of_vla_eval_step_for_step(tmp_path):
    """As above on the real simulator, two starts; lerobot's environment renders every step, `vla eval` only per chunk."""
    pytest.importorskip("robosuite")
    from lerobot.scripts.lerobot_eval import rollout as lerobot_rollout

    world = build_environment("robosuite_lift", image_size=48)
    random, spec = np.random.default_rng(0), world.spec
    with FrameCacheWriter(tmp_path / "cache", spec) as writer:
        images = {camera: random.integers(0, 255, (9, 48, 48, 3), dtype=np.uint8) for camera in spec.cameras}
        action = np.concatenate([random.uniform(-1, 1, (9, 6)), np.where(np.arange(9) > 4, 1, -1)[:, None]], 1)
        writer.add_episode(images, random.normal(size=(9, 8)), action, instruction="lift the red cube", task=0)
    folder = fresh_policy_folder(tmp_path / "cache", tmp_path / "policy")
    policy, before, after = loaded(to_lerobot(folder, tmp_path / "lerobot", n_action_steps=3))
    vector = make_env(RemaskEnvConfig(task="robosuite_lift", image_size=48, max_steps=20), n_envs=1)["remask"][0]
    for seed in (0, 1):
        played = lerobot_rollout(vector, policy, lambda x: x, lambda x: x, before, after, seeds=[seed])
        begin = start("validation", seed)
        expected = rollout(world, load_policy(folder), task=0, start=begin, max_steps=20, execution_horizon=3)
        np.testing.assert_array_equal(played["action"][0].numpy(), expected.actions)
    vector.close()
    world.close()
