"""lerobot's reader opens what we write, bit for bit; the cache holds the same; nothing asks the network."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from vla.episodes import Episode
from vla.frame_cache import FrameCache
from vla.interface import RobotSpec
from vla.feature_map import binary_dimensions
from vla.lerobot_dataset import build_frame_cache, read_episodes, resolve
from vla.lerobot_metadata import DatasetMetadata
from vla.lerobot_writer import write_dataset

pytest.importorskip("lerobot")

SPEC = RobotSpec("toy", ("base", "wrist"), 32, tuple("abcdefgh"), tuple("tuvwxyz"), (6,), 20.0)
LENGTHS = (7, 1, 70)  # one frame; and more rows than are read at once


def make_episode(number: int, length: int) -> Episode:
    random = np.random.default_rng(number)
    return Episode(
        images={camera: random.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8) for camera in SPEC.cameras},
        state=random.normal(size=(length, 8)).astype(np.float32),
        action=random.normal(size=(length, 7)).astype(np.float32),
        instruction=f"pick up the thing {number % 2}",
        task=9 - number % 2,  # lerobot numbers tasks by appearance; the suite's number must survive
        meta={"seed": number},
    )


EPISODES = [make_episode(number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a test asked the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("lerobot") / "dataset"
    write_dataset(root, SPEC, iter(EPISODES))
    return root


def assert_equal(got: Episode, expected: Episode) -> None:
    for camera in SPEC.cameras:
        np.testing.assert_array_equal(got.images[camera], expected.images[camera])
    np.testing.assert_array_equal(got.state, expected.state)
    np.testing.assert_array_equal(got.action, expected.action)
    assert (got.instruction, got.task, got.meta) == (expected.instruction, expected.task, expected.meta)


def test_where_an_action_was_not_followed_comes_back(tmp_path):
    followed = np.ones(len(EPISODES[0].action), bool)
    followed[1:3] = False
    write_dataset(tmp_path / "dataset", SPEC, [replace(EPISODES[0], followed=followed), EPISODES[1]])
    first, second = read_episodes(tmp_path / "dataset")
    np.testing.assert_array_equal(first.followed, followed)
    assert_equal(first, EPISODES[0])
    assert second.followed is None
    build_frame_cache(tmp_path / "dataset", tmp_path / "cache")
    expected = np.concatenate([followed, np.ones(len(EPISODES[1].action), bool)])
    np.testing.assert_array_equal(FrameCache.open(tmp_path / "cache").followed, expected)


def test_lerobot_opens_the_data_set_and_frames_equal_bit_for_bit(dataset_root, monkeypatch, tmp_path):
    import datasets.config
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = LeRobotDataset("any/name", root=dataset_root)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (len(LENGTHS), sum(LENGTHS), 20)
    assert dataset.meta.info["codebase_version"] == "v3.0"
    assert list(dataset.meta.episodes["length"]) == list(LENGTHS)
    index = 0
    for number, episode in enumerate(EPISODES):
        for step in range(LENGTHS[number]):
            item = dataset[index]
            index += 1
            for camera in SPEC.cameras:
                frame = np.rint(item[f"observation.images.{camera}"].numpy() * 255).astype(np.uint8)
                np.testing.assert_array_equal(frame.transpose(1, 2, 0), episode.images[camera][step])
            np.testing.assert_array_equal(item["observation.state"].numpy(), episode.state[step])
            np.testing.assert_array_equal(item["action"].numpy(), episode.action[step])
            assert item["task"] == episode.instruction and item["episode_index"] == number
            assert item["frame_index"] == step and item["timestamp"] == pytest.approx(step / 20)


def test_episodes_are_read_as_written(dataset_root):
    read = list(read_episodes(dataset_root))
    assert len(read) == len(EPISODES)
    for got, expected in zip(read, EPISODES, strict=True):
        assert_equal(got, expected)


def test_the_frame_cache_holds_the_same_frames(dataset_root, tmp_path):
    build_frame_cache(dataset_root, tmp_path / "cache")
    cache = FrameCache.open(tmp_path / "cache")
    assert cache.spec == SPEC and cache.episode_tasks.tolist() == [9, 8, 9]
    for camera in SPEC.cameras:
        np.testing.assert_array_equal(cache.images[camera], np.concatenate([e.images[camera] for e in EPISODES]))
    np.testing.assert_array_equal(cache.state, np.concatenate([e.state for e in EPISODES]))
    np.testing.assert_array_equal(cache.action, np.concatenate([e.action for e in EPISODES]))
    texts = [cache.instructions[i] for i in cache.episode_instructions]
    assert texts == [episode.instruction for episode in EPISODES]


def test_lerobot_statistics_are_those_of_all_frames(dataset_root):
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("any/name", root=dataset_root)
    quantiles = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
    action = np.concatenate([episode.action for episode in EPISODES]).astype(np.float64)
    pixels = np.concatenate([episode.images["base"] for episode in EPISODES]).reshape(-1, 3) / 255
    for key, values, shape in (("action", action, (7,)), ("observation.images.base", pixels, (3, 1, 1))):
        stats = meta.stats[key]
        expected = {name: np.quantile(values, share, axis=0) for name, share in quantiles.items()}
        expected |= {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
        for name, value in expected.items():
            assert np.shape(stats[name]) == shape
            np.testing.assert_allclose(np.ravel(stats[name]), value, rtol=1e-6, err_msg=f"{key} {name}")
        assert stats["count"] == [sum(LENGTHS)]


def test_each_episode_has_statistics_of_its_own(dataset_root):
    """In the files: lerobot's reader leaves these columns out."""
    (path,) = (dataset_root / "meta" / "episodes").rglob("*.parquet")
    column = pq.read_table(path)["stats/observation.images.base/std"].to_pylist()
    for episode, std in zip(EPISODES, column, strict=True):
        own = episode.images["base"].reshape(-1, 3) / 255
        np.testing.assert_allclose(np.ravel(std), own.std(0), rtol=1e-6)


