"""Laws of the frame cache and its batches: bit-exact storage, windows inside episodes, order from (seed, step) alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vla.data import ActionWindows, WindowMixture, is_held_out
from vla.frame_cache import FrameCache, FrameCacheWriter
from vla.interface import RobotSpec
from vla.stored_images import STORAGES

SPEC = RobotSpec("toy", ("base", "wrist"), 8, ("x", "y"), ("dx", "grip"), (1,), 20.0)
LENGTHS = (5, 1, 9, 4)
H = 4


def episode(number: int, length: int) -> dict:
    """action[t] = (t, number) and every pixel holds t, so that a window shows where it comes from."""
    steps = np.arange(length)
    frames = np.broadcast_to(steps.astype(np.uint8)[:, None, None, None], (length, 8, 8, 3))
    vectors = np.stack([steps, np.full(length, number)], axis=-1).astype(np.float32)
    return {"images": {"base": frames, "wrist": frames + np.uint8(100)}, "state": vectors, "action": vectors}


def write(root, lengths=LENGTHS, offset=0) -> FrameCache:
    with FrameCacheWriter(root, SPEC, source="test") as writer:
        for number, length in enumerate(lengths):
            writer.add_episode(**episode(number + offset, length), instruction=f"do {number % 2}", task=number % 2)
    return FrameCache.open(root)


@pytest.fixture
def cache(tmp_path) -> FrameCache:
    return write(tmp_path / "cache")


def equal(a, b) -> bool:
    arrays = ("images", "state", "actions", "is_pad")
    return a.instructions == b.instructions and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


# ----------------------------------------------------------------------------------------------------------------- cache


def test_frames_are_read_as_written(cache):
    start = 0
    for number, length in enumerate(LENGTHS):
        expected, part = episode(number, length), slice(start, start + length)
        np.testing.assert_array_equal(cache.images["base"][part], expected["images"]["base"])
        np.testing.assert_array_equal(cache.images["wrist"][part], expected["images"]["wrist"])
        np.testing.assert_array_equal(cache.state[part], expected["state"])
        np.testing.assert_array_equal(cache.action[part], expected["action"])
        assert (cache.episode[part] == number).all()
        start += length
    assert cache.spec == SPEC and cache.num_frames == sum(LENGTHS) and cache.episode_tasks.tolist() == [0, 1, 0, 1]


def test_jpeg_frames_are_nearly_those_written_and_everything_else_is_exact(tmp_path):
    spec = replace(SPEC, image_size=32)
    rows, columns = np.mgrid[0:32, 0:32]
    frames = np.stack([np.stack([8 * rows, 8 * columns, np.full_like(rows, 20 * t)], -1) for t in range(6)]).astype(np.uint8)
    vectors = np.arange(12, dtype=np.float32).reshape(6, 2)
    caches = {}
    for storage in STORAGES:
        with FrameCacheWriter(tmp_path / storage, spec, storage=storage) as writer:
            images = {"base": frames, "wrist": frames[::-1]}
            writer.add_episode(images, vectors, vectors, instruction="look", task=0)
        caches[storage] = FrameCache.open(tmp_path / storage)
    raw, jpeg = (ActionWindows(cache, H).gather(np.arange(6)) for cache in caches.values())
    assert np.abs(raw.images.astype(int) - jpeg.images).max() <= 8
    np.testing.assert_array_equal(raw.actions, jpeg.actions)
    np.testing.assert_array_equal(caches["jpeg"].images["base"][2:4], jpeg.images[2:4, 0])
    assert caches["jpeg"].images["wrist"].shape == (6, 32, 32, 3)
    (tmp_path / "jpeg" / "image.base.jpeg").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="make the cache again"):
        FrameCache.open(tmp_path / "jpeg")


def test_an_interrupted_writer_leaves_the_old_cache_and_nothing_else(tmp_path):
    write(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt), FrameCacheWriter(tmp_path / "cache", SPEC) as writer:
        writer.add_episode(**episode(0, 3), instruction="do", task=0)
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert FrameCache.open(tmp_path / "cache").num_episodes == len(LENGTHS)


def test_a_full_disk_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vla.frame_cache.GrowingArray.close", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_an_empty_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No episode"):
        write(tmp_path / "cache", lengths=())
    assert not list(tmp_path.iterdir())


def test_a_data_set_folder_opens_as_its_cache(tmp_path):
    write(tmp_path / "data" / "cache")
    assert FrameCache.open(tmp_path / "data").root == tmp_path / "data" / "cache"


def test_missing_or_foreign_caches_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="vla collect"):
        FrameCache.open(tmp_path / "nothing")
    root = write(tmp_path / "cache").root
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(ValueError, match="version 0"):
        FrameCache.open(root)
    manifest["episodes"]["length"][0] += 1
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest says"):
        FrameCache.open(root)


def test_a_wrong_episode_is_refused(tmp_path):
    good = episode(0, 3)
    for broken, words in (
        ({"images": {"base": good["images"]["base"]}}, "lacks camera 'wrist'"),
        ({"state": good["state"][:2]}, r"state of episode 0 is float32 \(2, 2\)"),
        ({"images": {name: frames.astype(np.float32) for name, frames in good["images"].items()}}, "uint8"),
    ):
        with pytest.raises(ValueError, match=words), FrameCacheWriter(tmp_path / "cache", SPEC) as writer:
            writer.add_episode(**(good | broken), instruction="do", task=0)
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------------------------------- windows


def test_windows_never_cross_episodes_and_pads_repeat_the_last_action(cache):
    batch = ActionWindows(cache, H).gather(np.arange(sum(LENGTHS)))
    row = 0
    for number, length in enumerate(LENGTHS):
        for t in range(length):
            steps = t + np.arange(H)
            np.testing.assert_array_equal(batch.actions[row, :, 0], np.minimum(steps, length - 1))
            assert (batch.actions[row, :, 1] == number).all()
            np.testing.assert_array_equal(batch.is_pad[row], steps >= length)
            assert (batch.images[row, 0] == t).all() and (batch.images[row, 1] == t + 100).all()
            assert batch.instructions[row] == f"do {number % 2}" and batch.state[row].tolist() == [t, number]
            row += 1
    assert batch.images.dtype == np.uint8 and batch.images.shape == (row, 2, 8, 8, 3)


def test_a_horizon_longer_than_every_episode_is_only_padding(cache):
    batch = ActionWindows(cache, 50).gather(np.arange(3))
    assert batch.actions.shape == (3, 50, 2) and batch.is_pad.sum(1).tolist() == [45, 46, 47]


def test_tasks_and_cameras_select(cache):
    windows = ActionWindows(cache, H, tasks=[1], cameras=["wrist"])
    batch = windows.gather(np.arange(len(windows)))
    assert len(windows) == 5 and set(batch.state[:, 1]) == {1.0, 3.0} and batch.images.min() >= 100
    assert windows.instructions == ("do 1",) and ActionWindows(cache, H).instructions == ("do 0", "do 1")
    with pytest.raises(ValueError, match=r"tasks \[7\].*holds tasks \[0, 1\]"):
        ActionWindows(cache, H, tasks=[0, 7])
    with pytest.raises(ValueError, match="No camera 'front'"):
        ActionWindows(cache, H, cameras=["front"])


def test_held_out_episodes_are_whole_and_disjoint_and_a_fair_share(tmp_path):
    cache = write(tmp_path / "cache", lengths=(2,) * 40)
    train = ActionWindows(cache, H, held_out_fraction=0.25)
    held = ActionWindows(cache, H, held_out_fraction=0.25, held_out=True)
    train_episodes, held_episodes = (set(w.frames()[0][:, 1]) for w in (train, held))
    assert not train_episodes & held_episodes and len(train_episodes | held_episodes) == 40
    assert len(train) + len(held) == 80 and 9 <= len(held_episodes) <= 11
    for start in range(100):  # any run of episodes, and any task of four in turn
        assert 3 <= is_held_out(np.arange(start, start + 80, 4), 0.25).sum() <= 7
    with pytest.raises(ValueError, match="No episode left"):
        ActionWindows(cache, H, held_out_fraction=0.0, held_out=True)


def test_fewer_demonstrations_are_the_first_of_each_task_and_the_held_out_ones_stay(tmp_path):
    cache = write(tmp_path / "cache", lengths=(2,) * 40)
    shares = {"held_out_fraction": 0.25}
    every, held = ActionWindows(cache, H, **shares), ActionWindows(cache, H, **shares, held_out=True, episodes_per_task=3)
    assert len(held) == len(ActionWindows(cache, H, **shares, held_out=True))
    seen: set[float] = set()
    for count in (1, 3, 7):
        few = ActionWindows(cache, H, **shares, episodes_per_task=count)
        episodes = set(few.frames()[0][:, 1])
        tasks = set(cache.episode_tasks.tolist())
        assert few.num_episodes == len(episodes) == count * len(tasks) and seen <= episodes <= set(every.frames()[0][:, 1])
        seen = episodes
    assert ActionWindows(cache, H, **shares, episodes_per_task=1000).num_episodes == every.num_episodes
    with pytest.raises(ValueError, match="episodes_per_task is 0"):
        ActionWindows(cache, H, episodes_per_task=0)


# --------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_a_function_of_seed_and_step_alone(cache):
    straight = WindowMixture([ActionWindows(cache, H)])
    batches = [straight.batch(step, batch_size=7, seed=3) for step in range(12)]
    for step in (11, 4, 0, 9):  # any order, a fresh object: what a resumed run does
        resumed = WindowMixture([ActionWindows(cache, H)])
        assert equal(resumed.batch(step, batch_size=7, seed=3), batches[step])
    assert not equal(straight.batch(0, batch_size=7, seed=4), batches[0])


def test_an_epoch_is_every_window_once(cache):
    mixture = WindowMixture([ActionWindows(cache, H)])
    order = np.concatenate([mixture.indices(step, batch_size=1, seed=0) for step in range(3 * len(mixture))])
    epochs = order.reshape(3, -1)
    assert (np.sort(epochs) == np.arange(len(mixture))).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_mixture_keeps_its_shares_and_covers_every_source(tmp_path):
    sources = [ActionWindows(write(tmp_path / str(k), offset=10 * k), H) for k in range(2)]
    mixture = WindowMixture(sources, weights=[3, 1])
    indices = np.concatenate([mixture.indices(step, batch_size=19, seed=0) for step in range(20)])
    from_second = indices >= len(sources[0])
    assert np.mean(from_second) == pytest.approx(0.25, abs=0.02)
    counts = np.bincount(indices, minlength=38)
    assert counts[:19].max() - counts[:19].min() <= 1 and counts[19:].max() - counts[19:].min() <= 1
    batch = mixture.gather(indices)
    assert ((batch.state[:, 1] >= 10) == from_second).all()  # rows keep their places
    assert [t.count for t in mixture.statistics()] == [38, 38]


def test_mixture_refuses_sources_that_do_not_fit(cache):
    for changes in ({"control_hz": 5.0}, {"binary_actions": () if cache.spec.binary_actions else (0,)}):
        other = replace(cache, spec=replace(cache.spec, **changes))
        assert other.spec != cache.spec
        with pytest.raises(ValueError, match="state or rate"):
            WindowMixture([ActionWindows(cache, 4), ActionWindows(other, 4)])
    with pytest.raises(ValueError, match="differ in horizon"):
        WindowMixture([ActionWindows(cache, 4), ActionWindows(cache, 5)])
    with pytest.raises(ValueError, match="one weight > 0"):
        WindowMixture([ActionWindows(cache, 4)], weights=[0])
