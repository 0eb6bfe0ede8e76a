"""openpi's wire: connect, get the metadata, then send observations and get chunks, msgpack both ways.

Its published client (packages/openpi-client) works unchanged: `/` is its path, `Authorization: Api-Key KEY` its key. What
differs for the better: messages may be pipelined (answers come in order), so one connection can fill a batch; a refused
observation is answered by a text frame, which that client raises as an error, and the connection lives on. Text frames
read "CODE: message" (serve/protocol/refusal.py).
"""

import asyncio
import logging
import time
import traceback
from typing import Any

from fastapi import APIRouter, Response, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from serve.http_guard import refusal_response
from serve.protocol import msgpack_numpy
from serve.protocol.observations import answer_of, metadata_of, request_of
from serve.protocol.refusal import Code, Refusal
from serve.services import Services

BIG_MESSAGE = 1 << 20  # bytes; parsed on a thread
GOING_AWAY = 1001
logger = logging.getLogger(__name__)


def websocket_router(services: Services) -> APIRouter:
    """One route, under the names that openpi's clients and vLLM-Omni's use."""
    router = APIRouter()

    async def serve(websocket: WebSocket) -> None:
        try:
            description = services.need_policy().description
        except Refusal as refusal:
            status, headers, body = refusal_response("/", refusal)
            response = Response(body, status)
            response.raw_headers = headers
            await websocket.send_denial_response(response)
            return
        await websocket.accept()
        await websocket.send_bytes(msgpack_numpy.pack(metadata_of(description)))
        await _Connection(services, websocket).run()

    for path in ("/", "/v1/realtime/robot/openpi"):
        router.add_api_websocket_route(path, serve)
    return router


class _Connection:
    """Reads ahead a few messages, answers in order."""

    def __init__(self, services: Services, websocket: WebSocket) -> None:
        self.services, self.websocket = services, websocket
        self._slots = asyncio.Semaphore(services.limits.pipelined)  # messages read but not answered
        self._answers: asyncio.Queue[asyncio.Task[bytes | str]] = asyncio.Queue()
        self._previous_ms: float | None = None

    async def run(self) -> None:
        """Until either side hangs up, nothing comes for a long time, or the server drains."""
        reading = asyncio.ensure_future(self._read())
        writing = asyncio.ensure_future(self._write())
        draining = asyncio.ensure_future(self.services.gate.closed.wait())
        try:
            done, _ = await asyncio.wait({reading, writing, draining}, return_when=asyncio.FIRST_COMPLETED)
            if reading not in done and writing not in done:
                reading.cancel()
                answered = asyncio.ensure_future(self._answers.join())
                await asyncio.wait({answered, writing}, return_when=asyncio.FIRST_COMPLETED)  # unless the client has gone
                answered.cancel()
            code = reading.result() if reading in done and not reading.cancelled() else GOING_AWAY
        finally:
            for task in (reading, writing, draining):
                task.cancel()
            await asyncio.gather(reading, writing, draining, return_exceptions=True)
            while not self._answers.empty():
                self._answers.get_nowait().cancel()
        if self.websocket.client_state is WebSocketState.CONNECTED:
            await self.websocket.close(code)

    async def _read(self) -> int:
        """Start answering each message; the close code when there is no more to read."""
        while True:
            await self._slots.acquire()
            try:
                async with asyncio.timeout(self.services.limits.idle_s):
                    message = await self.websocket.receive()
            except TimeoutError:
                return GOING_AWAY
            if message["type"] == "websocket.disconnect":
                return message.get("code", GOING_AWAY)
            self._answers.put_nowait(asyncio.ensure_future(self._answer(message.get("bytes"))))

    async def _write(self) -> None:
        while True:
            task = await self._answers.get()
            try:
                answer = await task
                if isinstance(answer, str):
                    await self.websocket.send_text(answer)
                else:
                    await self.websocket.send_bytes(answer)
            except (WebSocketDisconnect, RuntimeError):
                return  # the client is gone
            finally:
                self._answers.task_done()
                self._slots.release()

    async def _answer(self, data: bytes | None) -> bytes | str:
        began = time.perf_counter()
        try:
            with self.services.gate.request("websocket", "infer"):
                if data is None:
                    raise Refusal.invalid("A text message; observations are binary msgpack messages.")
                answer = await self._infer(data)
        except Refusal as refusal:
            return refusal.line
        except Exception:  # the border of the connection: the client gets a name, the log gets the rest
            logger.error("a WebSocket message failed:\n%s", traceback.format_exc())
            return Refusal(Code.INTERNAL, "The server failed at this message; its log says where.").line
        total_ms = 1000 * (time.perf_counter() - began)
        answer["server_timing"] = {"infer_ms": total_ms}
        if self._previous_ms is not None:
            answer["server_timing"]["prev_total_ms"] = self._previous_ms
        self._previous_ms = total_ms
        return msgpack_numpy.pack(answer)

    async def _infer(self, data: bytes) -> dict[str, Any]:
        services = self.services
        description = services.need_description()

        def parse() -> Any:
            try:
                message = msgpack_numpy.unpack(data, max_bytes=services.limits.body_bytes)
            except ValueError as error:
                raise Refusal.invalid(error) from error
            return request_of(description, services.limits, message)

        request = parse() if len(data) < BIG_MESSAGE else await asyncio.to_thread(parse)
        (chunk,) = await services.act([request])
        return answer_of(chunk)
