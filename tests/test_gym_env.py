"""Suites through gymnasium: its checker passes, seeds are the starts that `vla eval` runs, layouts are what they say."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env

from sim.gym_env import LAYOUTS, RobotEnv
from sim.rollout import rollout
from sim.seeds import start
from sim.suites import SUITES
from tests.point_world import PointPolicy, build_point_world


def point_env(**options) -> RobotEnv:
    return RobotEnv("libero_object", **{"task": 1, "build": build_point_world, "max_steps": 30, **options})


@pytest.fixture(scope="module")
def lift():
    pytest.importorskip("robosuite")
    environment = gymnasium.make("sim.gym_env:robosuite_lift-v0", image_size=48, split="validation", render_mode="rgb_array")
    yield environment
    environment.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*(infinity|spec).*")  # positions have no bounds; this one was not made by its id
def test_gymnasiums_checker_passes_in_every_layout(layout):
    check_env(point_env(layout=layout, render_mode="rgb_array"))


@pytest.mark.check
@pytest.mark.filterwarnings("ignore:.*infinity.*")
def test_gymnasiums_checker_passes_on_the_real_lift(lift):
    check_env(lift.unwrapped)


def test_every_suite_is_registered():
    assert {f"{name}-v0" for name in SUITES} <= set(gymnasium.registry)


def test_lift_gives_what_its_world_observes_bit_for_bit(lift):
    """Start `seed` of the split, and after steps; the world is asked again for what the environment gave."""
    world = lift.unwrapped.world
    observation, info = lift.reset(seed=3)
    assert (info["start"], info["instruction"], info["is_success"]) == (3, "lift the red cube", False)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 7)).astype(np.float32)
    seen = [observation, *(lift.step(action)[0] for action in actions)]
    assert lift.render().shape == (256, 256, 3) and lift.metadata["render_fps"] == 20
    world.reset(0, start("validation", 3))
    for observation, action in zip(seen, [*actions, None], strict=True):
        expected = world.observe()
        for camera, image in expected.images.items():
            np.testing.assert_array_equal(observation["images"][camera], image)
        np.testing.assert_array_equal(observation["state"], expected.state)
        if action is not None:
            world.step(action)


@pytest.mark.parametrize("index", range(4))
def test_an_episode_is_the_rollout_of_the_same_start(index):
    """The same actions, the same length, the same outcome; truncated exactly at the step limit."""
    policy = PointPolicy(noise=0.0)
    begin = start("official", index)
    result = rollout(build_point_world("x"), policy, task=1, start=begin, max_steps=30, execution_horizon=4)
    environment = point_env(split="official")
    environment.reset(seed=index)
    for step, action in enumerate(result.actions, 1):
        _, reward, terminated, truncated, info = environment.step(action)
        ended = step == len(result.actions)
        assert terminated == (ended and result.success) == bool(reward) == info["is_success"]
        assert truncated == (ended and not result.success)
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(result.actions[0])


def test_without_a_seed_starts_are_drawn_and_repeat_under_the_generators_seed():
    environment, other = point_env(), point_env()
    environment.reset(seed=5), other.reset(seed=5)
    drawn = [environment.reset()[1]["start"] for _ in range(4)]
    assert len(set(drawn)) == 4 and drawn == [other.reset()[1]["start"] for _ in range(4)]
    assert environment.reset(options={"start": 7})[1]["start"] == 7


def test_layouts_hold_the_same_under_other_keys():
    plain, lerobot, openpi = (point_env(layout=layout).reset(seed=2)[0] for layout in LAYOUTS)
    renamed = point_env(layout="lerobot", camera_names={"base": "image", "wrist": "image2"}).reset(seed=2)[0]
    assert set(lerobot) == {"pixels", "agent_pos"} and set(renamed["pixels"]) == {"image", "image2"}
    assert set(openpi) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    for image in (lerobot["pixels"]["base"], renamed["pixels"]["image"], openpi["observation/image"]):
        np.testing.assert_array_equal(image, plain["images"]["base"])
    for state in (lerobot["agent_pos"], openpi["observation/state"]):
        np.testing.assert_array_equal(state, plain["state"])
    assert openpi["prompt"] == "reach ball 1" == point_env().task_description


def test_what_cannot_be_is_named():
    for wrong, text in (
        ({"layout": "rlds"}, "remask, lerobot, openpi"),
        ({"split": "test"}, "train, validation"),
        ({"render_mode": "human"}, "rgb_array"),
        ({"protocol": "oft"}, "openpi, lerobot"),
    ):
        with pytest.raises(ValueError, match=text):
            point_env(**wrong)
    environment = point_env()
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"\[H, 7\]"):
        environment.step(np.zeros(6, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        environment.step(np.full(7, np.nan, np.float32))


def test_environments_of_a_vector_do_not_disturb_each_other():
    vector = gymnasium.vector.SyncVectorEnv([point_env, point_env])
    observation, info = vector.reset(seed=[4, 9])
    for row, seed in enumerate((4, 9)):
        alone = point_env().reset(seed=seed)[0]
        np.testing.assert_array_equal(observation["images"]["base"][row], alone["images"]["base"])
    assert info["start"].tolist() == [4, 9]


@pytest.mark.libero
@pytest.mark.check
def test_a_libero_task_by_its_id():
    pytest.importorskip("libero")
    from sim.libero import find_assets

    if find_assets() is None:
        pytest.skip("no LIBERO assets on this machine (set REMASK_LIBERO_ASSETS)")
    environment = gymnasium.make("sim.gym_env:libero_object-v0", task=3, split="official")
    observation, info = environment.reset(seed=1)
    assert environment.observation_space.contains(observation) and info["task"] == 3
    again = environment.reset(seed=1)[0]
    np.testing.assert_array_equal(observation["images"]["wrist"], again["images"]["wrist"])
    environment.close()
