"""`vla import`: what others recorded arrives as it was, in one robot's shape; else one error says what to do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multimodal.letterbox import fit_square
from sim.import_dataset import ImportConfig, import_dataset, without_noops
from sim.libero_hdf5 import observations_follow_actions, read_file
from vla.cli import main as cli
from vla.data import ActionWindows, WindowMixture
from vla.episodes import Episode
from vla.feature_map import derive_spec, find_features, suggested_map
from vla.frame_cache import FrameCache, FrameCacheWriter
from vla.interface import RobotSpec
from vla.lerobot_dataset import read_episodes
from vla.lerobot_metadata import DatasetMetadata
from vla.lerobot_writer import write_dataset

pytest.importorskip("lerobot")
h5py = pytest.importorskip("h5py")

LENGTHS = (9, 5, 12)
LIBERO_NAME = "pick_up_the_ketchup_and_place_it_in_the_basket"


def smooth_frames(random: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Pictures that survive a video codec: large blocks of slowly changing colour."""
    blocks = random.integers(40, 215, (1, 3, 4, 3)) + 4 * np.arange(count)[:, None, None, None]
    return np.kron(blocks, np.ones((1, height // 3, width // 4, 1))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def video_root(tmp_path_factory) -> Path:
    """Written by lerobot itself: two cameras of different shapes, as video; only the sharper one fills its files."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("video") / "dataset"
    names = ["height", "width", "channels"]
    features = {
        "observation.images.top": {"dtype": "video", "shape": (48, 64, 3), "names": names},
        "observation.images.image2": {"dtype": "video", "shape": (48, 48, 3), "names": names},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": {"motors": ["x", "y", "z"]}},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    dataset = LeRobotDataset.create("any/name", 10, features, root=root, robot_type="so100", vcodec="h264")
    dataset.meta.info["video_files_size_in_mb"] = 0.009  # a new file when it would be larger
    random = np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        top, wrist = smooth_frames(random, length, 48, 64), smooth_frames(random, length, 48, 48)
        top[:, ::4] = random.integers(0, 255, top[:, ::4].shape)
        for step in range(length):
            dataset.add_frame(
                {
                    "observation.images.top": top[step],
                    "observation.images.image2": wrist[step],
                    "observation.state": random.normal(size=3).astype(np.float32),
                    "action": np.array([step / 10, 1.0 if step % 2 else -1.0], np.float32),
                    "task": "stack" if episode == 1 and step > 2 else "push",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def test_video_features_are_lerobots_frames_with_each_cameras_own_offset(video_root, tmp_path, monkeypatch):
    import datasets.config
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    meta = DatasetMetadata.open(video_root)
    starts = [[meta.video_start(episode, key) for episode in range(3)] for key in meta.camera_features]
    files = [[meta.video_path(episode, key).name for episode in range(3)] for key in meta.camera_features]
    assert starts[0] != starts[1] and files[0] != files[1]  # else this would show nothing
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    theirs = LeRobotDataset("any/name", root=video_root)
    ours = list(read_episodes(video_root, spec=derive_spec(meta, find_features(meta), image_size=64)))
    index = 0
    for episode in ours:
        for step in range(len(episode.action)):
            item = theirs[index]
            for camera in ("top", "image2"):
                frame = np.rint(item[f"observation.images.{camera}"].numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
                expected = fit_square(torch.from_numpy(np.ascontiguousarray(frame)), 64).numpy()
                np.testing.assert_array_equal(episode.images[camera][step], expected, err_msg=f"{camera} {index}")
            np.testing.assert_array_equal(episode.action[step], item["action"].numpy())
            assert episode.instruction == item["task"]
            index += 1
    assert index == sum(LENGTHS)
    parts = [(episode.instruction, len(episode.action)) for episode in ours]
    assert parts == [("push", 9), ("push", 3), ("stack", 2), ("push", 12)]  # the second changes its instruction on the way


def test_a_video_that_lacks_a_frame_is_named(video_root, tmp_path):
    from vla.video_frames import read_video_frames

    path = DatasetMetadata.open(video_root).video_path(0, "observation.images.image2")
    with pytest.raises(ValueError, match="no frame at 99.0000 s"):
        list(read_video_frames(path, np.array([0.1, 99.0]), 0.05))
    (tmp_path / "file.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(read_video_frames(tmp_path / "file.mp4", np.array([0.0]), 0.05))


def test_a_foreign_data_set_becomes_a_cache_and_a_data_set_with_exact_statistics(video_root, tmp_path, capsys):
    """Through the command line: cameras renamed, squares of one size, the gripper found, quantiles over all frames."""
    arguments = [f"--source={video_root}", "--cameras={base: top, wrist: image2}", "--dataset"]
    assert cli(["import", *arguments, f"--output_dir={tmp_path / 'too_wide'}"]) == 2
    assert "top" not in (message := capsys.readouterr().err) and "base 48 x 64" in message and "--image_size" in message
    assert cli(["import", *arguments, "--image_size=48", f"--output_dir={tmp_path / 'data'}"]) == 0
    cache = FrameCache.open(tmp_path / "data")
    assert (cache.spec.cameras, cache.spec.image_size, cache.spec.binary_actions) == (("base", "wrist"), 48, (1,))
    assert cache.spec.state_names == ("x", "y", "z") and cache.spec.action_names == ("action_0", "action_1")
    assert cache.num_frames == sum(LENGTHS) and set(cache.instructions) == {"push", "stack"}
    stats = json.loads((tmp_path / "data" / "meta" / "stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(cache.action.astype(np.float64), 0.99, axis=0), rtol=1e-6)
    for episode, again in zip(read_episodes(tmp_path / "data"), episodes_of_cache(cache), strict=True):
        np.testing.assert_array_equal(episode.images["base"], again)


def episodes_of_cache(cache: FrameCache) -> list[np.ndarray]:
    return [cache.images["base"][a:b] for a, b in zip(cache.episode_starts, cache.episode_starts[1:])]


SPEC = RobotSpec("panda", ("base", "wrist"), 32, tuple("abc"), tuple("uv"), (1,), 20.0)


def small_episode(number: int, length: int = 6, image_keys: tuple[str, ...] = ("base", "wrist")) -> Episode:
    random = np.random.default_rng(number)
    action = np.stack([random.normal(size=length), np.where(np.arange(length) % 2, 1, -1)], 1).astype(np.float32)
    images = {key: random.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8) for key in image_keys}
    return Episode(images, random.normal(size=(length, 3)).astype(np.float32), action, f"task {number % 2}", number % 2)


@pytest.fixture(scope="module")
def openpi_root(tmp_path_factory) -> Path:
    """Feature names of openpi's LIBERO data sets, in v3.0."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("openpi") / "libero"
    image = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
    features = {key: {"dtype": "float32", "shape": (size,), "names": [key]} for key, size in (("state", 3), ("actions", 2))}
    features |= {"image": image, "wrist_image": image}
    dataset = LeRobotDataset.create("any/name", 10, features, root=root, robot_type="panda", use_videos=False)
    for number in range(2):
        episode = small_episode(number)
        for step in range(6):
            frame = {"image": episode.images["base"][step], "wrist_image": episode.images["wrist"][step]}
            frame |= {"state": episode.state[step], "actions": episode.action[step], "task": episode.instruction}
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return root


def test_openpis_names_are_read_and_mixed_with_ours_by_weight(openpi_root, tmp_path, capsys):
    ours = tmp_path / "ours"
    write_dataset(ours, SPEC, [small_episode(number) for number in range(5, 8)])
    command = ["import", f"--source={openpi_root}", f"--output_dir={tmp_path / 'theirs'}", f"--like={ours}"]
    assert cli(command) == 2  # whose camera is which cannot be known
    message = capsys.readouterr().err
    assert "Wanted: base, wrist" in message and "--cameras='{base: image, wrist: wrist_image}'" in message
    command.append("--cameras={base: image, wrist: wrist_image}")
    assert cli(command) == 2  # openpi's LIBERO says 10 Hz
    assert "10 Hz" in (message := capsys.readouterr().err) and "--control_hz=20" in message
    assert cli([*command, "--control_hz=20"]) == 0
    import_dataset(ImportConfig(ours, tmp_path / "ours_cache"))
    sources = [ActionWindows(FrameCache.open(tmp_path / name), 4) for name in ("theirs", "ours_cache")]
    assert sources[0].cache.spec == sources[1].cache.spec == SPEC
    np.testing.assert_array_equal(sources[0].cache.images["wrist"][:6], small_episode(0).images["wrist"])
    indices = WindowMixture(sources, [3.0, 1.0]).indices(0, batch_size=400, seed=0)
    assert np.mean(indices < len(sources[0])) == pytest.approx(0.75, abs=0.03)


def test_names_of_the_same_place_are_matched():
    libero = ["observation.images.image", "observation.images.image2"]
    assert suggested_map(("base", "wrist"), libero) == {"base": libero[0], "wrist": libero[1]}
    raw = ["eye_in_hand_rgb", "agentview_rgb"]
    assert suggested_map(("base", "wrist"), raw) == {"base": raw[1], "wrist": raw[0]}
    others = ["observation.images.left", "observation.images.hand_camera"]
    assert suggested_map(("wrist",), others) == {"wrist": others[1]}


# -------------------------------------------------------------------------------------------------------------- LIBERO


def write_hdf5(path: Path, *, late: bool, length: int = 12, convention: str = "opengl") -> dict[str, np.ndarray]:
    """A file as LIBERO's create_dataset.py makes it (late), or as replays that observe before they act.

    Returns the truth of demo_0 by step: images as sim/libero.py shows them, state before the action, action.
    """
    random = np.random.default_rng(1)
    truth = None
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["macros_image_convention"] = convention
        for number in range(3):
            joints = np.cumsum(random.normal(size=(length + 1, 7)), axis=0)
            upright = random.integers(0, 256, (2, length + 1, 16, 16, 3), dtype=np.uint8)
            poses = random.normal(size=(length + 1, 8))
            actions = random.uniform(-1, 1, (length, 7))
            actions[:, 6] = np.where(np.arange(length) < 6, -1, 1)
            actions[[3, 8], :6] = 0
            shown = slice(1, None) if late else slice(None, -1)
            demo = group.create_group(f"demo_{number}")
            demo["actions"] = actions
            demo["states"] = np.concatenate([np.zeros((length, 1)), joints[:-1], random.normal(size=(length, 20))], axis=1)
            rows = slice(None, None, -1) if convention == "opengl" else slice(None)
            demo["obs/agentview_rgb"] = upright[0, shown][:, rows, ::-1]
            demo["obs/eye_in_hand_rgb"] = upright[1, shown][:, rows, ::-1]
            demo["obs/ee_states"], demo["obs/gripper_states"] = poses[shown, :6], poses[shown, 6:]
            demo["obs/joint_states"] = joints[shown]
            truth = truth or {"base": upright[0, :-1], "wrist": upright[1, :-1], "state": poses[:-1], "action": actions}
    return truth


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_libero_files_pair_what_was_seen_with_what_was_done_then(tmp_path, late, convention):
    truth = write_hdf5(tmp_path / f"{LIBERO_NAME}_demo.hdf5", late=late, convention=convention)
    episode = next(read_file(tmp_path / f"{LIBERO_NAME}_demo.hdf5", task=4))
    steps = slice(1, None) if late else slice(None)
    for camera in ("base", "wrist"):
        np.testing.assert_array_equal(episode.images[camera], truth[camera][steps])
    np.testing.assert_array_equal(episode.state, truth["state"][steps].astype(np.float32))
    np.testing.assert_array_equal(episode.action, truth["action"][steps].astype(np.float32))
    assert (episode.instruction, episode.task) == ("pick up the ketchup and place it in the basket", 4)


def test_libero_files_are_numbered_as_their_suite_and_lose_idle_steps(tmp_path):
    pytest.importorskip("libero")
    from sim.libero import task_names

    folder = tmp_path / "libero_object"
    folder.mkdir()
    write_hdf5(folder / f"{LIBERO_NAME}_demo.hdf5", late=False)
    config = ImportConfig(folder, tmp_path / "cache", image_size=24, drop_noops=True, episodes=2)
    cache = FrameCache.open(import_dataset(config))
    assert set(cache.episode_tasks) == {task_names("libero_object").index(LIBERO_NAME)}
    assert (cache.spec.image_size, cache.spec.control_hz, cache.spec.binary_actions) == (24, 20.0, (6,))
    assert np.diff(cache.episode_starts).tolist() == [10, 10]
    slow = replace(cache.spec, control_hz=10.0)
    with FrameCacheWriter(tmp_path / "slow" / "cache", slow) as writer:
        images = {camera: np.zeros((1, 24, 24, 3), np.uint8) for camera in slow.cameras}
        writer.add_episode(images, np.zeros((1, 8)), np.zeros((1, 7)), instruction="", task=0)
    with pytest.raises(ValueError, match="runs at 20 Hz, .*slow at 10 Hz"):
        import_dataset(replace(config, output_dir=tmp_path / "other", like=tmp_path / "slow"))
    with pytest.raises(ValueError, match="no suite of LIBERO.*libero_goal"):
        import_dataset(replace(config, output_dir=tmp_path / "other", suite="robosuite_lift"))
    with pytest.raises(ValueError, match="No file is about a task of libero_goal"):
        import_dataset(replace(config, output_dir=tmp_path / "other", suite="libero_goal"))


def test_as_many_episodes_as_asked_for_are_of_the_suite_asked_for(tmp_path):
    pytest.importorskip("libero")
    texts = ["turn on the stove"] * 3 + ["pick up the ketchup and place it in the basket"] * 3
    episodes = [replace(small_episode(number), instruction=text) for number, text in enumerate(texts)]
    write_dataset(tmp_path / "mixed", SPEC, episodes)
    cache = FrameCache.open(import_dataset(ImportConfig(tmp_path / "mixed", tmp_path / "cache", suite="libero_object", episodes=2)))
    assert cache.num_episodes == 2 and cache.instructions == (texts[-1],)
    np.testing.assert_array_equal(cache.state[:6], episodes[3].state)


def test_a_step_is_idle_if_it_neither_moves_nor_changes_the_gripper():
    episode = replace(small_episode(0), action=np.array([[0, -1], [0.5, -1], [0, -1], [0, 1], [0, 1], [5e-5, 1]], np.float32))
    assert without_noops(episode, (1,)).action.tolist() == [[0.5, -1], [0, 1]]
    np.testing.assert_array_equal(without_noops(episode, (1,)).images["base"], episode.images["base"][[1, 3]])


def test_which_observation_a_row_holds_is_read_off_the_joints():
    joints = np.cumsum(np.ones((10, 7)), axis=0)
    states = np.concatenate([np.zeros((9, 1)), joints[:-1], np.zeros((9, 3))], axis=1)
    assert observations_follow_actions(joints[1:] - 0.1, states)
    assert not observations_follow_actions(joints[:-1] + 0.1, states)


def test_a_folder_that_holds_something_and_a_source_that_holds_nothing_are_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        import_dataset(ImportConfig(tmp_path, tmp_path / "full"))
    assert cli(["import", f"--source={tmp_path / 'full'}", f"--output_dir={tmp_path / 'new'}"]) == 2
    assert "hf download" in capsys.readouterr().err
    with h5py.File(tmp_path / "bare_demo.hdf5", "w") as file:
        file.create_group("data/demo_0")["actions"] = np.zeros((3, 7))
    with pytest.raises(ValueError, match="lacks obs.*use-camera-obs"):
        import_dataset(ImportConfig(tmp_path / "bare_demo.hdf5", tmp_path / "new"))


def test_frames_are_fitted_without_distortion():
    frame = torch.full((2, 30, 60, 3), 200, dtype=torch.uint8)
    fitted = fit_square(frame, 40)
    assert fitted.shape == (2, 40, 40, 3)
    assert (fitted[:, 10:30] == 200).all() and (fitted[:, :10] == 0).all() and (fitted[:, 30:] == 0).all()
    square = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    assert fit_square(square, 40) is square
