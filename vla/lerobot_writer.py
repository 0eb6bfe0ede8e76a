"""Episodes -> LeRobotDataset v3.0, through lerobot's own writer. Besides the plugins the one importer of lerobot.

    write_dataset(root, spec, episodes)         meta/, data/: any lerobot program opens and trains on the result

Frames are PNG in the parquet files, so they come back bit for bit. Beside lerobot's metadata, meta/remask.json keeps the
RobotSpec, and each episode's task number within its suite, its start and where its actions were not followed, which lerobot has
no field for.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.episodes import Episode, check_episode
from vla.interface import RobotSpec
from vla.lerobot_metadata import NOT_FOLLOWED, SIDE_FILE
from vla.lerobot_statistics import DatasetStatistics, Stats

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

PNG_LEVEL = 1  # lerobot's add_frame uses 6
PNG_THREADS = 2  # zlib releases the interpreter lock
_REPO_ID = "remask/dataset"  # lerobot wants a name; with a local root it is never looked up


def write_dataset(root: Path | str, spec: RobotSpec, episodes: Iterable[Episode]) -> None:
    """Write a new LeRobotDataset at `root`, one episode in memory at a time.

    Raises FileExistsError if `root` exists and ValueError on an episode that does not fit `spec` or if there is none; an
    exception leaves nothing behind.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.utils import SuppressProgressBars, write_stats

    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists; a LeRobotDataset is written to a new folder. Remove it or name another.")
    if spec.control_hz != int(spec.control_hz):
        raise ValueError(f"lerobot stores whole frames per second; control_hz is {spec.control_hz}.")
    try:
        with SuppressProgressBars(), ThreadPoolExecutor(PNG_THREADS) as pool:
            dataset = LeRobotDataset.create(
                _REPO_ID, int(spec.control_hz), _features(spec), root=root, robot_type=spec.name, use_videos=False
            )
            statistics = DatasetStatistics()
            try:
                rows = [_save_episode(dataset, spec, episode, statistics, pool) for episode in episodes]
            finally:  # also after an error: else its destructor would write the folder anew
                dataset.finalize()
        if not rows:
            raise ValueError(f"No episode was given, so there is no data set to write at {root}.")
        write_stats(statistics.total(), root)
        (root / SIDE_FILE).write_text(json.dumps({"spec": spec.to_dict(), "episodes": rows}))
    except BaseException:  # Ctrl-C too: half a data set must not look like one
        shutil.rmtree(root, ignore_errors=True)
        raise


def _features(spec: RobotSpec) -> dict[str, dict[str, Any]]:
    image = {"dtype": "image", "shape": (spec.image_size,) * 2 + (3,), "names": ["height", "width", "channel"]}
    return {f"observation.images.{camera}": dict(image) for camera in spec.cameras} | {
        "observation.state": {"dtype": "float32", "shape": (spec.state_dim,), "names": list(spec.state_names)},
        "action": {"dtype": "float32", "shape": (spec.action_dim,), "names": list(spec.action_names)},
    }


def _save_episode(
    dataset: "LeRobotDataset",
    spec: RobotSpec,
    episode: Episode,
    statistics: DatasetStatistics,
    pool: ThreadPoolExecutor,
) -> dict[str, Any]:
    """Hand lerobot one whole episode; returns the episode's row of the side file.

    Not through `add_frame`, which writes every frame to a PNG file at level 6, reads it again, and when a write fails
    (a full disk) prints a line and goes on.
    """
    number, length = dataset.meta.total_episodes, len(episode.action)
    check_episode(episode, spec, number)
    images = {f"observation.images.{camera}": episode.images[camera] for camera in spec.cameras}
    buffer = dataset.create_episode_buffer()
    buffer |= {"size": length, "task": [episode.instruction] * length}
    buffer |= {"frame_index": list(range(length)), "timestamp": [step / dataset.fps for step in range(length)]}
    buffer |= {"observation.state": list(episode.state), "action": list(episode.action)}
    for key, frames in images.items():
        encoded = pool.map(_encode_png, frames)
        buffer[key] = [{"bytes": png, "path": f"frame-{step:06d}.png"} for step, png in enumerate(encoded)]

    def exact(columns: dict[str, Any], features: dict[str, Any]) -> Stats:
        return statistics.add_episode({key: columns[key] for key in columns if key not in images}, images)

    with _computing_statistics(exact):
        dataset.save_episode(buffer)
    elsewhere = {} if episode.followed is None else {NOT_FOLLOWED: np.flatnonzero(~episode.followed).tolist()}
    return {"task": int(episode.task)} | elsewhere | episode.meta


@contextmanager
def _computing_statistics(function: Callable[[dict[str, Any], dict[str, Any]], Stats]) -> Iterator[None]:
    """Within, lerobot's writer takes an episode's statistics from `function` (why: vla/lerobot_statistics.py)."""
    from lerobot.datasets import lerobot_dataset as module

    original = module.compute_episode_stats
    module.compute_episode_stats = function
    try:
        yield
    finally:
        module.compute_episode_stats = original


def _encode_png(frame: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()
