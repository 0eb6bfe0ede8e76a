"""Who may come in now: one count of requests and streams over all protocols, and the door that closes for draining."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.metrics import Metrics
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal


@dataclass
class Record:
    """What will be counted of a request."""

    method: str
    code: str = ""  # written by a handler that has codes of its own; else OK if it returns, INTERNAL if it does not


class Gate:
    """Admission of requests of any protocol."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.draining = False
        self.closed = asyncio.Event()  # set when draining begins: streams end
        self._requests = 0
        self._streams = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def in_flight(self) -> int:
        return self._requests

    @contextmanager
    def request(self, protocol: str, method: str) -> Iterator[Record]:
        """Count one request while it is handled. Raises Refusal (counted too) when there are too many, or when draining."""
        record, began = Record(method), time.perf_counter()
        admitted = False
        try:
            self._check_open()
            if self._requests >= self.limits.concurrency:
                raise Refusal(
                    Code.OVERLOADED, f"{self._requests} requests are being handled, that is the limit.", retry_after_s=0.1
                )
            admitted = True
            self._enter(1)
            with self.metrics.in_flight.labels(protocol).track_inprogress():
                yield record
            record.code = record.code or "OK"
        except Refusal as refusal:
            record.code = _name(protocol, refusal.code)
            raise
        except asyncio.CancelledError:
            record.code = "CANCELLED"
            raise
        finally:
            if admitted:
                self._enter(-1)
            self.metrics.requests.labels(protocol, record.method, record.code or _name(protocol, Code.INTERNAL)).inc()
            self.metrics.request_seconds.labels(protocol, record.method).observe(time.perf_counter() - began)

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Count one long-lived connection. Its single requests pass `request` each."""
        self.check_stream()
        self._streams += 1
        try:
            with self.metrics.streams.labels(kind).track_inprogress():
                yield
        finally:
            self._streams -= 1

    def check_stream(self) -> None:
        """Raise Refusal unless one more stream may be opened."""
        self._check_open()
        if self._streams >= self.limits.streams:
            raise Refusal(Code.OVERLOADED, f"{self._streams} streams are open, that is the limit.", retry_after_s=1.0)

    def close(self) -> None:
        """Let nobody in any more."""
        self.draining = True
        self.closed.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no request is being handled; False if some still are after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _check_open(self) -> None:
        if self.draining:
            raise Refusal(Code.UNAVAILABLE, "The server is draining; ask another replica, or this one after its restart.")

    def _enter(self, change: int) -> None:
        self._requests += change
        if self._requests:
            self._empty.clear()
        else:
            self._empty.set()


def _name(protocol: str, code: Code) -> str:
    """Of a code, in the metrics."""
    return str(code.value.http) if protocol == "http" else code.name
