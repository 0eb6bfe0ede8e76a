"""Laws of the queue before the policy, on a policy without torch in a real worker process."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from serve.client import RemotePolicy
from serve.gate import Gate
from serve.metrics import Metrics
from serve.policy_batcher import BatchConfig, PolicyBatcher, PolicySource
from serve.protocol import policy_pb2, policy_pb2_grpc
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest
from serve.server import ServeConfig
from tests.odd_policy import chunk_of, odd_observation
from tests.openpi_client import OpenpiClient
from tests.serving import WEB, Running, running

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
        assert await batcher.swap() == ("odd", "new")
        await asyncio.sleep(0.1)
        pid = batcher.worker_pid
        bad.touch()
        batcher.source = odd(fail_file=str(bad))
        with pytest.raises(Refusal, match="is there") as caught:
            await batcher.swap()
        assert caught.value.code is Code.CONFLICT
        stop = True
        await asyncio.gather(*robots)
        assert set(asked) == {"odd", "new"} and asked == sorted(asked, reverse=True), "old ones first"
        assert batcher.worker_pid == pid and batcher.description.checkpoint == "new"

    with_batcher(odd(delay_s=0.01), BatchConfig(), scenario)


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


# ------------------------------------------------------------------------------------------------------ over the wires


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServeConfig(policy=odd(delay_s=0.1), batching=BatchConfig(max_batch=2, queue=4))) as server:
        yield server


def session(server: Running, messages):
    channel = grpc.insecure_channel(server.grpc_address)
    return channel, policy_pb2_grpc.PolicyServiceStub(channel).Session(iter(messages), timeout=30)


def observe(sequence: int, instruction: str = "go") -> policy_pb2.SessionRequest:
    observation = odd_observation(instruction)
    request = policy_pb2.ActRequest(state=observation.state.tolist(), instruction=instruction, seed=sequence)
    for name, image in observation.images.items():
        raw = request.images.add(camera=name).raw
        raw.height, raw.width, raw.data = *image.shape[:2], image.tobytes()
    return policy_pb2.SessionRequest(sequence=sequence, observe=request)


def test_in_a_session_the_newest_observation_wins_and_answers_keep_their_order(server: Running):
    channel, answers = session(server, [observe(index) for index in range(1, 7)])
    with channel:
        kinds = [(answer.sequence, answer.WhichOneof("message")) for answer in answers]
    assert [sequence for sequence, _ in kinds] == [1, 2, 3, 4, 5, 6]
    assert kinds[0][1] == "act" and kinds[-1][1] == "act"
    assert [kind for _, kind in kinds[1:-1]] == ["superseded"] * 4


def test_a_reset_forgets_what_waits_and_a_refusal_leaves_the_session_open(server: Running):
    def messages():
        yield observe(1)
        yield observe(2)
        yield policy_pb2.SessionRequest(sequence=3, reset=policy_pb2.Reset())
        yield policy_pb2.SessionRequest(sequence=4)
        time.sleep(0.5)
        yield observe(5, "refuse")
        time.sleep(0.5)
        yield observe(6)

    channel, answers = session(server, messages())
    with channel:
        got = {answer.sequence: answer for answer in answers}
    kinds = {sequence: answer.WhichOneof("message") for sequence, answer in got.items()}
    assert kinds == {1: "superseded", 2: "superseded", 3: "reset", 4: "error", 5: "error", 6: "act"}
    assert got[5].error.code == "INVALID_ARGUMENT" and "refused" in got[5].error.message
    assert got[6].act.rounds == 1


def test_a_grpc_deadline_is_honoured(server: Running):
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        began = time.perf_counter()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Act(observe(1).observe, timeout=0.05)
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert time.perf_counter() - began < 1.0
        assert stub.Act(observe(1).observe, timeout=10).rounds == 2


def flood(server: Running, count: int) -> list[tuple[int, float, httpx.Headers]]:
    """Status, seconds and headers of that many simultaneous requests."""
    (o,) = [odd_observation()]
    inputs = [
        *({"name": f"observation.images.{name}", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": image.ravel().tolist()} for name, image in o.images.items()),
        {"name": "observation.state", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 0.0, 0.0]},
        {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["go"]},
    ]  # fmt: skip

    async def run():
        async with httpx.AsyncClient(verify=False, limits=httpx.Limits(max_connections=count)) as client:
            await asyncio.gather(*(client.get(f"{server.http}/livez") for _ in range(count)))  # connections are open now

            async def one():
                began = time.perf_counter()
                response = await client.post(f"{server.http}/v2/models/policy/infer", json={"inputs": inputs}, timeout=30)
                return response.status_code, time.perf_counter() - began, response.headers

            return await asyncio.gather(*(one() for _ in range(count)))

    return asyncio.run(run())


def test_overload_is_refused_soon_with_retry_after_and_the_server_recovers(server: Running):
    answers = flood(server, 24)
    statuses = {status for status, _, _ in answers}
    assert statuses == {200, 503}
    refused = [(seconds, headers) for status, seconds, headers in answers if status == 503]
    assert all(int(headers["retry-after"]) >= 1 and int(headers["retry-after-ms"]) > 0 for _, headers in refused)
    assert max(seconds for seconds, _ in refused) < max(seconds for status, seconds, _ in answers if status == 200)
    assert [status for status, _, _ in flood(server, 1)] == [200]


def test_our_client_waits_out_an_overload(server: Running):
    """More robots than the queue holds: everybody is served in the end."""
    import threading

    results: list[int] = []

    def robot(index: int) -> None:
        with RemotePolicy((server.http, server.grpc, server.ws)[index % 3], timeout_s=30) as remote:
            for step in range(2):
                (chunk,) = remote.act([odd_observation(state=float(index))], seeds=[step])
                assert np.array_equal(chunk.actions, chunk_of(odd_observation(state=float(index)), None, step).actions)
                results.append(index)

    threads = [threading.Thread(target=robot, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == sorted([*range(9), *range(9)])


def test_killing_the_worker_fails_what_is_in_flight_in_each_protocol_and_it_comes_back(server: Running):
    outcome: dict[str, object] = {}

    def over_http() -> None:
        outcome["http"] = flood(server, 1)[0]

    def over_grpc() -> None:
        with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
            policy_pb2_grpc.PolicyServiceStub(channel).Act(observe(1).observe, timeout=10)
        outcome["grpc"] = caught.value

    def over_websocket() -> None:
        client = OpenpiClient(server.ws)
        observation = odd_observation()
        message = {"observation/state": observation.state, "prompt": "go"}
        message |= {f"observation/images/{name}": image for name, image in observation.images.items()}
        with pytest.raises(RuntimeError) as caught:
            client.infer(message)
        outcome["websocket"] = str(caught.value)
        wait_until_ready(server)
        assert client.infer(message)["actions"].shape == (4, 7), "the same connection is served again"
        client.close()

    pid = server.server.batcher.worker_pid
    for client in (over_http, over_grpc, over_websocket):
        os.kill(pid, signal.SIGSTOP)  # so that the request is in flight for certain
        import threading

        thread = threading.Thread(target=client)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.server.batcher.is_computing and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        thread.join(30)
        wait_until_ready(server)
        assert time.monotonic() - began < 20
        assert server.server.batcher.worker_pid != pid
        pid = server.server.batcher.worker_pid
    status, _, headers = outcome["http"]
    assert status == 503 and "retry-after" in headers
    assert outcome["grpc"].code() is grpc.StatusCode.UNAVAILABLE and "SIGKILL" in outcome["grpc"].details()
    assert "UNAVAILABLE: " in outcome["websocket"] and "SIGKILL" in outcome["websocket"]
    assert server.server.metrics.registry.get_sample_value("remask_worker_restarts_total", {"worker": "policy"}) == 3


def wait_until_ready(server: Running) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if WEB.get(f"{server.http}/readyz").status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError("not ready again within 30 s")
