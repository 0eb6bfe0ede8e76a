"""Messages over a local socket between a server and its worker process: length, then msgpack. Both ends are ours."""

import asyncio
import socket
import struct
from typing import Any

from serve.protocol import msgpack_numpy

_LENGTH = struct.Struct("<I")
MAX_BYTES = 1 << 31  # a batch of observations; the server has checked each of them


def frame(message: Any) -> bytes:
    """The bytes of one message."""
    data = msgpack_numpy.pack(message)
    return _LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError when the other end is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return msgpack_numpy.unpack(await reader.readexactly(length), max_bytes=MAX_BYTES)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EOFError("the other end of the worker's socket is gone") from error


def receive(connection: socket.socket) -> Any:
    """`read_frame` for the side that blocks."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return msgpack_numpy.unpack(bytes(_receive_exactly(connection, length)), max_bytes=MAX_BYTES)


def send(connection: socket.socket, message: Any) -> None:
    """Send one message, blocking."""
    connection.sendall(frame(message))


def _receive_exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError("the server is gone")
        view = view[count:]
    return data
