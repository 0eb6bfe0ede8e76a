"""Laws of the queue before the policy, on a policy without torch in a real worker process."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serve.gate import Gate
from serve.metrics import Metrics
from serve.policy_batcher import BatchConfig, PolicyBatcher, PolicySource
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest
from serve.worker_keeper import WorkerKeeper
from tests.odd_policy import chunk_of, odd_observation
from tests.serving import FakeWorker

ODD = PolicySource(factory="tests.odd_policy:OddPolicy")


def odd(**arguments) -> PolicySource:
    return replace(ODD, arguments=arguments)


def ask(instruction: str = "go", *, state: float = 0.0, seed: int = 0, timeout_s: float = 20.0) -> ActRequest:
    return ActRequest(odd_observation(instruction, state=state), None, seed, time.monotonic() + timeout_s)


def with_batcher(source: PolicySource, config: BatchConfig, scenario) -> None:
    """Run scenario(batcher, metrics) in a loop of its own."""

    async def run() -> None:
        metrics = Metrics()
        batcher = PolicyBatcher(source, config, metrics)
        await batcher.start()
        try:
            await scenario(batcher, metrics)
        finally:
            await batcher.close()

    asyncio.run(run())


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def batch_counts(metrics: Metrics) -> tuple[float, float]:
    """Batches and observations computed."""
    return value(metrics, "remask_policy_batch_size_count"), value(metrics, "remask_policy_batch_size_sum")


def test_what_waits_while_the_worker_computes_becomes_one_batch():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        requests = [ask(state=index, seed=index) for index in range(9)]
        first = asyncio.ensure_future(batcher.act([requests[0]]))
        await asyncio.sleep(0.05)
        rest = await asyncio.gather(*(batcher.act([request]) for request in requests[1:]))
        answers = [*await first, *(chunk for (chunk,) in rest)]
        for request, answer in zip(requests, answers, strict=True):
            want = chunk_of(request.observation, None, request.seed)
            assert np.array_equal(answer.actions, want.actions) and answer.info["rounds"] == want.info["rounds"]
        assert batch_counts(metrics) == (3, 9), "1, then 4 and 4 (max_batch)"

    with_batcher(odd(delay_s=0.2), BatchConfig(max_batch=4), scenario)


def test_one_robot_alone_never_waits_and_eight_in_step_share_a_batch():
    """A robot that thinks for a moment between its requests would otherwise find seven others' batch just gone."""

    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        async def robot(steps: int, thinks_s: float) -> None:
            for _ in range(steps):
                await batcher.act([ask()])
                await asyncio.sleep(thinks_s)

        began = time.perf_counter()
        await robot(5, 0.0)
        assert time.perf_counter() - began < 5 * 0.1 + 0.2, "five computations, no waiting"
        before = batch_counts(metrics)
        await asyncio.gather(*(robot(6, 0.001 * index) for index in range(8)))
        batches, observations = (after - earlier for after, earlier in zip(batch_counts(metrics), before, strict=True))
        assert observations == 48 and batches <= 9, "at most a few batches until they are in step"

    with_batcher(odd(delay_s=0.1), BatchConfig(max_batch=8, max_wait_ms=400.0), scenario)


def test_a_robot_out_of_step_is_waited_for():
    """It would otherwise go alone for ever: its observation is the oldest whenever the others' batch ends."""

    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        async def robot(steps: int) -> None:
            for _ in range(steps):
                await batcher.act([ask()])

        early = asyncio.ensure_future(robot(7))
        await asyncio.sleep(0.05)
        await asyncio.gather(early, *(robot(6) for _ in range(7)))
        batches, observations = batch_counts(metrics)
        assert observations == 49 and batches <= 9, "the first alone, then together"

    with_batcher(odd(delay_s=0.1), BatchConfig(max_batch=8, max_wait_ms=20.0), scenario)


