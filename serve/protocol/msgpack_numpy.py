"""Arrays in msgpack, as openpi's clients and servers write them, with the checks that bytes from a network need.

An array is the map {b"__ndarray__": true, b"data": bytes, b"dtype": str, b"shape": [int]}, a numpy scalar the map
{b"__npgeneric__": true, b"data": scalar, b"dtype": str} (openpi packages/openpi-client/src/openpi_client/msgpack_numpy.py).
Arrays of objects, structures and complex numbers do not exist here, and nothing is ever unpickled.
"""

import math
from typing import Any

import msgpack
import numpy as np

KINDS = "biuf"  # bool, integers, floats
MAX_DIMENSIONS = 8


def pack(message: Any) -> bytes:
    """Any nesting of dict, list, str, bytes, numbers, None and arrays. Raises TypeError for anything else."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes, *, max_bytes: int) -> Any:
    """Inverse of `pack`, for bytes that anybody may have sent. Arrays are read-only views of `data`.

    Raises ValueError saying what is wrong with them.
    """
    if len(data) > max_bytes:
        raise ValueError(f"Message of {len(data)} bytes; at most {max_bytes} are read.")
    try:
        return msgpack.unpackb(
            data,
            object_hook=_decode,
            strict_map_key=False,
            max_map_len=4096,
            max_array_len=1 << 20,
        )
    except (msgpack.exceptions.UnpackException, ValueError, UnicodeDecodeError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"Not msgpack as openpi's clients write it: {reason}") from error


def _encode(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
        array = np.ascontiguousarray(value)
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": list(value.shape)}
    if isinstance(value, np.generic) and value.dtype.kind in KINDS:
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    described = f"array of {value.dtype}" if isinstance(value, np.ndarray | np.generic) else type(value).__name__
    raise TypeError(f"msgpack cannot carry a {described}; send numbers, text, bytes, lists, maps and numeric arrays.")


def _decode(value: dict[Any, Any]) -> Any:
    if value.get(b"__ndarray__") is True:
        return _array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if value.get(b"__npgeneric__") is True:
        number = value.get(b"data")
        if not isinstance(number, bool | int | float):
            raise ValueError(f"a numpy scalar whose data is {type(number).__name__}")
        try:
            return _dtype(value.get(b"dtype")).type(number)
        except OverflowError as error:
            raise ValueError(f"a numpy scalar outside its dtype: {error}") from error
    return value


def _dtype(name: Any) -> np.dtype:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in KINDS:
        raise ValueError(f"dtype {name!r:.40}; allowed are bool, integers and floats")
    return dtype


def _array(data: Any, dtype_name: Any, shape: Any) -> np.ndarray:
    dtype = _dtype(dtype_name)
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"array shape {shape!r:.60}")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
        raise ValueError(f"array shape {shape!r:.60}")
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        got = len(data) if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"an array of {dtype} {list(shape)} has {expected} bytes of data, got {got}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
