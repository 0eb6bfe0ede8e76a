"""The stream that pages subscribe to: what running evaluations and robots do. Slow readers lose events, nobody waits."""

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from serve.protocol.images import encode_jpeg
from serve.protocol.requests import ActRequest
from vla.interface import ActionChunk

BACKLOG = 64  # events a slow reader may be behind before the oldest are dropped
PING_SECONDS = 15.0
REQUEST_INTERVAL_S = 0.1  # served requests are shown at most this often


class EventHub:
    """Publish from anywhere in the loop; every subscriber gets every event, and first the last one of each kind."""

    def __init__(self) -> None:
        self._readers: set[_Reader] = set()
        self._latest: dict[str, dict[str, Any]] = {}
        self._last_request = 0.0

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    def publish(self, event: dict[str, Any]) -> None:
        """Hand one event, plain JSON values, to whoever is reading now."""
        if event["kind"] == "start":
            self._latest.clear()
        self._latest[event["kind"]] = event
        for reader in self._readers:
            reader.put(event)

    async def subscribe(self, closed: asyncio.Event) -> AsyncIterator[dict[str, Any] | None]:
        """Events from now on, None when nothing happened for a while; ends when `closed` is set."""
        reader = _Reader()
        for event in self._latest.values():
            reader.put(event)
        self._readers.add(reader)
        closing = asyncio.ensure_future(closed.wait())
        arriving: asyncio.Future[bool] | None = None
        try:
            while not closed.is_set():
                while reader.events:
                    yield reader.events.popleft()
                reader.arrival.clear()
                arriving = asyncio.ensure_future(reader.arrival.wait())
                done, _ = await asyncio.wait({arriving, closing}, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                arriving.cancel()
                if not done:
                    yield None
        finally:
            closing.cancel()
            if arriving is not None:
                arriving.cancel()
            self._readers.discard(reader)

    def publish_request(self, request: ActRequest, chunk: ActionChunk) -> None:
        """Show a served request, if somebody looks and not too often."""
        now = time.monotonic()
        if not self._readers or now - self._last_request < REQUEST_INTERVAL_S:
            return
        self._last_request = now
        observation = request.observation
        first = next(iter(observation.images.values()), None)
        image = "" if first is None else base64.b64encode(encode_jpeg(np.ascontiguousarray(first))).decode()
        event = {"run": "requests", "task": 0, "episode": 0, "step": 0, "instruction": observation.instruction}
        if image:
            self.publish({"kind": "frame", "image": image} | event)
        self.publish({"kind": "chunk"} | event | chunk_fields(chunk))


class _Reader:
    """One subscriber's backlog."""

    def __init__(self) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=BACKLOG)
        self.arrival = asyncio.Event()

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.arrival.set()


def chunk_fields(chunk: ActionChunk) -> dict[str, Any]:
    """A chunk as the page draws it: lists of numbers."""
    fields: dict[str, Any] = {"actions": _rounded(chunk.actions)}
    if "confidence" in chunk.info:
        fields["confidence"] = _rounded(chunk.info["confidence"])
    if "committed" in chunk.info:
        fields["committed"] = np.asarray(chunk.info["committed"]).astype(int).tolist()
    fields["rounds"] = int(chunk.info.get("rounds", 0))
    fields["milliseconds"] = float(chunk.info.get("milliseconds", 0.0))
    return fields


def sse(event: dict[str, Any] | None) -> bytes:
    """One server-sent event; a comment for None."""
    return b": ping\n\n" if event is None else f"data: {json.dumps(event)}\n\n".encode()


def _rounded(values: Sequence[Any] | np.ndarray) -> list[Any]:
    return np.round(np.asarray(values, dtype=np.float64), 4).tolist()
