"""lerobot's own reader on whole data sets of `vla collect`: what it gives is what training reads.

    vla bench lerobot_reader DATA [DATA ...] [--frames 200]

Of each data set: number and lengths of episodes, frames a second, and random frames against the frame cache. Action, state and
instruction must be equal, the pixels too unless the cache holds JPEG, whose mean difference is printed. Exit status 1 if anything
else differs. Milliseconds are medians of a frame at random, one reader after the other in turn.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from tests.benchmarks.harness import parser, quiet_machine, report
from vla.frame_cache import FrameCache
from vla.stored_images import JpegFrames

COLUMNS = (
    "data set", "episodes", "frames", "fps", "GB", "cache GB", "checked", "differ", "worst mean grey levels", "lerobot ms a frame",
    "cache ms a frame",
)  # fmt: skip
JPEG_TOLERANCE = 4.0  # grey levels in the mean over a frame


def main(argv: Sequence[str]) -> int:
    arguments = parser(__doc__)
    arguments.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments.add_argument("datasets", type=Path, nargs="+", metavar="DATA", help="folders of `vla collect`")
    arguments.add_argument("--frames", type=int, default=200, help="random frames compared of each (default: 200)")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the reader would ask the hub for a data set's tags
    rows = []
    with quiet_machine():
        for root in options.datasets:
            with TemporaryDirectory() as folder, patch("datasets.config.HF_DATASETS_CACHE", Path(folder)):  # as large as the set
                rows.append(compare(root.expanduser(), options.frames, options.seed))
    report("lerobot_reader", COLUMNS, rows, options.output, seed=options.seed)
    different = sum(row[COLUMNS.index("differ")] for row in rows)
    print("equal" if not different else f"{different} frames differ")
    return 1 if different else 0


def compare(root: Path, frames: int, seed: int) -> list[Any]:
    """One row of the table; raises ValueError if the two do not even have the same episodes."""
    ours = FrameCache.open(root)  # says what to do about a missing folder; lerobot's reader would ask the hub for it
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset(f"local/{root.name}", root=root)
    lengths = np.diff(ours.episode_starts).tolist()
    if list(theirs.meta.episodes["length"]) != lengths:
        raise ValueError(f"{root}: lerobot reads {theirs.num_episodes} episodes, the cache has {ours.num_episodes} of other lengths.")
    rounded = any(isinstance(images, JpegFrames) for images in ours.images.values())
    seconds: dict[str, list[float]] = {"lerobot": [], "cache": []}
    differ, worst = 0, 0.0
    chosen = np.random.default_rng(seed).choice(ours.num_frames, size=min(frames, ours.num_frames), replace=False)
    for index in map(int, chosen):
        begin = time.perf_counter()
        item = theirs[index]
        middle = time.perf_counter()
        images = {camera: ours.images[camera][index] for camera in ours.spec.cameras}
        seconds["lerobot"].append(middle - begin)
        seconds["cache"].append(time.perf_counter() - middle)
        grey = max(
            np.abs(item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255 - image.astype(np.float64)).mean()
            for camera, image in images.items()
        )
        worst = max(worst, float(grey))
        episode = int(ours.episode[index])
        same = (
            np.array_equal(item["action"].numpy(), ours.action[index])
            and np.array_equal(item["observation.state"].numpy(), ours.state[index])
            and item["task"] == ours.instructions[ours.episode_instructions[episode]]
            and int(item["frame_index"]) == index - ours.episode_starts[episode]
            and grey <= (JPEG_TOLERANCE if rounded else 1e-4)
        )
        differ += not same
    milliseconds = [1000 * statistics.median(values) for values in seconds.values()]
    sizes = [gigabytes(root) - gigabytes(root / "cache"), gigabytes(root / "cache")]
    return [root.name, theirs.num_episodes, theirs.num_frames, theirs.fps, *sizes, len(chosen), differ, worst, *milliseconds]


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
