"""The server's end of a policy: a bounded queue, batches, deadlines, restart after a death, swap of the checkpoint.

    admitted -> queue -> (expired ones leave) -> batch -> worker process -> chunks

Batches form by themselves while the worker computes. Once it is free, a batch waits until as many observations are there as
robots were being served when the last batch ended (in it or waiting), but no longer than max_wait_ms, nor than half of what
a batch takes to compute: one robot alone never waits, eight robots become batches of eight instead of one and seven in
turn. A chunk depends on its own observation, known actions and seed; batch mates change it by no more than torch's rounding
between batch sizes (2e-7 in an action at the desk preset).
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.metrics import Metrics
from serve.policy_worker import CHECKPOINT_FACTORY, pack_request
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest, Description
from serve.worker_keeper import WorkerKeeper
from serve.worker_process import WorkerDied, WorkerProcess
from vla.interface import ActionChunk


@dataclass(frozen=True)
class PolicySource:
    """Which policy is served, and on what."""

    path: str = ""  # checkpoint folder, e.g. RUN/checkpoints/last/policy
    device: str = "cpu"
    decode: dict[str, Any] = field(default_factory=dict)  # overrides, e.g. '{rounds: 6, threshold: 0.9}'
    threads: int | None = None  # of torch; default: the cores but one, OMP_NUM_THREADS wins
    factory: str = CHECKPOINT_FACTORY  # module:function that makes another vla.interface.Policy
    arguments: dict[str, Any] = field(default_factory=dict)  # of such a factory, instead of path, device and decode

    def settings(self, max_batch: int) -> dict[str, Any]:
        """What the worker process is told."""
        arguments = {"path": self.path, "device": self.device, "decode": self.decode}
        threads = self.threads
        if threads is None and not os.environ.get("OMP_NUM_THREADS"):
            threads = max(1, (os.cpu_count() or 1) - 1)
        return {
            "factory": self.factory,
            "arguments": arguments if self.factory == CHECKPOINT_FACTORY else self.arguments,
            "threads": threads,
            "warm_batches": sorted({1, max_batch}),
        }


@dataclass(frozen=True)
class BatchConfig:
    """How observations become batches."""

    max_batch: int = 16
    max_wait_ms: float = 20.0  # see above; 0: a free worker takes what is there
    queue: int = 128  # observations waiting; more are refused as overload
    start_timeout_s: float = 300.0  # for loading and warming up
    compute_timeout_s: float = 60.0  # a batch that takes longer has hung: the worker is killed

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.queue < self.max_batch or self.max_wait_ms < 0:
            raise ValueError(
                f"BatchConfig has max_batch {self.max_batch}, queue {self.queue}, max_wait_ms {self.max_wait_ms}; "
                "needed are 1 <= max_batch <= queue and a wait of at least 0."
            )


@dataclass
class _Item:
    """One observation in the queue."""

    request: ActRequest
    packed: bytes
    arrived: float
    answer: asyncio.Future[ActionChunk]


class PolicyBatcher:
    """A `PolicyBackend` whose model is in another process."""

    def __init__(self, source: PolicySource, config: BatchConfig, metrics: Metrics) -> None:
        self.source, self.config, self.metrics = source, config, metrics
        self._queue: deque[_Item] = deque()
        self._arrival = asyncio.Event()
        self._keeper = WorkerKeeper("policy", self._start_worker, metrics, took=self._took, died=self._died)
        self._description: Description | None = None
        self._running: asyncio.Task[None] | None = None
        self._demand = 1  # robots being served when the last batch ended
        self._free_since = 0.0  # when the worker ended it
        self._batch_seconds = 0.0  # moving average; 0: not measured yet
        self._computing: WorkerProcess | None = None
        self._closing = False

    # ------------------------------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Load and warm up. Raises ValueError or OSError saying why the policy cannot be served."""
        await self._keeper.start()
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._closing = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._fail(Refusal(Code.UNAVAILABLE, "The server is stopping."))
        await self._keeper.close()

    @property
    def description(self) -> Description:
        return self._description

    @property
    def ready(self) -> bool:
        return self._keeper.worker is not None and not self._closing

    @property
    def worker_pid(self) -> int | None:
        return None if self._keeper.worker is None else self._keeper.worker.pid

    @property
    def is_computing(self) -> bool:
        """A batch is with the worker."""
        return self._computing is not None

    async def load(self) -> WorkerProcess:
        """The checkpoint as it is now, warm beside the one in service, for `swap`; two models are in memory then.

        Raises Refusal if it cannot be loaded or is of another robot.
        """
        new = await self._keeper.load()
        try:
            old, description = self._description, Description.from_dict(new.hello)
            if (description.spec, description.action_horizon) != (old.spec, old.action_horizon):
                raise Refusal(
                    Code.CONFLICT,
                    f"The checkpoint at {self.source.path!r} drives another robot ({description.spec.name}, horizon "
                    f"{description.action_horizon}); the old one goes on. Start another server for it.",
                )
        except BaseException:
            await new.close()
            raise
        return new

    async def swap(self, new: WorkerProcess) -> tuple[str, str]:
        """Serve what was loaded, at once; (previous, new) content hash. No request is dropped."""
        previous = self._description
        old = self._keeper.swap(new)
        if old is not None and old is not self._computing:
            await old.close()  # else `_compute` does, after its last batch
        return previous.checkpoint, self._description.checkpoint

    # -------------------------------------------------------------------------------------------------------- requests

    async def act(self, requests: Sequence[ActRequest]) -> list[ActionChunk]:
        """See `PolicyBackend.act`. Cancelling this drops what is still waiting."""
        deadline = min(request.deadline for request in requests)
        self._admit(len(requests), deadline - time.monotonic())
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        items = [_Item(request, pack_request(request), now, loop.create_future()) for request in requests]
        self._queue.extend(items)
        self.metrics.queue_depth.set(len(self._queue))
        self._arrival.set()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return list(await asyncio.gather(*(item.answer for item in items)))
        except TimeoutError:
            text = f"No chunk within the deadline; {len(self._queue)} observations wait. Give more time or send less."
            raise Refusal(Code.DEADLINE, text) from None
        finally:
            for item in items:
                item.answer.cancel()

    def _admit(self, count: int, remaining_s: float) -> None:
        """Raise Refusal at once if the answer would come too late anyway."""
        if self._keeper.worker is None:
            raise Refusal(Code.UNAVAILABLE, "The policy's worker process is being restarted.", retry_after_s=1.0)
        waiting = len(self._queue) + count
        batches = math.ceil(waiting / self.config.max_batch) + self.is_computing
        expected_s = batches * self._batch_seconds
        if waiting > self.config.queue:
            text = f"{len(self._queue)} observations are waiting, {self.config.queue} is the limit."
            raise Refusal(Code.OVERLOADED, text, retry_after_s=max(0.05, expected_s))
        # An idle worker always tries: only batches that run mend an estimate that one slow batch has spoiled.
        if (self._queue or self.is_computing) and expected_s > remaining_s > 0:
            raise Refusal(
                Code.OVERLOADED,
                f"An answer takes about {expected_s:.3f} s now, the deadline is in {remaining_s:.3f} s.",
                retry_after_s=max(0.05, expected_s),
            )

    # --------------------------------------------------------------------------------------------------------- batches

    async def _run(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _gather(self) -> None:
        """Wait for the first observation, then a little for the other robots that are being served."""
        while not self._queue or self._keeper.worker is None:
            self._arrival.clear()
            await self._arrival.wait()
        since = max(self._queue[0].arrived, self._free_since)
        until = since + min(self.config.max_wait_ms / 1000, self._batch_seconds / 2)
        while len(self._queue) < min(self._demand, self.config.max_batch):
            left = until - time.monotonic()
            if left <= 0:
                return
            self._arrival.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrival.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Item]:
        """The next batch; whoever gave up or is late does not come along."""
        batch: list[_Item] = []
        now = time.monotonic()
        while self._queue and len(batch) < self.config.max_batch:
            item = self._queue.popleft()
            if item.answer.done():
                self.metrics.dropped.labels("cancelled").inc()
            elif item.request.deadline <= now:
                self.metrics.dropped.labels("expired").inc()
                item.answer.set_exception(Refusal(Code.DEADLINE, "The deadline passed before the observation was computed."))
            else:
                self.metrics.queue_seconds.observe(now - item.arrived)
                batch.append(item)
        self.metrics.queue_depth.set(len(self._queue))
        return batch

    async def _compute(self, batch: list[_Item]) -> None:
        worker = self._keeper.worker
        if worker is None:
            _settle(batch, Refusal(Code.UNAVAILABLE, "The policy's worker process is being restarted."))
            return
        self._computing = worker
        try:
            reply = await worker.ask({"requests": [item.packed for item in batch]}, timeout_s=self.config.compute_timeout_s)
        except WorkerDied as error:
            self._keeper.forget(worker)
            _settle(batch, Refusal(Code.UNAVAILABLE, f"{error} It is being restarted."))
            return
        finally:
            self._computing = None
            if self._keeper.worker not in (worker, None) and not self._closing:  # it was swapped out meanwhile
                asyncio.get_running_loop().create_task(worker.close())
        if "error" in reply:
            _settle(batch, Refusal(Code.INTERNAL, f"The policy failed ({reply['error']}); the server's log says where."))
            return
        self._demand, self._free_since = len(batch) + len(self._queue), time.monotonic()
        weight = 0.1 if self._batch_seconds else 1.0
        self._batch_seconds += weight * (reply["seconds"] - self._batch_seconds)
        self._count(batch, reply)
        checkpoint = {"checkpoint": worker.hello["checkpoint"]}
        for item, row in zip(batch, reply["rows"], strict=True):
            if item.answer.done():
                continue
            if "refused" in row:
                item.answer.set_exception(Refusal.invalid(row["refused"]))
            else:
                item.answer.set_result(ActionChunk(row["actions"], row["info"] | checkpoint))

    def _count(self, batch: list[_Item], reply: dict[str, Any]) -> None:
        self.metrics.batch_size.observe(len(batch))
        self.metrics.batch_seconds.observe(reply["seconds"])
        for row in reply["rows"]:
            if "actions" in row:
                self.metrics.chunks.inc()
                if "rounds" in row["info"]:
                    self.metrics.rounds.observe(float(row["info"]["rounds"]))

    # --------------------------------------------------------------------------------------------------------- workers

    async def _start_worker(self) -> WorkerProcess:
        settings = self.source.settings(self.config.max_batch)
        return await WorkerProcess.start("serve.policy_worker", settings, timeout_s=self.config.start_timeout_s)

    def _took(self, worker: WorkerProcess) -> None:
        self._description = Description.from_dict(worker.hello)
        self.metrics.set_model("policy", self._description.checkpoint)
        self._arrival.set()

    def _died(self, worker: WorkerProcess, reason: str) -> None:
        if self._keeper.worker is None:  # else another serves what waits
            self._fail(Refusal(Code.UNAVAILABLE, reason))

    def _fail(self, refusal: Refusal) -> None:
        waiting, self._queue = list(self._queue), deque()
        self.metrics.queue_depth.set(0)
        _settle(waiting, refusal)


def _settle(items: Sequence[_Item], refusal: Refusal) -> None:
    for item in items:
        if not item.answer.done():
            item.answer.set_exception(refusal)