def test_a_late_observation_is_dropped_before_compute_and_answered_in_time():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        slow = asyncio.ensure_future(batcher.act([ask()]))
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        with pytest.raises(Refusal) as caught:
            await batcher.act([ask(timeout_s=0.15)])
        assert caught.value.code is Code.DEADLINE and time.perf_counter() - began < 0.45, "before the worker is free"
        await slow
        await batcher.act([ask()])
        assert batch_counts(metrics) == (2, 2), "the late one was never computed"
        assert value(metrics, "remask_policy_dropped_total", reason="cancelled") == 1

    with_batcher(odd(delay_s=0.5), BatchConfig(), scenario)


def test_a_cancelled_request_is_not_computed():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        slow = asyncio.ensure_future(batcher.act([ask()]))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(batcher.act([ask(), ask()]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await slow
        await batcher.act([ask()])
        assert batch_counts(metrics) == (2, 2)

    with_batcher(odd(delay_s=0.3), BatchConfig(), scenario)


def test_a_full_queue_refuses_at_once_and_recovers():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        waiting = [asyncio.ensure_future(batcher.act([ask()])) for _ in range(8)]
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        with pytest.raises(Refusal) as caught:
            await batcher.act([ask(), ask(), ask()])  # 6 wait, 2 are being computed
        assert time.perf_counter() - began < 0.2, "before one batch is done"
        assert caught.value.code is Code.OVERLOADED and caught.value.retry_after_s > 0
        await asyncio.gather(*waiting)
        assert len(await batcher.act([ask(), ask()])) == 2

    with_batcher(odd(delay_s=0.2), BatchConfig(max_batch=2, queue=8), scenario)


def test_an_answer_that_must_come_too_late_is_refused_at_once():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        await batcher.act([ask()])  # now it knows that a batch takes 0.3 s
        waiting = [asyncio.ensure_future(batcher.act([ask()])) for _ in range(6)]
        await asyncio.sleep(0.02)
        began = time.perf_counter()
        with pytest.raises(Refusal) as caught:
            await batcher.act([ask(timeout_s=0.5)])
        assert caught.value.code is Code.OVERLOADED and time.perf_counter() - began < 0.3
        await asyncio.gather(*waiting)

    with_batcher(odd(delay_s=0.3), BatchConfig(max_batch=2), scenario)


def test_a_slow_batch_does_not_refuse_short_deadlines_to_an_idle_worker():
    """The estimate is learned from batches that run; refusing all of them would keep it for ever."""

    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        await batcher.act([ask("sleep")])
        for _ in range(3):
            assert len(await batcher.act([ask(timeout_s=0.95)])) == 1

    with_batcher(ODD, BatchConfig(), scenario)


def test_a_failure_of_the_policy_is_named_and_the_worker_goes_on():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        pid = batcher.worker_pid
        with pytest.raises(Refusal) as caught:
            await batcher.act([ask("raise")])
        assert caught.value.code is Code.INTERNAL and "RuntimeError" in str(caught.value)
        assert "secret" not in str(caught.value), "the reason goes to the log"
        assert len(await batcher.act([ask()])) == 1 and batcher.worker_pid == pid

    with_batcher(ODD, BatchConfig(), scenario)


def test_a_worker_that_hangs_is_killed_and_replaced():
    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        pid = batcher.worker_pid
        with pytest.raises(Refusal, match="computed for more than") as caught:
            await batcher.act([ask("hang")])
        assert caught.value.code is Code.UNAVAILABLE
        await until_ready(batcher)
        assert batcher.worker_pid != pid and not Path(f"/proc/{pid}").exists()

    with_batcher(ODD, BatchConfig(compute_timeout_s=0.3), scenario)


async def until_ready(batcher: PolicyBatcher) -> None:
    async with asyncio.timeout(30):
        while not batcher.ready:
            await asyncio.sleep(0.01)


def test_a_swap_drops_no_request_and_a_failed_one_changes_nothing(tmp_path: Path):
    bad = tmp_path / "bad"

    async def scenario(batcher: PolicyBatcher, metrics: Metrics) -> None:
        asked, stop = [], False

        async def robot() -> None:
            while not stop:
                (chunk,) = await batcher.act([ask()])
                asked.append(chunk.info["checkpoint"])

        robots = [asyncio.ensure_future(robot()) for _ in range(4)]
        await asyncio.sleep(0.05)
        batcher.source = odd(delay_s=0.01, content_hash="new")
        assert await batcher.swap(await batcher.load()) == ("odd", "new")
        await asyncio.sleep(0.1)
        pid = batcher.worker_pid
        bad.touch()
        batcher.source = odd(fail_file=str(bad))
        with pytest.raises(Refusal, match="is there") as caught:
            await batcher.load()
        assert caught.value.code is Code.CONFLICT
        stop = True
        await asyncio.gather(*robots)
        assert set(asked) == {"odd", "new"} and asked == sorted(asked, reverse=True), "old ones first"
        assert batcher.worker_pid == pid and batcher.description.checkpoint == "new"

    with_batcher(odd(delay_s=0.01), BatchConfig(), scenario)


def test_every_workers_death_is_told_and_the_one_in_service_is_replaced():
    """Also while another, swapped out, still ends its work."""

    async def scenario() -> None:
        told = []

        async def start() -> FakeWorker:
            await asyncio.sleep(0)  # others run meanwhile, as while a process starts
            return FakeWorker()

        keeper = WorkerKeeper(
            "fake", start, Metrics(), took=lambda worker: None, died=lambda worker, reason: told.append((worker, keeper.worker))
        )
        await keeper.start()
        new = await keeper.load()
        old = keeper.swap(new)
        new.died.set_result("died")
        async with asyncio.timeout(5):
            while keeper.worker in (new, None):
                await asyncio.sleep(0)
        third = keeper.worker
        old.died.set_result("died")
        await asyncio.sleep(0.01)
        assert told == [(new, None), (old, third)] and keeper.worker is third
        await keeper.close()

    asyncio.run(scenario())


def test_a_policy_that_cannot_be_loaded_is_one_error_with_its_own_words(tmp_path: Path):
    async def nothing(*_) -> None: ...

    (tmp_path / "bad").touch()
    for source, says in (
        (odd(fail_file=str(tmp_path / "bad")), "is there"),
        (PolicySource(path=str(tmp_path)), "No checkpoint at"),
        (replace(ODD, factory="tests.odd_policy:NoSuch"), "names nothing"),
    ):
        with pytest.raises(ValueError, match=says):
            with_batcher(source, BatchConfig(), nothing)


def test_the_gate_counts_and_closes():
    async def scenario() -> None:
        metrics = Metrics()
        gate = Gate(Limits(concurrency=1, streams=1), metrics)
        with gate.request("http", "x"):
            with pytest.raises(Refusal) as caught, gate.request("http", "x"):
                pass
            assert caught.value.code is Code.OVERLOADED
            assert not await gate.drained(0.01)
            with gate.stream("events"), pytest.raises(Refusal), gate.stream("events"):
                pass
            gate.close()
        assert await gate.drained(0.01)
        with pytest.raises(Refusal) as caught, gate.request("grpc", "x"):
            pass
        assert caught.value.code is Code.UNAVAILABLE
        assert value(metrics, "remask_requests_total", protocol="http", method="x", code="503") == 1
        assert value(metrics, "remask_requests_total", protocol="http", method="x", code="OK") == 1
        assert value(metrics, "remask_requests_total", protocol="grpc", method="x", code="UNAVAILABLE") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("protocol", "code"), [("http", "500"), ("grpc", "INTERNAL"), ("websocket", "INTERNAL")])
def test_the_gate_counts_a_failure_as_one_and_hands_it_on(protocol: str, code: str):
    metrics = Metrics()
    with pytest.raises(ArithmeticError), Gate(Limits(), metrics).request(protocol, "x"):
        raise ArithmeticError
    assert value(metrics, "remask_requests_total", protocol=protocol, method="x", code=code) == 1
