"""uvicorn inside somebody else's event loop and signal handling, with a time limit on a connection's headers."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.protocol.limits import Limits

MAX_HEADER_BYTES = 64 << 10


def header_limited(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol that hangs up on whoever opens a connection and does not send complete headers soon.

    uvicorn limits the time between requests only; without this, sockets that send a byte a minute would pile up.
    """

    class HeaderLimited(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._got_headers()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is not None:
                self._header_bytes += len(data)
            super().data_received(data)
            if self._deadline is not None and self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_headers()

        def on_headers_complete(self) -> None:
            self._got_headers()
            super().on_headers_complete()

        def _expect_headers(self) -> None:
            if self._deadline is None:
                self._header_bytes = 0
                self._deadline = self.loop.call_later(limits.header_s, self.transport.close)

        def _got_headers(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return HeaderLimited


class HttpServer(uvicorn.Server):
    """`start`, then `stop`; signals are the owner's business."""

    def __init__(self, app: Any, host: str, port: int, limits: Limits, context: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=header_limited(limits),
            ws_max_size=limits.body_bytes,
            ws_per_message_deflate=False,  # openpi's client offers none; and a compressed bomb cannot come in
            limit_concurrency=4 * (limits.concurrency + limits.streams),  # connections; the gate counts requests
            timeout_keep_alive=30,
            lifespan="off",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_config=None,
        )
        config.load()
        config.ssl = context
        super().__init__(config)
        self._address = (host, port)
        self._running: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def start(self) -> int:
        """Listen; the port. Raises OSError if it is taken or the address is not ours."""
        listener = _listener(*self._address, self.config.backlog)
        self._running = asyncio.ensure_future(self.serve(sockets=[listener]))
        while not self.started and not self._running.done():
            await asyncio.sleep(0.01)
        return listener.getsockname()[1]

    def stop_accepting(self) -> None:
        """Close the listening socket; open connections go on."""
        for server in self.servers:
            server.close()

    async def stop(self, grace_s: float) -> None:
        """Close idle connections, wait for the others, cut what remains after the grace."""
        self.config.timeout_graceful_shutdown = max(0.1, grace_s)
        self.should_exit = True
        await self._running


def _listener(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket. Its protocol is named: asyncio sets TCP_NODELAY only then, and an answer takes 40 ms without."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"Cannot listen on {host}:{port}: {error.strerror}. Is another server there?") from error
    return listener
