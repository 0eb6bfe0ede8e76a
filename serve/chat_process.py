"""The server's end of the language side: requests to the engine's process, pieces back, restart and swap."""

import asyncio
import functools
import itertools
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from serve.chat import ChatEnd, ChatPiece, ChatRequest, TokenProbability
from serve.metrics import Metrics
from serve.protocol.refusal import Code, Refusal
from serve.worker_keeper import WorkerKeeper
from serve.worker_process import WorkerDied, WorkerProcess

START_TIMEOUT_S = 600.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatSource:
    """Which language model is served, and on what."""

    path: str = ""  # checkpoint folder of a vision-language model
    name: str = "vlm"  # what clients call it
    dtype: str = "float32"  # float32 | bfloat16 | float64
    device: str = "cpu"
    threads: int | None = None  # of torch; default: the cores but one, OMP_NUM_THREADS wins
    engine: dict[str, Any] = field(default_factory=dict)  # serve.engine.EngineConfig, e.g. '{max_batch: 4, context: 1024}'
    factory: str = ""  # module:function that makes another serve.engine.Engine
    arguments: dict[str, Any] = field(default_factory=dict)  # of such a factory

    @property
    def is_given(self) -> bool:
        return bool(self.path or self.factory)

    def settings(self, draft: str) -> dict[str, Any]:
        """What the worker process is told."""
        threads = self.threads
        if threads is None and not os.environ.get("OMP_NUM_THREADS"):
            threads = max(1, (os.cpu_count() or 1) - 1)
        return {
            "path": self.path,
            "draft": draft,
            "dtype": self.dtype,
            "device": self.device,
            "threads": threads,
            "engine": self.engine,
            "factory": self.factory,
            "arguments": self.arguments,
        }


