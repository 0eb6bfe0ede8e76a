"""LeRobotDataset v3.0 -> episodes -> frame cache. Read with numpy, pyarrow and PyAV; lerobot is not needed.

    read_episodes(root)                         image and video features, one episode in memory at a time
    build_frame_cache(root, root / "cache")     what training reads

The writer is vla/lerobot_writer.py, the verb `vla import`.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vla.episodes import Episode
from vla.feature_map import FeatureMap, derive_spec, find_features
from vla.frame_cache import FrameCacheWriter
from vla.interface import RobotSpec
from vla.lerobot_metadata import NOT_FOLLOWED, DatasetMetadata, vectors
from vla.stored_images import image_storage
from vla.video_frames import read_video_frames

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 64  # frames decoded, and rows read, at once


def build_frame_cache(
    dataset_root: Path | str,
    cache_root: Path | str,
    *,
    spec: RobotSpec | None = None,
    cameras: Mapping[str, str] | None = None,
) -> None:
    """Decode a LeRobotDataset into a frame cache, which appears at `cache_root` when it is whole.

    Arguments and errors: `read_episodes`.
    """
    meta = DatasetMetadata.open(dataset_root)
    spec, features = resolve(meta, spec=spec, cameras=cameras)
    write_frame_cache(cache_root, spec, episodes_of(meta, spec, features), meta.num_frames, f"LeRobotDataset {meta.root.name}")


def write_frame_cache(
    cache_root: Path | str, spec: RobotSpec, episodes: Iterator[Episode], num_frames: int, source: str
) -> None:
    """A frame cache of these episodes; `num_frames`, about, decides whether its images are raw or JPEG."""
    storage = image_storage(num_frames * len(spec.cameras) * spec.image_size**2 * 3)
    with FrameCacheWriter(cache_root, spec, source=source, storage=storage) as writer:
        for episode in episodes:
            writer.add_episode(
                episode.images, episode.state, episode.action,
                instruction=episode.instruction, task=episode.task, followed=episode.followed,
            )  # fmt: skip


def read_episodes(
    root: Path | str, *, spec: RobotSpec | None = None, cameras: Mapping[str, str] | None = None
) -> Iterator[Episode]:
    """The episodes of a LeRobotDataset in order, one in memory at a time; never asks a network.

    spec: the robot the episodes shall fit, frames of another size being fitted to its image_size; default: the one that
    `vla collect` left beside the data, or else the one derived from the features. cameras: camera -> feature, where the
    names differ. An episode whose instruction changes on the way comes as several.
    Raises FileNotFoundError without a data set, ValueError if it is older than v3.0, damaged, or lacks a feature.
    """
    meta = DatasetMetadata.open(root)
    spec, features = resolve(meta, spec=spec, cameras=cameras)
    yield from episodes_of(meta, spec, features)


def resolve(
    meta: DatasetMetadata, *, spec: RobotSpec | None = None, cameras: Mapping[str, str] | None = None
) -> tuple[RobotSpec, FeatureMap]:
    """The robot of a data set and the features that make it."""
    if spec is None and cameras is None:
        spec = meta.spec
    features = find_features(meta, cameras=cameras, wanted=spec.cameras if spec else None)
    spec = spec or derive_spec(meta, features)
    for key, expected in ((features.state, spec.state_names), (features.action, spec.action_names)):
        if meta.features[key]["shape"] != [len(expected)]:
            raise ValueError(
                f"{meta.root}: {key} has shape {meta.features[key]['shape']}; the robot {spec.name!r} has "
                f"{len(expected)}: {list(expected)}."
            )
    return spec, features


def episodes_of(meta: DatasetMetadata, spec: RobotSpec, features: FeatureMap) -> Iterator[Episode]:
    """`read_episodes` once all names are known."""
    rows = meta.own["episodes"] if meta.own else None
    for number, table in _episode_tables(meta, features):
        images = {
            camera: _fitted(_frames(meta, number, table, key), spec.image_size) for camera, key in features.cameras.items()
        }
        state, action = vectors(table, features.state), vectors(table, features.action)
        task_index = table["task_index"].to_numpy()
        for part in _runs(task_index):
            index = int(task_index[part.start])
            row = dict(rows[number]) if rows else {"task": index}  # lerobot's number, for want of the suite's
            elsewhere = row.pop(NOT_FOLLOWED, None)
            yield Episode(
                images={camera: frames[part] for camera, frames in images.items()},
                state=state[part],
                action=action[part],
                instruction=meta.tasks[index],
                task=row.pop("task"),
                followed=None if elsewhere is None else ~np.isin(np.arange(part.start, part.stop), elsewhere),
                meta=row,
            )


def _runs(values: np.ndarray) -> list[slice]:
    """The stretches of equal values, in order."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [slice(start, end) for start, end in zip(borders, borders[1:])]


def _episode_tables(meta: DatasetMetadata, features: FeatureMap) -> Iterator[tuple[int, "pa.Table"]]:
    """(episode number, its rows) in order. Raises ValueError where the rows are not those the metadata promises."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = meta.episodes["length"].tolist()
    stored = [key for key in features.cameras.values() if meta.features[key]["dtype"] == "image"]
    columns = ["episode_index", "task_index", "timestamp", features.state, features.action, *stored]
    rows: list[pa.Table] = []  # of the episode being read
    number = 0
    for path in meta.data_paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=CHUNK, columns=columns):
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


def _frames(meta: DatasetMetadata, number: int, table: "pa.Table", key: str) -> Iterator[np.ndarray]:
    """Frames of one camera of one episode, uint8 [<= CHUNK, H, W, 3] at a time."""
    if meta.features[key]["dtype"] == "video":
        times = table["timestamp"].to_numpy() + meta.video_start(number, key)
        yield from read_video_frames(meta.video_path(number, key), times, tolerance_s=0.5 / meta.info["fps"], chunk=CHUNK)
        return
    for first in range(0, len(table), CHUNK):
        yield np.stack([_decode_image(cell) for cell in table[key].slice(first, CHUNK).to_pylist()])


def _decode_image(cell: dict) -> np.ndarray:
    from PIL import Image

    if not cell["bytes"]:
        raise ValueError(f"A frame is not in the parquet file but beside it ({cell['path']!r}); v3.0 embeds them.")
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


def _fitted(chunks: Iterator[np.ndarray], size: int) -> np.ndarray:
    """All chunks as one uint8 [T, size, size, 3]."""
    return np.concatenate([fit_frames(chunk, size) for chunk in chunks])


def fit_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, size, size, 3]; see multimodal.letterbox."""
    if frames.shape[1:3] == (size, size):
        return frames
    import torch  # only for frames that need it, so that reading our own data starts quickly

    from multimodal.letterbox import fit_square

    return fit_square(torch.from_numpy(np.ascontiguousarray(frames)), size).numpy()
