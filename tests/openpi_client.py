"""A client of openpi's wire as its published one behaves, written from the description in docs/serving.md.

Connect without compression, read the metadata, then send one msgpack message and read one; a text frame is an error.
Independent of our codec: it packs arrays itself, as openpi's msgpack_numpy does.
"""

import contextlib
from typing import Any

import msgpack
import numpy as np
from websockets.sync.client import connect


def pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in ("V", "O", "c"):
            raise ValueError(f"Unsupported dtype: {value.dtype}")
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def unpack_array(value: dict) -> Any:
    if b"__ndarray__" in value:
        return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
    if b"__npgeneric__" in value:
        return np.dtype(value[b"dtype"]).type(value[b"data"])
    return value


class OpenpiClient:
    """`infer(observation dict) -> answer dict`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        self._opened = contextlib.ExitStack()
        self._socket = self._opened.enter_context(connect(url, compression=None, max_size=None, additional_headers=headers))
        self.metadata = msgpack.unpackb(self._socket.recv(), object_hook=unpack_array)

    def infer(self, observation: dict) -> dict:
        self._socket.send(msgpack.packb(observation, default=pack_array))
        answer = self._socket.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"Error in inference server:\n{answer}")
        return msgpack.unpackb(answer, object_hook=unpack_array)

    def close(self) -> None:
        self._opened.close()
