"""Films of episodes: mp4 and small gif files through imageio, and one picture of many episodes' ends."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GIF_SIZE = 128  # pixels
GIF_EVERY = 4  # frames; at 20 Hz a gif of 5 frames a second
GREEN, RED = (40, 170, 70), (200, 50, 50)
BORDER = 4  # pixels


class VideoRecorder:
    """Takes an episode's frames (sim.rollout.Recorder), writes them as they come; a file appears when it is whole.

        with VideoRecorder(Path("episode.mp4"), camera="base", size=256, fps=20) as video:
            rollout(..., video=video)

    gif: also write a small `.gif` beside the film. On an exception nothing is left.
    """

    def __init__(self, path: Path, *, camera: str, size: int, fps: float, gif: bool = False) -> None:
        self.path, self.camera, self.size, self.fps, self.gif = path, camera, size, fps, gif
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._writer: Any = None
        self._gif_frames: list[np.ndarray] = []
        self._num_frames = 0

    def __enter__(self) -> "VideoRecorder":
        import imageio.v2 as imageio

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = imageio.get_writer(
            self._partial,
            fps=self.fps,
            codec="libx264",
            quality=7,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-threads", "1"],  # the cores are busy with simulators
        )
        return self

    def add(self, frame: np.ndarray) -> None:
        """frame: uint8 [size, size, 3], upright."""
        self._writer.append_data(np.ascontiguousarray(frame))
        if self.gif and self._num_frames % GIF_EVERY == 0:
            self._gif_frames.append(shrink(frame, GIF_SIZE))
        self._num_frames += 1

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        if exception_type is not None or self._num_frames == 0:
            self._partial.unlink(missing_ok=True)
            return
        self._partial.replace(self.path)
        if self.gif:
            write_gif(self.path.with_suffix(".gif"), self._gif_frames, fps=self.fps / GIF_EVERY)


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """The image uint8 [H, W, 3] averaged down to about `size` pixels by a whole factor; unchanged if it is small."""
    factor = max(1, min(image.shape[:2]) // size)
    height, width = (side // factor * factor for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def write_gif(path: Path, frames: Sequence[np.ndarray], *, fps: float) -> None:
    """Frames uint8 [H, W, 3] as an endless gif."""
    import imageio.v2 as imageio

    imageio.mimwrite(path, frames, format="GIF", duration=1000 / fps, loop=0, subrectangles=True)


def last_frame(path: Path) -> np.ndarray:
    """How a film ends: uint8 [H, W, 3]."""
    import imageio.v2 as imageio

    with imageio.get_reader(path) as reader:
        for frame in reader:
            pass
        return np.asarray(frame)


def success_grid(frames: Sequence[np.ndarray], successes: Sequence[bool], *, columns: int | None = None) -> np.ndarray:
    """One picture uint8 [h, w, 3] of equally large frames uint8 [H, W, 3], framed green for success and red for failure."""
    if not frames or len(frames) != len(successes):
        raise ValueError(f"{len(frames)} frames and {len(successes)} outcomes; a grid needs as many of both, at least one.")
    columns = columns or math.ceil(math.sqrt(len(frames)))
    height, width = frames[0].shape[0] + 2 * BORDER, frames[0].shape[1] + 2 * BORDER
    grid = np.full((math.ceil(len(frames) / columns) * height, columns * width, 3), 255, dtype=np.uint8)
    for position, (frame, success) in enumerate(zip(frames, successes, strict=True)):
        top, left = position // columns * height, position % columns * width
        grid[top : top + height, left : left + width] = GREEN if success else RED
        grid[top + BORDER : top + height - BORDER, left + BORDER : left + width - BORDER] = frame
    return grid


def write_image(path: Path, image: np.ndarray) -> None:
    """uint8 [H, W, 3] in the format the file name says."""
    import imageio.v2 as imageio

    imageio.imwrite(path, image)