def test_only_data_and_meta_are_left(dataset_root):
    assert sorted(path.name for path in dataset_root.iterdir()) == ["data", "meta"]


def test_an_exception_leaves_nothing_behind(tmp_path):
    def interrupted():
        yield EPISODES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "dataset", SPEC, interrupted())
    assert not (tmp_path / "dataset").exists()


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    import pyarrow.parquet

    def full_disk(self, table, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(tmp_path / "dataset", SPEC, EPISODES[:1])
    assert not (tmp_path / "dataset").exists()


def test_a_data_set_of_others_is_read_by_its_features(dataset_root, tmp_path):
    """Without our side file: names, sizes and the binary gripper come from the data; task numbers are lerobot's."""
    foreign = tmp_path / "foreign"
    shutil.copytree(dataset_root, foreign)
    (foreign / "meta" / "remask.json").unlink()
    meta = DatasetMetadata.open(foreign)
    spec, _ = resolve(meta)
    assert (spec.cameras, spec.image_size, spec.control_hz) == (SPEC.cameras, 32, 20.0)
    assert (spec.state_names, spec.action_names, spec.binary_actions) == (SPEC.state_names, SPEC.action_names, ())
    assert [episode.task for episode in read_episodes(foreign)] == [0, 1, 0]
    assert binary_dimensions(np.array([[1.0, -1, 0.5], [-1, -1, 1]])) == (0,)


def test_a_missing_camera_lists_both_sides_and_suggests_a_map_that_works(dataset_root):
    renamed = RobotSpec(**{**SPEC.to_dict(), "cameras": ("exterior", "hand")})
    with pytest.raises(ValueError) as error:
        next(read_episodes(dataset_root, spec=renamed))
    text = str(error.value)
    assert "Wanted: exterior, hand" in text and "observation.images.base, observation.images.wrist" in text
    suggestion = yaml.safe_load(text.split("--cameras='")[1].split("'")[0])
    episode = next(read_episodes(dataset_root, spec=renamed, cameras=suggestion))
    np.testing.assert_array_equal(episode.images["exterior"], EPISODES[0].images["base"])
    np.testing.assert_array_equal(episode.images["hand"], EPISODES[0].images["wrist"])
    short = next(read_episodes(dataset_root, cameras={"one": "wrist"}))
    np.testing.assert_array_equal(short.images["one"], EPISODES[0].images["wrist"])
    with pytest.raises(ValueError, match="nothing for camera 'one'.*observation.images.base"):
        next(read_episodes(dataset_root, cameras={"one": "left"}))


@pytest.mark.parametrize("version", ["v2.1", "v2.0", "v4.0"])
def test_another_version_is_one_error_with_the_command(dataset_root, tmp_path, version):
    old = tmp_path / "old"
    shutil.copytree(dataset_root, old)
    info = json.loads((old / "meta" / "info.json").read_text())
    (old / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": version}))
    (old / "meta" / "tasks.parquet").unlink()  # v2 has none: the version is looked at first
    command = f"convert_dataset_v21_to_v30 --repo-id=old --root={tmp_path}" if version != "v4.0" else "lerobot 0.4"
    with pytest.raises(ValueError, match=f"{version}; this reads v3.0.*{command}"):
        next(read_episodes(old))


def as_version_2(root: Path, old: Path) -> None:
    """The same data set as lerobot 0.3 laid it out: one file per episode, JSON lines."""
    import pyarrow.parquet as pq

    meta = DatasetMetadata.open(root)
    (old / "meta").mkdir(parents=True)
    (old / "data" / "chunk-000").mkdir(parents=True)
    (table,) = (pq.read_table(path) for path in meta.data_paths)
    lines: dict[str, list] = {"episodes": [], "episodes_stats": []}
    first = 0
    for number, length in enumerate(LENGTHS):
        pq.write_table(table.slice(first, length), old / "data" / "chunk-000" / f"episode_{number:06d}.parquet")
        first += length
        lines["episodes"].append({"episode_index": number, "tasks": [EPISODES[number].instruction], "length": length})
        stats = {key: {"min": [0.0], "max": [1.0], "mean": [0.5], "std": [0.5], "count": [length]} for key in ("action",)}
        lines["episodes_stats"].append({"episode_index": number, "stats": stats})
    lines["tasks"] = [{"task_index": index, "task": text} for index, text in enumerate(meta.tasks)]
    for name, rows in lines.items():
        (old / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    changes = {"codebase_version": "v2.1", "data_path": path, "total_chunks": 1, "total_videos": 0}
    (old / "meta" / "info.json").write_text(json.dumps(meta.info | changes))


@pytest.mark.check
def test_the_command_that_the_error_names_mends_a_version_2_data_set(dataset_root, tmp_path):
    old = tmp_path / "old"
    as_version_2(dataset_root, old)
    with pytest.raises(ValueError) as error:
        next(read_episodes(old))
    command = str(error.value).split("python ")[1].split("   (")[0]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, *command.split()], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for got, expected in zip(read_episodes(old), EPISODES, strict=True):
        np.testing.assert_array_equal(got.images["base"], expected.images["base"])
        np.testing.assert_array_equal(got.action, expected.action)
        assert got.instruction == expected.instruction


def test_missing_and_incomplete_data_sets_are_named(dataset_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="vla collect"):
        build_frame_cache(tmp_path / "nothing", tmp_path / "cache")
    broken = tmp_path / "broken"
    shutil.copytree(dataset_root, broken)
    (broken / "meta" / "tasks.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="tasks.parquet is missing"):
        build_frame_cache(broken, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_writing_refuses_what_does_not_fit(tmp_path, dataset_root):
    with pytest.raises(FileExistsError, match="new folder"):
        write_dataset(dataset_root, SPEC, EPISODES)
    lacking = Episode(**{**vars(EPISODES[0]), "images": {"base": EPISODES[0].images["base"]}})
    with pytest.raises(ValueError, match="Episode 1 lacks image 'wrist'"):
        write_dataset(tmp_path / "dataset", SPEC, [EPISODES[0], lacking])
    doubles = Episode(**{**vars(EPISODES[0]), "action": EPISODES[0].action.astype(np.float64)})
    with pytest.raises(ValueError, match="action float64"):
        write_dataset(tmp_path / "dataset", SPEC, [doubles])
    with pytest.raises(ValueError, match="No episode"):
        write_dataset(tmp_path / "dataset", SPEC, [])
