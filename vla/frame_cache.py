"""The frame cache: the decoded frames of a data set in one folder, readable without lerobot:

    manifest.json   format version, RobotSpec, instructions, per-episode length / task / instruction, source, image storage
    image.<camera>  frames, raw or JPEG: see vla/stored_images.py
    state.npy       float32 [F, S]
    action.npy      float32 [F, D]
    episode.npy     int32 [F]
    followed.npy    bool [F], whether the next frame is what action[f] led to; without the file it always is

Raw uint8 is read through a memory map: no decoding, and the page cache is the only copy.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.interface import RobotSpec
from vla.stored_images import STORAGES, GrowingArray, JpegFrames, open_frames, open_writer

CACHE_VERSION = 1


class FrameCacheWriter:
    """Writes episodes to a new cache; nothing appears at `root` before everything is written.

        with FrameCacheWriter(root, spec, source="...") as writer:
            writer.add_episode(images, state, action, instruction="pick up the cube", task=0)

    An existing cache at `root` is replaced at the end; on an exception it stays and the unfinished one is removed.
    storage: raw, bit for bit, or jpeg, a tenth of the bytes; `image_storage` chooses by size.
    """

    def __init__(self, root: Path | str, spec: RobotSpec, *, source: str = "", storage: str = "raw") -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage is {storage!r}; allowed: {', '.join(STORAGES)}.")
        self.root, self.spec, self.source, self.storage = Path(root), spec, source, storage
        self._partial = self.root.with_name(self.root.name + ".partial")

    def __enter__(self) -> "FrameCacheWriter":
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        shapes = {"state": (np.float32, (self.spec.state_dim,)), "action": (np.float32, (self.spec.action_dim,))}
        shapes |= {"episode": (np.int32, ()), "followed": (np.bool_, ())}
        self._files = {name: GrowingArray(self._partial / f"{name}.npy", *kind) for name, kind in shapes.items()}
        for camera in self.spec.cameras:
            writer = open_writer(self.storage, self._partial, camera, self.spec.image_size)
            self._files[f"image.{camera}"] = writer
        self._instructions: list[str] = []
        self._episodes: dict[str, list[int]] = {"length": [], "task": [], "instruction": []}
        return self

    def add_episode(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        action: np.ndarray,
        *,
        instruction: str,
        task: int,
        followed: np.ndarray | None = None,
    ) -> None:
        """images: camera -> uint8 [T, H, W, 3]; state [T, S]; action [T, D]; followed bool [T], None: everywhere.

        Raises ValueError on a wrong shape.
        """
        missing = [camera for camera in self.spec.cameras if camera not in images]
        if missing:
            raise ValueError(
                f"Episode lacks camera {missing[0]!r}; got {sorted(images)}, the spec names {self.spec.cameras}."
            )
        columns = {f"image.{camera}": images[camera] for camera in self.spec.cameras}
        columns |= {"state": np.asarray(state, np.float32), "action": np.asarray(action, np.float32)}
        columns["episode"] = np.full(len(action), len(self._episodes["length"]), np.int32)
        columns["followed"] = np.ones(len(action), bool) if followed is None else np.asarray(followed)
        for name, values in columns.items():
            file = self._files[name]
            if values.shape != (len(action), *file.shape) or values.dtype != file.dtype or len(action) == 0:
                raise ValueError(
                    f"{name} of episode {len(self._episodes['length'])} is {values.dtype} {values.shape}; expected "
                    f"{np.dtype(file.dtype)} {(len(action), *file.shape)} with at least one frame."
                )
        for name, values in columns.items():
            self._files[name].append(values)
        if instruction not in self._instructions:
            self._instructions.append(instruction)
        self._episodes["length"].append(len(action))
        self._episodes["task"].append(int(task))
        self._episodes["instruction"].append(self._instructions.index(instruction))

    def __exit__(self, exception_type: type[BaseException] | None, *_: Any) -> None:
        is_whole = False
        try:
            for file in self._files.values():
                file.close()  # flushes, so this too can meet a full disk
            if exception_type is None:
                self._write_manifest()
                is_whole = True
        finally:
            if not is_whole:
                shutil.rmtree(self._partial)
        if is_whole:
            shutil.rmtree(self.root, ignore_errors=True)
            self._partial.rename(self.root)

    def _write_manifest(self) -> None:
        if not self._episodes["length"]:
            raise ValueError(f"No episode was added, so there is no frame cache to write at {self.root}.")
        manifest = {
            "version": CACHE_VERSION,
            "source": self.source,
            "images": self.storage,
            "spec": self.spec.to_dict(),
            "instructions": self._instructions,
            "episodes": self._episodes,
        }
        (self._partial / "manifest.json").write_text(json.dumps(manifest))


@dataclass(frozen=True, eq=False)
class FrameCache:
    """An open cache: F frames of E episodes, frames of one episode contiguous."""

    root: Path
    spec: RobotSpec
    source: str
    instructions: tuple[str, ...]
    episode_starts: np.ndarray  # int64 [E + 1], the last is F
    episode_tasks: np.ndarray  # int64 [E], task of the suite
    episode_instructions: np.ndarray  # int64 [E], index into instructions
    images: dict[str, np.ndarray | JpegFrames]  # camera -> uint8 [F, H, W, 3], memory maps or decoded at each access
    state: np.ndarray  # float32 [F, S]
    action: np.ndarray  # float32 [F, D]
    episode: np.ndarray  # int32 [F]
    followed: np.ndarray  # bool [F]: the next frame is what action[f] led to, as in a demonstration; not where another acted

    @classmethod
    def open(cls, root: Path | str) -> "FrameCache":
        """Open a cache folder, or the `cache` folder inside a data set.

        Raises FileNotFoundError if there is none, ValueError if it has another version or is incomplete.
        """
        root = Path(root).expanduser()
        if not (root / "manifest.json").is_file() and (root / "cache" / "manifest.json").is_file():
            root = root / "cache"
        if not (root / "manifest.json").is_file():
            raise FileNotFoundError(
                f"No frame cache at {root} (manifest.json is missing). Make one with `vla collect --suite=SUITE "
                f"--output_dir={root}`, or from a LeRobotDataset with `vla import --source=DATASET --output_dir={root}`."
            )
        manifest = json.loads((root / "manifest.json").read_text())
        if manifest["version"] != CACHE_VERSION:
            raise ValueError(
                f"Frame cache {root} has version {manifest['version']}, this code reads {CACHE_VERSION}; make it again "
                "with `vla import --source=DATASET --output_dir=FOLDER`."
            )
        spec = RobotSpec.from_dict(manifest["spec"])
        lengths = np.array(manifest["episodes"]["length"], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        cache = cls(
            root=root,
            spec=spec,
            source=manifest["source"],
            instructions=tuple(manifest["instructions"]),
            episode_starts=starts,
            episode_tasks=np.array(manifest["episodes"]["task"], dtype=np.int64),
            episode_instructions=np.array(manifest["episodes"]["instruction"], dtype=np.int64),
            images={
                camera: open_frames(manifest.get("images", "raw"), root, camera, spec.image_size) for camera in spec.cameras
            },
            state=np.load(root / "state.npy"),
            action=np.load(root / "action.npy"),
            episode=np.load(root / "episode.npy"),
            followed=np.load(path) if (path := root / "followed.npy").exists() else np.ones(starts[-1], bool),
        )
        size = spec.image_size
        expected = {"state": (spec.state_dim,), "action": (spec.action_dim,), "episode": (), "followed": ()}
        found = {name: getattr(cache, name).shape for name in expected}
        expected |= {f"image.{camera}": (size, size, 3) for camera in spec.cameras}
        found |= {f"image.{camera}": frames.shape for camera, frames in cache.images.items()}
        for name, shape in expected.items():
            if found[name] != (starts[-1], *shape):
                wanted = (int(starts[-1]), *shape)
                raise ValueError(f"{root / name} has shape {found[name]}; its manifest says {wanted}.")
        return cache

    @property
    def num_frames(self) -> int:
        return int(self.episode_starts[-1])

    @property
    def num_episodes(self) -> int:
        return len(self.episode_tasks)
