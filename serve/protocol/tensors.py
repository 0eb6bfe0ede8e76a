"""Tensors of the Open Inference Protocol: datatypes, JSON values and raw bytes <-> numpy, checked before they are made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.protocol.refusal import Refusal

NUMERIC = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPES = (*NUMERIC, "BYTES")
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"  # of HTTP, where raw tensors follow the JSON: its bytes
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model's signature; -1 in a shape stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


def check_shape(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Number of elements. Raises Refusal unless datatype and shape are possible."""
    if datatype not in DATATYPES:
        raise Refusal.invalid(f"Input {name!r} has datatype {datatype!r}; allowed: {', '.join(DATATYPES)}.")
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise Refusal.invalid(
            f"Input {name!r} has shape {list(shape)[:9]}; sizes are >= 0, in at most {MAX_DIMENSIONS} dimensions."
        )
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise Refusal.invalid(f"Input {name!r} would have {count} elements; at most {MAX_ELEMENTS} are accepted.")
    return count


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    """Little-endian row-major bytes -> array, a read-only view; BYTES -> object array of bytes (4-byte lengths before each)."""
    count = check_shape(name, datatype, shape)
    if datatype == "BYTES":
        return _objects(_split_bytes(name, data, count), shape)
    dtype = NUMERIC[datatype]
    if len(data) != count * dtype.itemsize:
        raise Refusal.invalid(
            f"Input {name!r} carries {len(data)} bytes; {datatype} {list(shape)} has {count * dtype.itemsize}."
        )
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def from_values(name: str, datatype: str, shape: Sequence[int], values: Any) -> np.ndarray:
    """JSON data, flat or nested, or a protobuf repeated field -> array. Raises Refusal on a wrong count, type or range."""
    count = check_shape(name, datatype, shape)
    if datatype == "BYTES":
        return _objects(_texts(name, values, count), shape)
    try:
        array = np.array(values)
    except (ValueError, OverflowError) as error:
        raise Refusal.invalid(f"The data of input {name!r} is ragged or too large: {error}") from error
    if array.size != count:
        raise Refusal.invalid(f"Input {name!r} carries {array.size} values; its shape {list(shape)} has {count}.")
    dtype = NUMERIC[datatype]
    allowed = {"b": "b", "u": "biu", "i": "biu", "f": "biuf"}[dtype.kind]
    if count and array.dtype.kind not in allowed:
        raise Refusal.invalid(f"The data of input {name!r} does not consist of {datatype} values.")
    if dtype.kind in "ui" and count:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(array.min()) < low or int(array.max()) > high:
            raise Refusal.invalid(f"The data of input {name!r} leaves the range of {datatype}, {low} to {high}.")
    with np.errstate(over="ignore"):
        return array.astype(dtype).reshape(shape)


def to_raw(array: np.ndarray) -> bytes:
    """The bytes `from_raw` reads."""
    if array.dtype == object:
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.flat)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def to_values(array: np.ndarray) -> list[Any]:
    """Flat JSON values; float32 values come back as the same float32."""
    if array.dtype == object:
        return [item.decode("utf-8", errors="replace") for item in array.flat]
    return array.reshape(-1).tolist()


def datatype_of(array: np.ndarray) -> str:
    if array.dtype == object:
        return "BYTES"
    return next(name for name, dtype in NUMERIC.items() if dtype == array.dtype.newbyteorder("<"))


def texts(name: str, array: np.ndarray) -> list[str]:
    """A BYTES tensor as UTF-8 texts."""
    try:
        return [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise Refusal.invalid(f"Input {name!r} is not UTF-8 text: {error}") from error


def _objects(items: list[bytes], shape: Sequence[int]) -> np.ndarray:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _split_bytes(name: str, data: bytes, count: int) -> list[bytes]:
    items, position = [], 0
    while position < len(data):
        if len(items) == count or position + 4 > len(data):
            break
        length = int.from_bytes(data[position : position + 4], "little")
        if position + 4 + length > len(data):
            break
        items.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    if position != len(data) or len(items) != count:
        raise Refusal.invalid(
            f"Input {name!r} is no BYTES tensor of {count} elements: each is a 4-byte little-endian length and that many bytes."
        )
    return items


def _texts(name: str, values: Any, count: int) -> list[bytes]:
    flat = list(_flatten(values, MAX_DIMENSIONS))
    if len(flat) != count or not all(isinstance(value, str | bytes) for value in flat):
        raise Refusal.invalid(f"Input {name!r} must carry {count} strings, as its shape says.")
    try:
        return [value.encode() if isinstance(value, str) else value for value in flat]
    except UnicodeEncodeError as error:
        raise Refusal.invalid(f"Input {name!r} holds text that is not Unicode: {error}") from error


def _flatten(values: Any, depth: int) -> Any:
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, list | tuple) and depth > 0:
            yield from _flatten(value, depth - 1)
        else:
            yield value
