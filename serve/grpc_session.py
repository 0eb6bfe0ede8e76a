"""One robot's stream of observations: the newest wins, answers come in order, a reset forgets what waits.

    observe 1 -> computing            act 1
    observe 2 -> waiting
    observe 3 -> waiting, replaces 2  superseded 2
                                      act 3
Chunks of before a reset are never sent after its answer.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator

from serve import grpc_wire
from serve.protocol.policy_pb2 import Error, Reset, SessionRequest, SessionResponse, Superseded
from serve.protocol.refusal import Code, Refusal
from serve.services import Services

logger = logging.getLogger(__name__)
MAX_UNREAD = 64  # answers a client has not read; beyond that it is not reading


class Session:
    """Answers one stream; made per call."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._answers: asyncio.Queue[asyncio.Future[SessionResponse] | None] = asyncio.Queue()
        self._slots = asyncio.Semaphore(MAX_UNREAD)
        self._computing: asyncio.Task[SessionResponse] | None = None
        self._waiting: tuple[SessionRequest, asyncio.Future[SessionResponse]] | None = None

    async def run(self, requests: AsyncIterator[SessionRequest]) -> AsyncIterator[SessionResponse]:
        """Every message's answer, in the order of the messages, until the client stops sending or the server drains."""
        reading = asyncio.ensure_future(self._read(requests))
        try:
            while True:
                answer = await self._answers.get()
                if answer is None:
                    break
                yield await answer
                self._slots.release()
        finally:
            reading.cancel()
            self._supersede()  # first: what ends, though cancelled, starts what waits
            if self._computing is not None:
                self._computing.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[SessionRequest]) -> None:
        closed = asyncio.ensure_future(self.services.gate.closed.wait())
        iterator = aiter(requests)
        arriving: asyncio.Future[SessionRequest | None] | None = None
        try:
            while True:
                await self._slots.acquire()
                arriving = asyncio.ensure_future(anext(iterator, None))
                timeout = self.services.limits.idle_s
                done, _ = await asyncio.wait({arriving, closed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if arriving not in done:
                    break  # idle for too long, or draining
                request = arriving.result()
                if request is None:
                    break  # the client has sent everything
                self._take(request)
        finally:
            closed.cancel()
            if arriving is not None:
                arriving.cancel()
            self._answers.put_nowait(None)

    def _take(self, request: SessionRequest) -> None:
        future: asyncio.Future[SessionResponse] = asyncio.get_running_loop().create_future()
        self._answers.put_nowait(future)
        kind = request.WhichOneof("message")
        if kind == "observe":
            self._supersede()
            self._waiting = (request, future)
            if self._computing is None:
                self._start_next()
        elif kind == "reset":
            self._supersede()
            if self._computing is not None:
                self._computing.cancel()  # its answer is `superseded` too
            future.set_result(SessionResponse(sequence=request.sequence, reset=Reset()))
        else:
            future.set_result(_refused(request.sequence, Refusal.invalid("The message has neither observe nor reset.")))

    def _supersede(self) -> None:
        """Whatever waits is not computed any more."""
        if self._waiting is not None:
            request, future = self._waiting
            self._waiting = None
            if not future.done():
                future.set_result(SessionResponse(sequence=request.sequence, superseded=Superseded()))

    def _start_next(self) -> None:
        if self._waiting is None:
            self._computing = None
            return
        request, future = self._waiting
        self._waiting = None
        task = asyncio.ensure_future(self._compute(request))
        self._computing = task

        def finished(task: asyncio.Task[SessionResponse]) -> None:
            if not future.done():
                cancelled = SessionResponse(sequence=request.sequence, superseded=Superseded())
                future.set_result(cancelled if task.cancelled() else task.result())
            self._start_next()

        task.add_done_callback(finished)

    async def _compute(self, request: SessionRequest) -> SessionResponse:
        limits = self.services.limits
        try:
            with self.services.gate.request("grpc", "Session"):
                deadline = time.monotonic() + limits.timeout_s
                parsed = await grpc_wire.parsed(self.services.need_description(), limits, request.observe, deadline)
                (chunk,) = await self.services.act([parsed])
            return SessionResponse(sequence=request.sequence, act=grpc_wire.act_response(chunk))
        except Refusal as refusal:
            return _refused(request.sequence, refusal)
        except Exception:  # the border of the stream: the client gets a name, the log gets the rest
            logger.error("a session's observation failed:\n%s", traceback.format_exc())
            return _refused(
                request.sequence, Refusal(Code.INTERNAL, "The server failed at this observation; its log says where.")
            )


def _refused(sequence: int, refusal: Refusal) -> SessionResponse:
    error = Error(code=refusal.code.value.grpc, message=refusal.message, retry_after_s=refusal.retry_after_s or 0.0)
    return SessionResponse(sequence=sequence, error=error)
