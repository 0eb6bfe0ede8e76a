"""Reading requests whose sender may be slow, gone, or sending too much."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal


T = TypeVar("T")


class ClientGone(Refusal):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(Code.INVALID, "The client closed the connection.")


async def read_body(request: Request, limits: Limits, *, max_bytes: int | None = None) -> bytes:
    """The whole body. Raises Refusal if it is too large, compressed, or does not come in time."""
    most = max_bytes or limits.body_bytes
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise Refusal(Code.WRONG_TYPE, f"The body is compressed ({encoding[:20]}); send it as it is.")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and len(announced) < 20 and int(announced) > most:
        raise Refusal(Code.TOO_LARGE, f"A body of {announced} bytes; at most {most} are read.")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > most:
                    raise Refusal(Code.TOO_LARGE, f"The body is longer than {most} bytes.")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(Code.SLOW_BODY, f"The body did not arrive within {limits.body_s:.0f} s.") from None


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client hangs up. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
