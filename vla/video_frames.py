"""Frames of a video file at given times, decoded in one pass with PyAV."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np


def read_video_frames(path: Path, times: np.ndarray, tolerance_s: float, chunk: int = 64) -> Iterator[np.ndarray]:
    """Per chunk the frames nearest to ascending `times` [T] (seconds of the file): uint8 [<= chunk, H, W, 3].

    The file is entered at the key frame before the first time and left after the last one, so an episode in the middle
    of a file costs its own length. Raises ValueError if no frame lies within `tolerance_s` of a time, or if the file
    cannot be decoded.
    """
    frames = _nearest_frames(path, times, tolerance_s)
    while part := list(islice(frames, chunk)):
        yield np.stack(part)


def _nearest_frames(path: Path, times: np.ndarray, tolerance_s: float) -> Iterator[np.ndarray]:
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            start = max(0.0, float(times[0]) - tolerance_s)
            container.seek(int(start / stream.time_base), stream=stream, backward=True)
            yield from _matched(container.decode(stream), times, tolerance_s, path)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded: {error}. Copy the file again, or record the data set anew.") from error


def _matched(decoded: Iterator, times: np.ndarray, tolerance_s: float, path: Path) -> Iterator[np.ndarray]:
    """The decoded frame nearest to each time, in order."""
    wanted = iter(times.tolist())
    time = next(wanted)
    earlier = None
    for frame in decoded:
        while time is not None and frame.time >= time:
            nearest = frame if earlier is None or frame.time - time <= time - earlier.time else earlier
            yield _pixels(nearest, time, tolerance_s, path)
            time = next(wanted, None)
        if time is None:
            return
        earlier = frame
    while time is not None:  # past the last frame, whose time may be rounded down
        yield _pixels(earlier, time, tolerance_s, path)
        time = next(wanted, None)


def _pixels(frame, time: float, tolerance_s: float, path: Path) -> np.ndarray:
    if frame is None or abs(frame.time - time) > tolerance_s:
        nearest = "it has no frame" if frame is None else f"the nearest is at {frame.time:.4f} s"
        raise ValueError(f"{path} has no frame at {time:.4f} s ({nearest}); its metadata belong to another file.")
    return frame.to_ndarray(format="rgb24")
