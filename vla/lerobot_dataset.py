"""LeRobotDataset v3.0: episodes -> data set -> frame cache. The one importer of lerobot, and only inside functions.

    write_dataset(root, spec, episodes)         meta/, data/: lerobot's own writer; any lerobot program opens the result
    build_frame_cache(root, root / "cache")     what training reads

Frames are PNG in the parquet files, so they come back bit for bit. Beside lerobot's metadata, meta/remask.json keeps the
RobotSpec, and each episode's task number within its suite and its start, which lerobot has no field for.
"""

import argparse
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.frame_cache import FrameCacheWriter
from vla.interface import RobotSpec
from vla.lerobot_statistics import DatasetStatistics, Stats
from vla.stored_images import image_storage

if TYPE_CHECKING:
    import pyarrow as pa
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

PNG_LEVEL = 1  # lerobot's add_frame uses 6
PNG_THREADS = 2  # zlib releases the interpreter lock
VIDEO_FRAMES = 64  # decoded at once
_REPO_ID = "remask/dataset"  # lerobot wants a name; with a local root it is never looked up
_SIDE_FILE = Path("meta") / "remask.json"


@dataclass(frozen=True)
class Episode:
    """T frames of one demonstration; `action[t]` is what was done at what `images[t]` and `state[t]` show."""

    images: dict[str, np.ndarray]  # camera -> uint8 [T, H, W, 3]
    state: np.ndarray  # float32 [T, S]
    action: np.ndarray  # float32 [T, D]
    instruction: str
    task: int  # number within its suite
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values, such as the start


# ------------------------------------------------------------------------------------------------------------------ write


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
        (root / _SIDE_FILE).write_text(json.dumps({"spec": spec.to_dict(), "episodes": rows}))
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
    _check_episode(episode, spec, number)
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
    return {"task": int(episode.task)} | episode.meta


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


def _check_episode(episode: Episode, spec: RobotSpec, number: int) -> None:
    """Raise ValueError naming the first array that does not fit `spec`."""
    length, size = len(episode.action), spec.image_size
    arrays = {f"image {camera!r}": (episode.images.get(camera), np.uint8, (size, size, 3)) for camera in spec.cameras}
    arrays["state"] = (episode.state, np.float32, (spec.state_dim,))
    arrays["action"] = (episode.action, np.float32, (spec.action_dim,))
    for name, (values, dtype, shape) in arrays.items():
        if values is None:
            raise ValueError(f"Episode {number} lacks {name}; it has {sorted(episode.images)}.")
        if length == 0 or values.shape != (length, *shape) or values.dtype != dtype:
            raise ValueError(
                f"Episode {number} has {name} {values.dtype} {values.shape}; expected {np.dtype(dtype)} "
                f"{(length, *shape)} with at least one frame."
            )


# ------------------------------------------------------------------------------------------------------------------- read


def build_frame_cache(
    dataset_root: Path | str,
    cache_root: Path | str,
    *,
    spec: RobotSpec | None = None,
    camera_keys: dict[str, str] | None = None,
) -> None:
    """Decode a LeRobotDataset into a frame cache, which appears at `cache_root` when it is whole.

    spec: needed for data sets that others wrote; camera_keys: camera -> feature, default observation.images.<camera>.
    Never touches the network. Raises FileNotFoundError without a data set, ValueError if it does not fit `spec`.
    """
    dataset_root = Path(dataset_root)
    spec, source = _spec_and_source(dataset_root, spec)
    raw_bytes = _load_metadata(dataset_root).total_frames * len(spec.cameras) * spec.image_size**2 * 3
    with FrameCacheWriter(cache_root, spec, source=source, storage=image_storage(raw_bytes)) as writer:
        for episode in read_episodes(dataset_root, spec=spec, camera_keys=camera_keys):
            writer.add_episode(
                episode.images, episode.state, episode.action, instruction=episode.instruction, task=episode.task
            )


def read_episodes(
    root: Path | str, *, spec: RobotSpec | None = None, camera_keys: dict[str, str] | None = None
) -> Iterator[Episode]:
    """The episodes of a LeRobotDataset in order, one in memory at a time. Arguments and errors: `build_frame_cache`.

    lerobot reads the metadata and names the files. The parquet rows are read here, since `LeRobotDataset` first copies
    all of them into the cache folder of `datasets`.
    """
    root = Path(root)
    spec, _ = _spec_and_source(root, spec)
    meta = _load_metadata(root)
    side_file = root / _SIDE_FILE
    rows = json.loads(side_file.read_text())["episodes"] if side_file.is_file() else None
    keys = {camera: f"observation.images.{camera}" for camera in spec.cameras} | (camera_keys or {})
    for feature in [*keys.values(), "observation.state", "action"]:
        if feature not in meta.features:
            raise ValueError(
                f"{root} has no feature {feature!r}; it has {sorted(meta.features)}. Name the cameras' features with "
                "camera_keys={camera: feature}."
            )
    for number, table in _episode_tables(meta):
        task_index = int(table["task_index"][0].as_py())
        row = dict(rows[number]) if rows else {"task": task_index}
        yield Episode(
            images={camera: _decode_frames(meta, number, table, key) for camera, key in keys.items()},
            state=_matrix(table, "observation.state"),
            action=_matrix(table, "action"),
            instruction=str(meta.tasks.iloc[task_index].name),
            task=row.pop("task"),
            meta=row,
        )


