"""Staged demonstrations -> LeRobotDataset v3.0 and frame cache, within the disk there is."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sim import demonstration
from vla.episodes import Episode
from vla.frame_cache import FrameCacheWriter
from vla.interface import RobotSpec
from vla.stored_images import image_storage

FREE_BYTES = 1_000_000_000  # of disk that is left alone
PACKED_COPIES = 2  # PNG data set and frame cache; each is at most as large as what is staged


def check_disk(folder: Path, staged_bytes: int, what: str) -> None:
    """Raise ValueError unless `folder`'s disk takes `staged_bytes` more of staged demonstrations and their packing."""
    needed = staged_bytes * (1 + PACKED_COPIES) + FREE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{what} needs about {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free. Free some, choose another "
            "disk with --output_dir or REMASK_HOME, or ask for fewer episodes or a smaller --image_size."
        )


def pack(root: Path, spec: RobotSpec, paths: Sequence[Path], *, source: str, cache_only: bool) -> dict[str, int]:
    """Build `root` (LeRobotDataset: meta, data) and `root`/cache from staged episodes; one episode is in memory at a time.

    Returns bytes of each part. An interrupted packing starts again; nothing half-written stays under a final name.
    """
    cache = root / "cache"
    if cache_only:
        source = f"{source}; frame cache only, no LeRobotDataset was written"
        storage = image_storage(sum(path.stat().st_size for path in paths))
        with FrameCacheWriter(cache, spec, source=source, storage=storage) as writer:
            for episode in map(demonstration.load, paths):
                writer.add_episode(
                    episode.images, episode.state, episode.action,
                    instruction=episode.instruction, task=episode.task, followed=episode.followed,
                )  # fmt: skip
        return {"cache_bytes": folder_bytes(cache)}
    from vla.lerobot_dataset import build_frame_cache
    from vla.lerobot_writer import write_dataset

    packing = root / "packing"
    shutil.rmtree(packing, ignore_errors=True)
    write_dataset(packing, spec, _episodes(paths))
    dataset_bytes = folder_bytes(packing)
    for part in sorted(packing.iterdir(), key=lambda part: part.name == "meta"):  # meta last: it makes the data set valid
        target = root / part.name
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    packing.rmdir()
    build_frame_cache(root, cache)
    return {"dataset_bytes": dataset_bytes, "cache_bytes": folder_bytes(cache)}


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _episodes(paths: Sequence[Path]) -> Iterator[Episode]:
    for episode in map(demonstration.load, paths):
        yield Episode(
            images=episode.images,
            state=episode.state,
            action=episode.action,
            instruction=episode.instruction,
            task=episode.task,
            meta={"split": episode.start.split, "start": episode.start.index, "seed": episode.start.seed},
            followed=episode.followed,
        )
