"""What a LeRobotDataset v3.0 says of itself: features, episodes, tasks, files. numpy and pyarrow; lerobot is not needed.

The layout is that of lerobot 0.4.4 (datasets/utils.py, lerobot_dataset.py). meta/remask.json beside it is ours: the
RobotSpec, and each episode's task number within its suite and its start, which lerobot has no field for.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla.interface import RobotSpec

if TYPE_CHECKING:
    import pyarrow as pa

SIDE_FILE = Path("meta") / "remask.json"
NOT_FOLLOWED = "not_followed"  # of an episode there: frames whose action another took the place of
CAMERA_TYPES = ("image", "video")


@dataclass(frozen=True)
class DatasetMetadata:
    """The metadata of one data set folder."""

    root: Path
    info: dict[str, Any]  # meta/info.json
    tasks: tuple[str, ...]  # instruction of each task_index
    episodes: dict[str, np.ndarray]  # column of meta/episodes -> [E]
    own: dict[str, Any] | None  # meta/remask.json

    @classmethod
    def open(cls, root: Path | str) -> "DatasetMetadata":
        """Never asks a network. Raises FileNotFoundError for what is missing, ValueError for another version."""
        root = Path(root).expanduser()
        check_version(root)
        for name in ("tasks.parquet", "episodes"):
            if not (root / "meta" / name).exists():
                raise FileNotFoundError(f"LeRobotDataset {root} is incomplete: meta/{name} is missing.")
        side_file = root / SIDE_FILE
        return cls(
            root=root,
            info=json.loads((root / "meta" / "info.json").read_text()),
            tasks=_read_tasks(root / "meta" / "tasks.parquet"),
            episodes=_read_episodes(root / "meta" / "episodes"),
            own=json.loads(side_file.read_text()) if side_file.is_file() else None,
        )

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def num_episodes(self) -> int:
        return len(self.episodes["length"])

    @property
    def num_frames(self) -> int:
        return int(self.episodes["length"].sum())

    @property
    def spec(self) -> RobotSpec | None:
        """The robot, if we wrote the data set."""
        return RobotSpec.from_dict(self.own["spec"]) if self.own else None

    @cached_property
    def camera_features(self) -> list[str]:
        """Names of image and video features, in the file's order."""
        return [key for key, feature in self.features.items() if feature["dtype"] in CAMERA_TYPES]

    def frame_shape(self, key: str) -> tuple[int, int]:
        """(height, width) of a camera feature, pixels; info.json lists channels first or last."""
        shape = list(self.features[key]["shape"])
        channel = 0 if shape[0] in (1, 3) and shape[-1] not in (1, 3) else 2
        height, width = (side for axis, side in enumerate(shape) if axis != channel)
        return int(height), int(width)

    def data_path(self, episode: int) -> Path:
        return self.root / self.info["data_path"].format(**self._file("data", episode))

    def video_path(self, episode: int, key: str) -> Path:
        return self.root / self.info["video_path"].format(video_key=key, **self._file(f"videos/{key}", episode))

    def video_start(self, episode: int, key: str) -> float:
        """Where the episode begins in its video file, seconds; each camera has its own."""
        return float(self.episodes[f"videos/{key}/from_timestamp"][episode])

    def _file(self, kind: str, episode: int) -> dict[str, int]:
        return {part: int(self.episodes[f"{kind}/{part}"][episode]) for part in ("chunk_index", "file_index")}

    @cached_property
    def data_paths(self) -> list[Path]:
        """Every file of rows, in the order of its episodes."""
        return list(dict.fromkeys(map(self.data_path, range(self.num_episodes))))

    def column(self, name: str) -> np.ndarray:
        """A vector feature over all frames, float32 [F, n]; images are not read."""
        import pyarrow.parquet as pq

        return np.concatenate([vectors(pq.read_table(path, columns=[name]), name) for path in self.data_paths])


def check_version(root: Path) -> None:
    """Raise unless `root` holds a LeRobotDataset of version 3; an older one is told how to become one."""
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"No LeRobotDataset at {root} (meta/info.json is missing); `vla collect` makes one.")
    version = str(json.loads(path.read_text()).get("codebase_version", "unknown"))
    if version.startswith("v3."):
        return
    if version in ("v2.0", "v2.1"):
        before = "" if version == "v2.1" else "First to v2.1 with lerobot 0.3, then: "
        raise ValueError(
            f"{root} is a LeRobotDataset {version}; this reads v3.0. {before}python -m "
            f"lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id={root.name} --root={root.resolve().parent} "
            f"--push-to-hub=false   (keeps the old one as {root.name}_old)"
        )
    raise ValueError(f"{root} is a LeRobotDataset {version}; this reads v3.0. Write it with lerobot 0.4.")


def vectors(table: "pa.Table", column: str) -> np.ndarray:
    """A column of equal-length lists, or of numbers, as float32 [T, n]."""
    import pyarrow as pa

    values = table[column].combine_chunks()
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(table), -1)


def _read_tasks(path: Path) -> tuple[str, ...]:
    """lerobot keeps the instruction as the pandas index of the table, which parquet stores as one more column."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None:
        raise ValueError(f"{path} has the columns {table.column_names}; the instructions should be in its index or in 'task'.")
    named = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    return tuple(str(named[index]) for index in sorted(named))


def _read_episodes(folder: Path) -> dict[str, np.ndarray]:
    """The columns that say where an episode is; statistics are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"LeRobotDataset {folder.parents[1]} is incomplete: no file in meta/episodes.")
    wanted = [name for name in pq.read_schema(files[0]).names if name == "length" or name.startswith(("data/", "videos/"))]
    table = pa.concat_tables([pq.read_table(file, columns=["episode_index", *wanted]) for file in files])
    table = table.sort_by("episode_index")
    return {name: table[name].to_numpy() for name in wanted}
