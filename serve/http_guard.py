"""What stands before every HTTP and WebSocket route: names, origins, keys, concurrency, counts, errors without tracebacks."""

import json
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.protocol.refusal import Code, Refusal
from serve.security import host_name
from serve.services import Services

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Probes and the page's own files need no key: an orchestrator has none, and the page asks for it.
OPEN_PATHS = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/")
OPEN_PREFIX = "/page/"
UNCOUNTED = (*OPEN_PATHS, "/metrics", "/events")  # answered even when the server is full; a stream counts itself
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    ),
)
logger = logging.getLogger(__name__)


class HttpGuard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], services: Services) -> None:
        self.app, self.services = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = _Response(scope, receive, send)
        try:
            self._check(scope)
            if scope["path"] in UNCOUNTED or scope["path"].startswith(OPEN_PREFIX):
                await self.app(scope, response.receive, response.send)
                return
            with self.services.gate.request("http", "unmatched") as record:
                try:
                    await self.app(scope, response.receive, response.send)
                    record.code = str(response.status)
                finally:
                    if _route(scope):
                        record.method = f"{scope['method']} {_route(scope)}"
        except Refusal as refusal:
            await response.refuse(scope, refusal)
        except Exception:  # the border of the process: the client gets a name, the log gets the rest
            logger.error("%s %s failed:\n%s", scope["method"], scope["path"], traceback.format_exc())
            await response.refuse(scope, Refusal(Code.INTERNAL, "The server failed at this request; its log says where."))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            with self.services.gate.stream("websocket"):
                await self.app(scope, receive, send)
        except Refusal as refusal:
            # Before the handshake: an HTTP answer instead of an upgrade. After it, the route has closed the socket itself.
            await receive()
            if "websocket.http.response" in scope.get("extensions", {}):
                status, headers, body = refusal_response(scope["path"], refusal)
                await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
                await send({"type": "websocket.http.response.body", "body": body})
            else:
                await send({"type": "websocket.close", "code": 1008})

    def _check(self, scope: Scope) -> None:
        """Raise Refusal unless the request may come in at all."""
        path = scope["path"]
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS and (path in OPEN_PATHS or path.startswith(OPEN_PREFIX)):
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        hosts = self.services.hosts
        # A page of another site may make a browser send requests here, under its own name (DNS rebinding) or across origins.
        if hosts is not None and host_name(host) not in hosts:
            raise Refusal(Code.FORBIDDEN, f"This server does not answer as {host_name(host)!r:.80}; add it to security.hosts.")
        writes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if origin is not None and writes and origin.partition("://")[2] != host:
            raise Refusal(Code.FORBIDDEN, f"A page of {origin!r:.80} may not write here.")
        if not self.services.keys.accept(headers.get(b"authorization")):
            raise Refusal(Code.UNAUTHENTICATED, "This server needs a key: send the header Authorization: Bearer KEY.")


class _Response:
    """Remembers whether an answer began, and adds the headers that every answer has.

    A connection whose request was not read to its end is closed after the answer: else its sender could go on for ever.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send, self.status = receive, send, 0
        names = {name: value for name, value in scope["headers"]}
        self._unread = b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *HEADERS, *([(b"connection", b"close")] if self._unread else [])]
        await self._send(message)

    async def refuse(self, scope: Scope, refusal: Refusal) -> None:
        if self.status:
            return  # the answer is on its way; cutting it is all that is left
        status, headers, body = refusal_response(scope["path"], refusal)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def refusal_response(path: str, refusal: Refusal) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of a refusal, in the form of the API that the path belongs to."""
    if path.startswith("/v1"):
        body = json.dumps({"error": openai_error(refusal)}).encode()
    else:
        body = json.dumps({"error": refusal.message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after_s is not None:  # whole seconds for everybody, milliseconds for clients that read them
        headers.append((b"retry-after", str(math.ceil(refusal.retry_after_s)).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(1000 * refusal.retry_after_s)).encode()))
    if refusal.code is Code.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    return refusal.code.value.http, headers, body


def openai_error(refusal: Refusal) -> dict[str, str | None]:
    return {"message": refusal.message, "type": refusal.code.value.openai, "param": refusal.field, "code": refusal.name}


def _route(scope: Scope) -> str:
    """The matched route's template, "" if none matched."""
    return getattr(scope.get("route"), "path", "")
