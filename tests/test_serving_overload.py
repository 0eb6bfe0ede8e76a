"""One server with a slow policy and a short queue, over its wires: newest wins, deadlines, overload, a killed worker."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import grpc
import httpx
import numpy as np
import pytest

from serve.client import RemotePolicy
from serve.grpc_session import Session
from serve.policy_batcher import BatchConfig
from serve.protocol import policy_pb2, policy_pb2_grpc
from serve.server import ServeConfig
from tests.odd_policy import chunk_of, odd_observation
from tests.openpi_client import OpenpiClient
from tests.serving import WEB, Running, running
from tests.test_serving_batches import odd


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


def test_nothing_more_is_computed_for_a_robot_that_has_gone(server: Running):
    async def leave() -> int:
        """Requests in flight after a robot left while one observation was computed and another waited."""

        async def messages():
            yield observe(1)
            yield observe(2)
            both_taken.set()
            await asyncio.sleep(60)

        both_taken = asyncio.Event()
        answering = asyncio.ensure_future(anext(Session(server.server.services).run(messages())))
        await both_taken.wait()
        answering.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        return server.server.gate.in_flight

    assert server.run(leave()) == 0


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
    observation = odd_observation()
    inputs = [
        {"name": f"observation.images.{name}", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": image.ravel().tolist()}
        for name, image in observation.images.items()
    ]
    inputs += [
        {"name": "observation.state", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 0.0, 0.0]},
        {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["go"]},
    ]

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
