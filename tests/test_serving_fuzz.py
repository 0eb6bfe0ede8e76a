"""A small share of tests/benchmarks/bench_fuzz.py: hostile traffic on every wire of one server, which stays as it was."""

from collections.abc import Iterator

import numpy as np
import pytest

from serve.client import RemotePolicy
from serve.protocol.limits import Limits
from serve.server import ServeConfig
from tests.odd_policy import chunk_of, odd_observation
from tests.serving import Running, running
from tests.serving_fuzz import fuzz_grpc, fuzz_sockets, fuzz_websocket
from tests.serving_fuzz_http import fuzz_http, fuzz_inference
from tests.test_serving_batches import ODD


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServeConfig(policy=ODD, limits=Limits(header_s=2.0, body_s=2.0))) as server:
        yield server
        assert server.server.gate.in_flight == 0, "every request came to an end"


@pytest.fixture(autouse=True)
def unharmed(server: Running) -> Iterator[None]:
    """Before and after: the same worker, the same answers."""
    pid = server.server.batcher.worker_pid
    yield
    assert server.server.batcher.worker_pid == pid
    with RemotePolicy(server.grpc) as remote:
        (chunk,) = remote.act([odd_observation(state=1.0)], seeds=[5])
    assert np.array_equal(chunk.actions, chunk_of(odd_observation(state=1.0), None, 5).actions)


def test_requests_made_from_the_openapi_document_are_answered_as_it_says(server: Running):
    answers = fuzz_http(server.http, 100, seed=1)
    assert answers["200"] > 10 and answers["400"] > 5, answers


def test_odd_inference_requests_are_refused_by_name(server: Running):
    answers = fuzz_inference(server.http, 300, seed=5)
    assert answers["200"] > 20 and answers["400"] > 50, answers


def test_odd_and_broken_grpc_messages_are_refused_by_name(server: Running):
    answers = fuzz_grpc(server.grpc_address, 300, seed=2)
    assert answers["INVALID_ARGUMENT"] > 50 and answers["OK"] > 20 and answers["session answers"] > 5, answers


def test_odd_and_broken_websocket_messages_are_refused_by_name(server: Running):
    answers = fuzz_websocket(server.ws, 300, seed=3)
    assert answers["INVALID"] > 50 and answers["OK"] > 20, answers


def test_bytes_that_are_no_http_end_the_connection(server: Running):
    answers = fuzz_sockets(server.server.port, 100, seed=4)
    assert answers["400"] > 10, answers
