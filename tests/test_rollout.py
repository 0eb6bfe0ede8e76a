"""Laws of one rollout and of one demonstration, on a world without a simulator."""

import numpy as np
import pytest

from sim import demonstration
from sim.demonstration import record
from sim.rollout import chunk_seed, rollout
from sim.seeds import start
from tests.point_world import SPEC, PointPolicy, PointWorld, point_expert
from vla.interface import ActionChunk


class Recorder:
    camera, size = "base", 16

    def __init__(self) -> None:
        self.frames: list[np.ndarray] = []

    def add(self, frame: np.ndarray) -> None:
        self.frames.append(frame)


def run(environment: PointWorld, policy, *, index: int = 0, task: int = 0, max_steps: int = 40, k: int = 4, **more):
    begin = start("validation", index)
    return rollout(environment, policy, task=task, start=begin, max_steps=max_steps, execution_horizon=k, **more)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_cameras_are_rendered_only_when_a_chunk_is_due(k: int, index: int):
    environment = PointWorld()
    result = run(environment, PointPolicy(), index=index, k=k)
    assert environment.num_observations == result.chunks == -(-result.steps // k)
    assert environment.num_frames == 0


def test_a_video_shows_every_step_and_the_end_and_changes_nothing():
    recorder = Recorder()
    filmed = run(PointWorld(), PointPolicy(), video=recorder)
    unfilmed = run(PointWorld(), PointPolicy())
    assert len(recorder.frames) == filmed.steps + 1 and recorder.frames[0].shape == (16, 16, 3)
    np.testing.assert_array_equal(filmed.actions, unfilmed.actions)


def test_an_episode_ends_with_success_and_not_before():
    result = run(PointWorld(), PointPolicy(noise=0.0), max_steps=100)
    assert result.success and result.steps < 100
    replay = PointWorld()
    replay.reset(0, start("validation", 0))
    assert [replay.step(action) for action in result.actions] == [False] * (result.steps - 1) + [True]


def test_a_failure_takes_exactly_max_steps():
    result = run(PointWorld(), PointPolicy(), max_steps=5, k=4)
    assert not result.success and result.steps == 5 and result.chunks == 2


class PushedBall(PointWorld):
    """The ball drifts by 4 cm a step along x."""

    def step(self, action: np.ndarray) -> bool:
        self.ball = self.ball + [0.04, 0.0, 0.0]
        return False


def test_a_result_names_what_was_moved_and_how_far():
    assert run(PushedBall(), PointPolicy(), max_steps=6).moved == {"ball": 0.24}
    assert run(PushedBall(), PointPolicy(), max_steps=1).moved == {}, "4 cm is a nudge"
    assert run(PointWorld(), PointPolicy(), max_steps=6).moved == {}


def test_a_result_depends_on_task_and_start_only():
    environment, policy = PointWorld(), PointPolicy()
    first = run(environment, policy, index=3, task=1)
    run(environment, policy, index=4, task=2)
    again = run(environment, PointPolicy(), index=3, task=1)
    np.testing.assert_array_equal(first.actions, again.actions)
    assert not np.array_equal(first.actions[0], run(environment, policy, index=4, task=1).actions[0])


def test_every_chunk_of_every_episode_has_its_own_seed():
    episodes = [(task, start(split, index)) for task in (0, 1) for split in ("train", "official") for index in range(5)]
    seeds = {chunk_seed(task, begin, chunk) for task, begin in episodes for chunk in range(5)}
    assert len(seeds) == 5 * len(episodes)
    policy = PointPolicy()
    run(PointWorld(), policy, index=3, task=1)
    assert policy.seeds == [chunk_seed(1, start("validation", 3), chunk) for chunk in range(len(policy.seeds))]


def test_known_actions_are_executed_as_promised():
    """With num_known, the first actions of a chunk are those that the last chunk had promised."""
    promised: list[np.ndarray] = []

    class Recording(PointPolicy):
        def act(self, observations, *, known=None, seeds=None):
            chunks = super().act(observations, known=known, seeds=seeds)
            promised.append(chunks[0].actions.copy())
            return chunks

    result = run(PointWorld(), Recording(), max_steps=12, k=2, num_known=2)
    for number in range(1, result.chunks):
        np.testing.assert_array_equal(promised[number][:2], promised[number - 1][2:4])


@pytest.mark.parametrize(
    ("actions", "words"),
    [(np.zeros((2, 7)), "Lower execution_horizon"), (np.zeros((4, 6)), "takes"), (np.full((4, 7), np.nan), "NaN")],
)
def test_a_chunk_that_cannot_be_executed_is_an_error(actions: np.ndarray, words: str):
    class Wrong(PointPolicy):
        def act(self, observations, *, known=None, seeds=None):
            return [ActionChunk(actions.astype(np.float32))]

    with pytest.raises(ValueError, match=words):
        run(PointWorld(), Wrong())


def test_jerk_is_zero_of_constant_motion_and_known_of_a_cubic():
    result = run(PointWorld(), PointPolicy(noise=0.0), max_steps=4)
    assert result.jerk == 0.0
    cubic = np.arange(10.0)[:, None] ** 3 * np.ones(7)
    object.__setattr__(result, "actions", cubic.astype(np.float32))
    assert result.jerk == pytest.approx(36.0)  # third difference of n^3 is 6


def test_demonstration_labels_are_clean_whatever_is_executed():
    expert, begin = point_expert(PointWorld(), 0), start("train", 0)
    environment = PointWorld()
    noisy = record(environment, expert, task=0, start=begin, max_steps=60, noise=0.3)
    towards = np.clip((environment.ball - noisy.state[:, :3]) / 0.1, -1, 1)
    np.testing.assert_allclose(noisy.action[:, :3], towards, atol=1e-5)
    clean = record(PointWorld(), expert, task=0, start=begin, max_steps=60)
    assert not np.array_equal(noisy.state[:5], clean.state[:5])
    np.testing.assert_array_equal(np.diff(noisy.action[:, 6]), 0)


def test_a_demonstration_is_rendered_every_step_and_ends_with_success():
    environment = PointWorld()
    episode = record(environment, point_expert(environment, 0), task=0, start=start("train", 1), max_steps=60)
    assert episode.success and environment.num_observations == len(episode.action) == len(episode.state)
    assert {name: frames.shape for name, frames in episode.images.items()} == {
        name: (len(episode.action), 8, 8, 3) for name in SPEC.cameras
    }


def test_save_and_load_are_inverse(tmp_path):
    environment = PointWorld()
    episode = record(environment, point_expert(environment, 1), task=1, start=start("train", 7), max_steps=60)
    path = demonstration.staged_path(tmp_path, 1, 7)
    demonstration.save(episode, path)
    back = demonstration.load(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    for name in ("instruction", "task", "start", "success"):
        assert getattr(back, name) == getattr(episode, name)
    for name in ("state", "action"):
        np.testing.assert_array_equal(getattr(back, name), getattr(episode, name))
    for name, frames in episode.images.items():
        np.testing.assert_array_equal(back.images[name], frames)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    environment = PointWorld()
    episode = record(environment, point_expert(environment, 0), task=0, start=start("train", 0), max_steps=60)

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        demonstration.save(episode, tmp_path / "episode.npz")
    assert not list(tmp_path.iterdir())