def _spec_and_source(root: Path, spec: RobotSpec | None) -> tuple[RobotSpec, str]:
    if not (root / "meta" / "info.json").is_file():
        raise FileNotFoundError(f"No LeRobotDataset at {root} (meta/info.json is missing); `vla collect` makes one.")
    side_file = root / _SIDE_FILE
    if spec is None and not side_file.is_file():
        raise ValueError(
            f"{root} was not written by `vla collect` ({_SIDE_FILE} is missing), so its robot is unknown: give a "
            "RobotSpec (build_frame_cache(..., spec=...) or --spec robot.json)."
        )
    return spec or RobotSpec.from_dict(json.loads(side_file.read_text())["spec"]), f"LeRobotDataset {root.name}"


def _load_metadata(root: Path) -> "LeRobotDatasetMetadata":
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
    from lerobot.datasets.utils import SuppressProgressBars

    for name in ("info.json", "tasks.parquet", "episodes"):
        if not (root / "meta" / name).exists():  # lerobot would ask the hub for it
            raise FileNotFoundError(f"LeRobotDataset {root} is incomplete: meta/{name} is missing.")
    with SuppressProgressBars():
        return LeRobotDatasetMetadata(_REPO_ID, root=root)


def _episode_tables(meta: "LeRobotDatasetMetadata") -> Iterator[tuple[int, "pa.Table"]]:
    """(episode number, its rows) in order. Raises ValueError where the rows are not those the metadata promises."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = list(meta.episodes["length"])
    rows: list[pa.Table] = []  # of the episode being read
    number = 0
    for path in dict.fromkeys(meta.root / meta.get_data_file_path(episode) for episode in range(len(lengths))):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=VIDEO_FRAMES):
            table = pa.Table.from_batches([batch])
            episodes = table["episode_index"].to_numpy()
            for episode in np.unique(episodes):
                rows.append(table.filter(pa.array(episodes == episode)))
                held = sum(map(len, rows))
                if episode != number or held > lengths[number]:
                    raise ValueError(f"{path} holds rows of episode {episode} where those of {number} belong.")
                if held == lengths[number]:
                    yield number, pa.concat_tables(rows)
                    rows, number = [], number + 1
    if number != len(lengths):
        raise ValueError(
            f"{meta.root} ends within episode {number} of {len(lengths)}; it was not finalized. Collect or pack it again."
        )


def _matrix(table: "pa.Table", column: str) -> np.ndarray:
    """A column of equal-length lists as float32 [T, n]."""
    values = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(len(table), -1)


def _decode_frames(meta: "LeRobotDatasetMetadata", number: int, table: "pa.Table", key: str) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of one camera of one episode."""
    from PIL import Image

    if key not in meta.video_keys:
        images = (Image.open(io.BytesIO(image["bytes"])) for image in table[key].to_pylist())
        return np.stack([np.asarray(image.convert("RGB")) for image in images])
    from lerobot.datasets.video_utils import decode_video_frames

    path = meta.root / meta.get_video_file_path(number, key)
    times = table["timestamp"].to_numpy() + meta.episodes[number][f"videos/{key}/from_timestamp"]
    parts = np.array_split(times, -(-len(times) // VIDEO_FRAMES))
    frames = [decode_video_frames(path, part.tolist(), tolerance_s=0.5 / meta.fps).numpy() for part in parts]
    return np.rint(np.concatenate(frames) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m vla.lerobot_dataset DATASET_ROOT`: build DATASET_ROOT/cache."""
    parser = argparse.ArgumentParser(prog="python -m vla.lerobot_dataset", description="LeRobotDataset -> frame cache")
    parser.add_argument("dataset_root", type=Path)
    parser.add_argument("--cache_root", type=Path, help="default: DATASET_ROOT/cache")
    parser.add_argument("--spec", type=Path, help="RobotSpec as JSON, for data sets that `vla collect` did not write")
    parser.add_argument("--cameras", type=json.loads, help='for instance \'{"base": "observation.images.image"}\'')
    arguments = parser.parse_args(argv)
    spec = RobotSpec.from_dict(json.loads(arguments.spec.read_text())) if arguments.spec else None
    cache_root = arguments.cache_root or arguments.dataset_root / "cache"
    build_frame_cache(arguments.dataset_root, cache_root, spec=spec, camera_keys=arguments.cameras)
    print(f"Frame cache: {cache_root}")


if __name__ == "__main__":
    main()
