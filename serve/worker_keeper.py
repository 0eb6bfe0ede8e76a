"""Keeps one worker process of a kind: starts it, brings another when it dies, swaps it for one with a new checkpoint."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from serve.metrics import Metrics
from serve.protocol.refusal import Code, Refusal
from serve.worker_process import WorkerDied, WorkerProcess

logger = logging.getLogger(__name__)
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 30.0  # between attempts to start a worker that cannot be started


class WorkerKeeper:
    """`worker` is the one to talk to, or None while there is none.

    start_worker: makes a warm one. took: called with each worker that comes into service. died: called with each that ends,
    in service or swapped out, and the reason; whoever waits for it must be told then. `worker` is another by then, or None.
    """

    def __init__(
        self,
        name: str,
        start_worker: Callable[[], Awaitable[WorkerProcess]],
        metrics: Metrics,
        *,
        took: Callable[[WorkerProcess], None],
        died: Callable[[WorkerProcess, str], None],
    ) -> None:
        self.name, self._start_worker, self._metrics, self._took, self._died = name, start_worker, metrics, took, died
        self.worker: WorkerProcess | None = None
        self._latest: WorkerProcess | None = None  # also while it is known to be dead
        self._watching: set[asyncio.Task[None]] = set()  # one task per worker

    async def start(self) -> None:
        """Raises ValueError or OSError saying why the model cannot be served."""
        try:
            self._use(await self._start_worker())
        except WorkerDied as error:
            raise ValueError(f"{error} Its own words are above.") from error

    async def close(self) -> None:
        watching = list(self._watching)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        if self.worker is not None:
            await self.worker.close()
            self.worker = None

    def forget(self, worker: WorkerProcess) -> None:
        """This one is dead, though its end has not been seen yet."""
        if worker is self.worker:
            self.worker = None

    async def load(self) -> WorkerProcess:
        """A new worker beside the one in service, for `swap`. Raises Refusal if it cannot be started."""
        try:
            return await self._start_worker()
        except (ValueError, OSError, WorkerDied) as error:
            raise Refusal(Code.CONFLICT, f"The checkpoint was not swapped, the old one goes on. {error}") from error

    def swap(self, new: WorkerProcess) -> WorkerProcess | None:
        """Bring `new` into service; the old one, which the caller lets finish its work and closes."""
        old = self.worker
        self._use(new)
        return old

    def _use(self, worker: WorkerProcess) -> None:
        self.worker = self._latest = worker
        task = asyncio.create_task(self._watch(worker))
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)
        self._took(worker)

    async def _watch(self, worker: WorkerProcess) -> None:
        """Until it ends and, if it was the one in service, another is."""
        reason = await asyncio.shield(worker.died)
        if worker is not self._latest:  # it was swapped out
            self._died(worker, reason)
            return
        died = time.monotonic()
        logger.error("%s: %s", self.name, reason)
        self._metrics.restarts.labels(self.name).inc()
        self.worker = None
        self._died(worker, f"{reason} It is being restarted.")
        await self._start_again(worker)
        seconds = time.monotonic() - died
        self._metrics.recovery_seconds.labels(self.name).set(seconds)
        logger.warning("%s: the worker is back after %.2f s", self.name, seconds)

    async def _start_again(self, dead: WorkerProcess) -> None:
        pause_s = FIRST_PAUSE_S
        while self._latest is dead:
            try:
                new = await self._start_worker()
            except (ValueError, OSError, WorkerDied) as error:
                logger.error("%s: %s Trying again in %.1f s.", self.name, error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(MAX_PAUSE_S, 2 * pause_s)
            else:
                if self._latest is dead:
                    self._use(new)
                else:
                    await new.close()  # a swap was faster
