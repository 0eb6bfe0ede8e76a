"""How a frame cache keeps its images: raw in one array per camera, or JPEG above 8 GB. Both are read frame by frame. numpy, Pillow.

    image.<camera>.npy                                    raw, uint8 [F, H, W, 3], a memory map
    image.<camera>.jpeg, image.<camera>.offsets.npy       JPEG files one after another, int64 [F + 1] where each begins
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

STORAGES = ("raw", "jpeg")
RAW_LIMIT = 8_000_000_000  # bytes; above, a page cache would not hold them and reading costs more than decoding
JPEG_QUALITY = 95


def image_storage(raw_bytes: int) -> str:
    """The storage for that many bytes of raw frames."""
    return "raw" if raw_bytes <= RAW_LIMIT else "jpeg"


class ImageWriter(Protocol):
    def append(self, frames: np.ndarray) -> None:
        """Add frames uint8 [T, H, W, 3]."""
        ...

    def close(self) -> None: ...


class GrowingArray:
    """A .npy file that grows along its first axis; numpy pads the header so that the length can be rewritten."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self._length = dtype, shape, 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        self._file.seek(0)
        description = {"descr": np.lib.format.dtype_to_descr(np.dtype(self.dtype)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, description | {"shape": (self._length, *self.shape)})

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values).data)
        self._length += len(values)

    def close(self) -> None:
        self._write_header()
        self._file.close()


class JpegWriter:
    """Frames as JPEG files in one file, their offsets in another."""

    def __init__(self, folder: Path, camera: str, size: int) -> None:
        self.dtype, self.shape = np.uint8, (size, size, 3)
        self._file = (folder / f"image.{camera}.jpeg").open("wb")
        self._offsets = GrowingArray(folder / f"image.{camera}.offsets.npy", np.int64, ())
        self._offsets.append(np.zeros(1, dtype=np.int64))

    def append(self, frames: np.ndarray) -> None:
        from PIL import Image

        ends = []
        for frame in frames:
            encoded = io.BytesIO()
            Image.fromarray(frame).save(encoded, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
            self._file.write(encoded.getbuffer())
            ends.append(self._file.tell())
        self._offsets.append(np.array(ends, dtype=np.int64))

    def close(self) -> None:
        self._file.close()
        self._offsets.close()


class JpegFrames(Sequence):
    """What `JpegWriter` wrote, indexed like an array [F, H, W, 3] by an integer or a slice; every access decodes."""

    def __init__(self, folder: Path, camera: str, size: int) -> None:
        self._bytes = np.memmap(folder / f"image.{camera}.jpeg", dtype=np.uint8, mode="r")
        self._offsets = np.load(folder / f"image.{camera}.offsets.npy")
        self.shape = (len(self._offsets) - 1, size, size, 3)
        if self._offsets[-1] != len(self._bytes):
            raise ValueError(
                f"{folder / f'image.{camera}.jpeg'} has {len(self._bytes)} bytes, its offsets say {self._offsets[-1]}; "
                "make the cache again."
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        from PIL import Image

        if isinstance(index, slice):
            chosen = range(*index.indices(len(self)))
            return np.stack([self[frame] for frame in chosen]) if chosen else np.empty((0, *self.shape[1:]), np.uint8)
        if not 0 <= index < len(self):
            raise IndexError(f"Frame {index} of {len(self)}.")
        begin, end = self._offsets[index], self._offsets[index + 1]
        return np.asarray(Image.open(io.BytesIO(self._bytes[begin:end].tobytes())))


def open_writer(storage: str, folder: Path, camera: str, size: int) -> GrowingArray | JpegWriter:
    """A writer of one camera's frames."""
    if storage == "jpeg":
        return JpegWriter(folder, camera, size)
    return GrowingArray(folder / f"image.{camera}.npy", np.uint8, (size, size, 3))


def open_frames(storage: str, folder: Path, camera: str, size: int) -> np.ndarray | JpegFrames:
    """One camera's frames, to be read by index."""
    return JpegFrames(folder, camera, size) if storage == "jpeg" else np.load(folder / f"image.{camera}.npy", mmap_mode="r")
