"""Encoders behind the Open Inference Protocol, over HTTP and gRPC: embeddings equal those made in this process."""

import asyncio
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import grpc
import numpy as np
import pytest

from serve.image_encoder import PolicyTower, policy_tower
from serve.protocol import open_inference_pb2 as oip_pb2
from serve.protocol.refusal import Code, Refusal
from serve.protocol.tensors import TensorSpec
from serve.server import ServeConfig, Server
from serve.tensor_model import Signature
from serve.worker_process import WorkerProcess
from tests.serving import WEB, FakeWorker, Running, running
from tests.tiny_policy import observations, write_policy


SLOW = -7.0  # takes a second to be refused


class Doubler:
    """A TensorModel without torch: `x` FP32 [B, 2], optional text; y = 2 x."""

    inputs = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("note", "BYTES", (-1,), optional=True))
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)
    content_hash = "doubler"

    def infer(self, tensors):
        if (tensors["x"] == SLOW).any():
            time.sleep(1.0)
        if (tensors["x"] < 0).any():
            raise ValueError("x is negative")
        if (tensors["x"] > 1000).any():
            raise RuntimeError("the encoder's own secret words")
        return {"y": 2 * tensors["x"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    encoders = {"tower": {"arguments": {"path": str(folder)}}, "doubler": {"factory": "tests.test_serving_encoders:Doubler"}}
    with running(ServeConfig(encoders=encoders)) as server:
        yield server


@pytest.fixture(scope="module")
def tower(folder: Path) -> PolicyTower:
    return policy_tower(str(folder))


def ask(server: Running, model: str, inputs: list[dict], **body):
    return WEB.post(f"{server.http}/v2/models/{model}/infer", json={"inputs": inputs} | body)


def test_the_towers_embeddings_are_those_in_process(server: Running, tower: PolicyTower):
    pictures = np.stack([observation.images["base"] for observation in observations(3)])
    want = tower.infer({"image": pictures})
    answer = ask(server, "tower", [{"name": "image", "datatype": "UINT8", "shape": [3, 36, 36, 3], "data": pictures.ravel().tolist()}])
    assert answer.status_code == 200 and answer.json()["model_version"] == tower.content_hash
    for output in answer.json()["outputs"]:
        np.testing.assert_array_equal(np.reshape(output["data"], output["shape"]).astype(np.float32), want[output["name"]])

    request = oip_pb2.ModelInferRequest(model_name="tower")
    request.inputs.add(name="image", datatype="UINT8", shape=pictures.shape)
    request.raw_input_contents.append(pictures.tobytes())
    request.outputs.add(name="embedding")
    with grpc.insecure_channel(server.grpc_address) as channel:
        serializer, parser = oip_pb2.ModelInferRequest.SerializeToString, oip_pb2.ModelInferResponse.FromString
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", serializer, parser)
        response = infer(request, timeout=30)
    (embedding,) = response.raw_output_contents
    np.testing.assert_array_equal(np.frombuffer(embedding, np.float32).reshape(3, -1), want["embedding"])


def test_the_signature_is_that_of_the_model(server: Running, tower: PolicyTower):
    metadata = WEB.get(f"{server.http}/v2/models/tower").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 36, 36, 3]}]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["tokens", "embedding"]
    assert WEB.get(f"{server.http}/v2/models/doubler/ready").json()["ready"] is True
    missing = WEB.get(f"{server.http}/v2/models/policy")
    assert missing.status_code == 404 and "--policy.path" in missing.json()["error"]
    assert "tower, doubler" in WEB.get(f"{server.http}/v2/models/other").json()["error"]


X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}


@pytest.mark.parametrize(
    ("inputs", "body", "status", "says"),
    [
        ([X], {}, 200, None),
        ([X, {"name": "note", "datatype": "BYTES", "shape": [1], "data": ["hello"]}], {}, 200, None),
        ([], {}, 400, "inputs"),
        ([X | {"name": "z"}], {}, 400, "no input 'z'"),
        ([X | {"shape": [2, 1]}], {}, 400, "expected FP32"),
        ([X | {"datatype": "FP64"}], {}, 400, "expected FP32"),
        ([X, {"name": "note", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}], {}, 400, "rows"),
        ([X | {"data": [-1, 2]}], {}, 400, "x is negative"),
        ([X | {"data": [5000, 2]}], {}, 500, "RuntimeError"),
        ([X], {"outputs": [{"name": "w"}]}, 400, "no output 'w'"),
    ],
)
def test_what_an_encoder_does_not_take_is_named(server: Running, inputs: list, body: dict, status: int, says: str | None):
    answer = ask(server, "doubler", inputs, **body)
    assert answer.status_code == status, answer.text
    if says is None:
        assert answer.json()["outputs"][0]["data"] == [2, 4]
    else:
        assert says in answer.json()["error"] and "secret" not in answer.json()["error"]


def test_who_gives_up_leaves_its_turn_to_nobody_until_it_is_computed(server: Running, caplog):
    """The worker goes on with it; what is sent meanwhile would pile up there, late and unseen."""
    doubler = server.server.encoders["doubler"]

    async def ask_for(x: float, timeout_s: float) -> np.ndarray:
        return (await doubler.infer({"x": np.full((1, 2), x, np.float32)}, time.monotonic() + timeout_s))["y"]

    for _ in range(5):
        with pytest.raises(Refusal) as caught:
            server.run(ask_for(SLOW, 0.1))
        assert caught.value.code is Code.DEADLINE
    began = time.monotonic()
    assert server.run(ask_for(3.0, 30.0)).tolist() == [[6, 6]]
    assert time.monotonic() - began < 2.0, "one of the five was computed"
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_swap_is_of_all_models_or_of_none(monkeypatch):
    def fake(checkpoint: str) -> FakeWorker:
        return FakeWorker(**Signature(Doubler.inputs, Doubler.outputs, checkpoint).to_dict())

    async def scenario() -> None:
        server = Server(ServeConfig(encoders={"one": {}, "two": {}}))
        started = [fake("a"), fake("b"), fake("c"), ValueError("no weights"), fake("d"), fake("e")]
        monkeypatch.setattr(WorkerProcess, "start", AsyncMock(side_effect=started))
        with pytest.raises(Refusal, match="being loaded") as caught:
            await server.services.swap()
        assert caught.value.code is Code.UNAVAILABLE and not WorkerProcess.start.called
        for encoder in server.encoders.values():
            await encoder.start()
        with pytest.raises(Refusal, match="no weights") as caught:
            await server.services.swap()
        assert caught.value.code is Code.CONFLICT and started[2].died.result() == "closed"
        assert [encoder.signature.checkpoint for encoder in server.encoders.values()] == ["a", "b"]
        assert await server.services.swap() == ("a+b", "d+e")
        await server.stop(grace_s=0.0)

    asyncio.run(scenario())


def test_an_encoder_cannot_take_the_policys_name():
    with pytest.raises(ValueError, match="'policy'"):
        Server(ServeConfig(encoders={"policy": {}}))
