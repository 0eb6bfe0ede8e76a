"""The server's end of an encoder: one request at a time to its process, a bounded line before it, restart and swap."""

import asyncio
import time
from collections.abc import Mapping

import numpy as np

from serve.metrics import Metrics
from serve.protocol.refusal import Code, Refusal
from serve.protocol.tensors import datatype_of, to_raw
from serve.tensor_model import EncoderSource, Signature
from serve.worker_keeper import WorkerKeeper
from serve.worker_process import WorkerDied, WorkerProcess

START_TIMEOUT_S = 300.0


class TensorProcess:
    """A TensorModel in another process. Requests are batches already, so they are computed in turn."""

    def __init__(self, name: str, source: EncoderSource, metrics: Metrics) -> None:
        self.name, self.source, self.metrics = name, source, metrics
        self._keeper = WorkerKeeper(name, self._start_worker, metrics, took=self._took, died=lambda worker, reason: None)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._seconds = 0.0  # of a request, moving average
        self.signature: Signature | None = None

    async def start(self) -> None:
        """Load and warm up. Raises ValueError or OSError saying why the model cannot be served."""
        await self._keeper.start()

    async def close(self) -> None:
        await self._keeper.close()

    @property
    def ready(self) -> bool:
        return self._keeper.worker is not None

    async def load(self) -> WorkerProcess:
        """What the factory makes now, for `swap`. Raises Refusal if it cannot be loaded."""
        return await self._keeper.load()

    async def swap(self, new: WorkerProcess) -> tuple[str, str]:
        """Serve what was loaded, at once; (previous, new) content hash."""
        previous = self.signature
        old = self._keeper.swap(new)
        async with self._turn:  # the old one's last request is done
            if old is not None:
                await old.close()
        return previous.checkpoint, self.signature.checkpoint

    async def infer(self, tensors: Mapping[str, np.ndarray], deadline: float) -> dict[str, np.ndarray]:
        """Outputs by name. Raises Refusal; what is late is not computed."""
        if self._waiting >= self.source.queue:
            text = f"{self._waiting} requests wait for {self.name!r}, that is the limit."
            raise Refusal(Code.OVERLOADED, text, retry_after_s=max(0.05, self._waiting * self._seconds))
        self._waiting += 1
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._turn.acquire()
                asking = asyncio.ensure_future(self._ask(tensors, deadline))
                asking.add_done_callback(self._end_turn)  # whoever gives up leaves the worker busy, and the turn taken
                return await asyncio.shield(asking)
        except TimeoutError:
            raise Refusal(Code.DEADLINE, "No answer within the deadline; give more time or send less.") from None
        finally:
            self._waiting -= 1

    def _end_turn(self, asking: asyncio.Task[dict[str, np.ndarray]]) -> None:
        self._turn.release()
        if not asking.cancelled():
            asking.exception()  # seen, even if nobody waits for it any more

    async def _ask(self, tensors: Mapping[str, np.ndarray], deadline: float) -> dict[str, np.ndarray]:
        if deadline <= time.monotonic():
            raise Refusal(Code.DEADLINE, "The deadline passed before the request was computed.")
        worker = self._keeper.worker
        if worker is None:
            raise Refusal(Code.UNAVAILABLE, f"The process of {self.name!r} is being restarted.")
        packed = [[name, datatype_of(array), list(array.shape), to_raw(array)] for name, array in tensors.items()]
        try:
            reply = await worker.ask({"tensors": packed}, timeout_s=self.source.compute_timeout_s)
        except WorkerDied as error:
            self._keeper.forget(worker)
            raise Refusal(Code.UNAVAILABLE, f"{error} It is being restarted.") from error
        if "refused" in reply:
            raise Refusal.invalid(reply["refused"])
        if "error" in reply:
            raise Refusal(Code.INTERNAL, f"The encoder failed ({reply['error']}); the server's log says where.")
        self._seconds += (0.1 if self._seconds else 1.0) * (reply["seconds"] - self._seconds)
        return reply["tensors"]

    async def _start_worker(self) -> WorkerProcess:
        settings = {"factory": self.source.factory, "arguments": self.source.arguments}
        return await WorkerProcess.start("serve.tensor_worker", settings, timeout_s=START_TIMEOUT_S)

    def _took(self, worker: WorkerProcess) -> None:
        self.signature = Signature.from_dict(worker.hello)
        self.metrics.set_model(self.name, self.signature.checkpoint)