class ChatProcess:
    """A `ChatBackend` whose engine is in another process."""

    def __init__(self, source: ChatSource, draft: str, metrics: Metrics) -> None:
        self.source, self.draft, self.metrics, self.name = source, draft, metrics, source.name
        self._keeper = WorkerKeeper("chat", self._start_worker, metrics, took=self._took, died=self._died)
        self._numbers = itertools.count()
        self._streams: dict[int, asyncio.Queue[dict[str, Any] | Refusal]] = {}
        self._owners: dict[int, WorkerProcess] = {}  # which process answers a stream
        self._closing = False
        self.checkpoint = ""

    async def start(self) -> None:
        """Load and warm up. Raises ValueError or OSError saying why the model cannot be served."""
        await self._keeper.start()

    async def close(self) -> None:
        self._closing = True
        for rows in self._streams.values():
            rows.put_nowait(Refusal(Code.UNAVAILABLE, "The server is stopping."))
        await self._keeper.close()

    @property
    def ready(self) -> bool:
        return self._keeper.worker is not None and not self._closing

    @property
    def max_images(self) -> int | None:
        return None if self._keeper.worker is None else self._keeper.worker.hello["max_images"]

    @property
    def worker_pid(self) -> int | None:
        return None if self._keeper.worker is None else self._keeper.worker.pid

    async def load(self) -> WorkerProcess:
        """What is at the configured paths now, for `swap`. Raises Refusal if it cannot be loaded."""
        return await self._keeper.load()

    async def swap(self, new: WorkerProcess) -> tuple[str, str]:
        """Serve what was loaded, at once; (previous, new) content hash. Running answers end on the old model."""
        previous = self.checkpoint
        old = self._keeper.swap(new)
        if old is not None:
            while any(owner is old for owner in self._owners.values()):
                await asyncio.sleep(0.02)
            await old.close()
        return previous, self.checkpoint

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatPiece | ChatEnd]:
        """See `ChatBackend.stream`."""
        worker = self._keeper.worker
        if worker is None:
            raise Refusal(Code.UNAVAILABLE, "The language model's process is being restarted.")
        number = next(self._numbers)
        rows = self._streams[number] = asyncio.Queue()
        self._owners[number] = worker
        ended = False
        try:
            try:
                await worker.post({"ask": number} | chat_message(request))
            except WorkerDied as error:
                raise Refusal(Code.UNAVAILABLE, f"{error} It is being restarted.") from error
            while not ended:
                row = await rows.get()
                if isinstance(row, Refusal):
                    ended = True
                    raise row
                event = chat_event(row)
                ended = isinstance(event, ChatEnd)
                yield event
        finally:
            self._streams.pop(number, None)
            self._owners.pop(number, None)
            if not ended and not worker.died.done():
                await worker.post({"cancel": number})

    async def _start_worker(self) -> WorkerProcess:
        settings = self.source.settings(self.draft)
        return await WorkerProcess.start("serve.chat_worker", settings, timeout_s=START_TIMEOUT_S, on_message=functools.partial(self._take, {}))

    def _took(self, worker: WorkerProcess) -> None:
        self.checkpoint = worker.hello["checkpoint"]
        self.metrics.set_model(self.name, self.checkpoint)

    def _died(self, worker: WorkerProcess, reason: str) -> None:
        for number, owner in self._owners.items():
            if owner is worker:
                self._streams[number].put_nowait(Refusal(Code.UNAVAILABLE, reason))

    def _take(self, counted: dict[str, Any], message: dict[str, Any]) -> None:
        """A worker's message; `counted`: what it has said of its counters so far."""
        for row in message["events"]:
            rows = self._streams.get(row["number"])
            if rows is not None:
                rows.put_nowait(chat_refusal(row) or row)
            if "tokens" in row and row["tokens"]:
                self.metrics.tokens_per_round.observe(row["tokens"])
        if message.get("stats"):
            self._count(dict(counted), message["stats"])
            counted.update(message["stats"])

    def _count(self, before: dict[str, Any], stats: dict[str, Any]) -> None:
        """The engine's counters since it started -> ours, which survive its restarts."""
        for kind in ("prompt", "completion", "drafted", "accepted"):
            self.metrics.tokens.labels(kind).inc(max(0, stats[kind] - before.get(kind, 0)))
        self.metrics.chat_rounds.inc(max(0, stats["rounds"] - before.get("rounds", 0)))
        for result in ("hits", "misses"):
            name = f"image_cache_{result}"
            self.metrics.image_cache.labels(result).inc(max(0, stats[name] - before.get(name, 0)))
        earlier = before.get("accepted_per_position", [])
        for position, count in enumerate(stats["accepted_per_position"]):
            more = count - (earlier[position] if position < len(earlier) else 0)
            self.metrics.accepted.labels(str(position)).inc(max(0, more))


def chat_message(request: ChatRequest) -> dict[str, Any]:
    """A request as serve/chat_worker.py reads it, but for its number."""
    return vars(request) | {
        "messages": [list(message) for message in request.messages],
        "images": list(request.images),
        "stop": list(request.stop),
        "logit_bias": [[token, bias] for token, bias in request.logit_bias.items()],
    }


def chat_event(row: dict[str, Any]) -> ChatPiece | ChatEnd:
    """What an event of serve/chat_worker.py says; `chat_refusal` first."""
    if "reason" in row:
        return ChatEnd(row["reason"], row["usage"])
    logprobs = None
    if "logprobs" in row:
        logprobs = tuple(
            TokenProbability(token, logprob, tuple((other, value) for other, value in top)) for token, logprob, top in row[
                "logprobs"
            ]
        )
    return ChatPiece(row["text"], row["tokens"], row["accepted"], logprobs)


def chat_refusal(row: dict[str, Any]) -> Refusal | None:
    """What an event refuses or fails; None for all others."""
    if "overloaded" in row:
        return Refusal(Code.OVERLOADED, row["overloaded"], retry_after_s=row["retry_after"], field=None, name="queue_full")
    if "refused" in row:
        return Refusal(Code.INVALID, row["refused"], field=row["field"], name=row["code"])
    if row.get("reason") == "error":
        logger.error("chat: a request failed in the engine: %s", row["error"])
        return Refusal(Code.INTERNAL, "The language model failed at this request; the server's log says where.")
    return None
