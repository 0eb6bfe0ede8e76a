"""Real clients against one real server: what comes over each wire equals the policy called in this process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serve.client import RemotePolicy
from serve.policy_batcher import PolicySource
from serve.protocol import oip, policy_pb2, policy_pb2_grpc
from serve.protocol import open_inference_pb2 as oip_pb2
from serve.protocol.images import encode_jpeg, fit_image
from serve.server import ServeConfig
from tests.openpi_client import OpenpiClient
from tests.serving import WEB, Running, running
from tests.tiny_policy import observations, write_policy
from vla.interface import ActionChunk
from vla.policy import TorchPolicy, load_policy

ROOT = Path(__file__).resolve().parents[1]
WIRES = ("http", "grpc", "ws")
COUNT = 5
SEEDS = list(range(COUNT))
KNOWN = [None, np.array([[0.1, 0.2, 1.0]], np.float32), None, np.array([[0.3, 0.1, -1.0], [0.2, 0.0, 1.0]], np.float32), None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def local(folder: Path) -> TorchPolicy:
    return load_policy(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(ServeConfig(policy=PolicySource(path=str(folder)))) as server:
        yield server


@pytest.fixture(scope="module")
def expected(local: TorchPolicy) -> list[ActionChunk]:
    return local.act(observations(COUNT), known=KNOWN, seeds=SEEDS)


def alone(local: TorchPolicy, index: int = 0, seed: int = 3) -> ActionChunk:
    (chunk,) = local.act([observations(COUNT)[index]], seeds=[seed])
    return chunk


@pytest.mark.parametrize("wire", WIRES)
def test_a_remote_policy_is_the_policy(wire: str, server: Running, local: TorchPolicy, expected: list[ActionChunk]):
    with RemotePolicy(getattr(server, wire)) as remote:
        assert (remote.spec, remote.action_horizon, remote.content_hash) == (
            local.spec, local.action_horizon, local.content_hash
        )
        chunks = remote.act(observations(COUNT), known=KNOWN, seeds=SEEDS)
        (single,) = remote.act([observations(COUNT)[0]], seeds=[3])
        assert remote.act([]) == []
    for chunk, want in zip(chunks, expected, strict=True):
        np.testing.assert_allclose(chunk.actions, want.actions, atol=1e-5)  # the batch may have been cut elsewhere
        np.testing.assert_allclose(chunk.info["confidence"], want.info["confidence"], atol=1e-5)
        assert np.array_equal(chunk.info["committed"], want.info["committed"]) and chunk.info["rounds"] == want.info["rounds"]
        assert chunk.info["checkpoint"] == local.content_hash and chunk.info["milliseconds"] > 0
    np.testing.assert_array_equal(single.actions, alone(local).actions)  # alone in its batch: the same bits


@pytest.mark.parametrize("wire", WIRES)
def test_the_answer_continues_the_tail_that_the_delay_covers(wire: str, server: Running, local: TorchPolicy):
    (observation,) = observations(1)
    tail = np.array([[0.31, 0.11, -1.0], [0.21, 0.01, 1.0], [0.5, 0.5, 1.0]], np.float32)
    with RemotePolicy(getattr(server, wire)) as remote:
        for delay, known in ((2, tail[:2]), (None, tail), (0, None)):
            (chunk,) = remote.act([observation], known=[tail], delays=[delay], seeds=[1])
            (want,) = local.act([observation], known=[known], seeds=[1])
            np.testing.assert_array_equal(chunk.actions, want.actions)
        with pytest.raises(ValueError, match="delay"):
            remote.act([observation], known=[tail[:1]], delays=[2])


@pytest.mark.parametrize("wire", WIRES)
def test_what_the_policy_refuses_is_a_value_error_that_names_it(wire: str, server: Running):
    (observation,) = observations(1)
    with RemotePolicy(getattr(server, wire)) as remote:
        for change, says in (
            ({"images": {"base": observation.images["base"]}}, "wrist"),
            ({"state": np.zeros(7, np.float32)}, "7"),
            ({"instruction": "go " * 30}, "max_length"),  # known to the tokenizer only, in the worker
        ):
            broken = type(observation)(**(vars(observation) | change))
            with pytest.raises(ValueError, match=says):
                remote.act([broken])
        assert len(remote.act([observation])) == 1, "the connection lives on"


def test_a_bad_observation_does_not_fail_its_batch_mates(server: Running, local: TorchPolicy):
    good, too_long = observations(1)[0], observations(1)[0]
    too_long = type(good)(good.images, good.state, "bright " * 20)

    async def together() -> list:
        import asyncio
        import time

        from serve.protocol.requests import ActRequest

        deadline = time.monotonic() + 30
        asked = [server.server.batcher.act([ActRequest(o, None, 3, deadline)]) for o in (good, too_long, good)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, refused, last = server.run(together())
    assert "max_length" in str(refused)
    np.testing.assert_allclose(first[0].actions, alone(local).actions, atol=1e-5)
    np.testing.assert_array_equal(first[0].actions, last[0].actions)


def test_the_openpi_client_works_unchanged(server: Running, local: TorchPolicy):
    (observation, *_) = observations(COUNT)
    client = OpenpiClient(server.ws)
    assert client.metadata["action_horizon"] == 4 and client.metadata["checkpoint"] == local.content_hash
    message = {
        "observation/image": observation.images["base"],
        "observation/wrist_image": observation.images["wrist"],
        "observation/state": observation.state.astype(np.float64),
        "prompt": observation.instruction,
    }
    answer = client.infer(message)
    np.testing.assert_array_equal(answer["actions"], alone(local, seed=0).actions)
    assert answer["server_timing"]["infer_ms"] > 0 and answer["policy_timing"]["infer_ms"] > 0
    with pytest.raises(RuntimeError, match="INVALID: .*prompt"):
        client.infer({key: value for key, value in message.items() if key != "prompt"})
    assert "prev_total_ms" in client.infer(message)["server_timing"]
    client.close()
    assert WEB.get(f"{server.http}/healthz").text == "OK\n"


TRITON_HTTP = """
import json, sys
import numpy as np
import tritonclient.http as triton

url, file, binary = sys.argv[1], np.load(sys.argv[2]), sys.argv[3] == "binary"
with triton.InferenceServerClient(url) as client:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("policy")
    metadata = client.get_model_metadata("policy")
    inputs = []
    for name in file.files:
        array = file[name] if name != "task" else np.array([str(t).encode() for t in file[name]], dtype=object)
        datatype = next(i["datatype"] for i in metadata["inputs"] if i["name"] == name)
        inputs.append(triton.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("action", "confidence", "rounds")]
    result = client.infer("policy", inputs, outputs=outputs, request_id="r1", parameters={"note": "x"})
    answer = {name: result.as_numpy(name).tolist() for name in ("action", "confidence", "rounds")}
    response = result.get_response()
    facts = {"id": response["id"], "version": response["model_version"], "server": client.get_server_metadata()["name"]}
    print(json.dumps(answer | facts))
"""

TRITON_GRPC = """
import json, sys
import numpy as np
import tritonclient.grpc as triton

url, file = sys.argv[1], np.load(sys.argv[2])
with triton.InferenceServerClient(url) as client:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("policy")
    metadata = client.get_model_metadata("policy")
    inputs = []
    for name in file.files:
        array = file[name] if name != "task" else np.array([str(t).encode() for t in file[name]], dtype=object)
        datatype = next(i.datatype for i in metadata.inputs if i.name == name)
        inputs.append(triton.InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array)
    outputs = [triton.InferRequestedOutput(name) for name in ("action", "confidence", "rounds")]
    result = client.infer("policy", inputs, outputs=outputs, request_id="r1", client_timeout=30)
    answer = {name: result.as_numpy(name).tolist() for name in ("action", "confidence", "rounds")}
    response = result.get_response()
    facts = {"id": response.id, "version": response.model_version, "server": client.get_server_metadata().name}
    print(json.dumps(answer | facts))
"""


def infer_arrays() -> dict[str, np.ndarray]:
    batch = observations(COUNT)
    return {
        **{f"observation.images.{name}": np.stack([o.images[name] for o in batch]) for name in ("base", "wrist")},
        "observation.state": np.stack([o.state for o in batch]),
        "task": np.array([o.instruction for o in batch]),
        "seed": np.array(SEEDS, dtype=np.int64),
        "known": np.stack(
            [np.pad(k, ((0, 2 - len(k)), (0, 0))) if k is not None else np.zeros((2, 3), np.float32) for k in KNOWN]
        ),
        "known_length": np.array([0 if k is None else len(k) for k in KNOWN], dtype=np.int32),
    }


@pytest.mark.parametrize(
    ("code", "wire", "mode"), [(TRITON_HTTP, "http", "binary"), (TRITON_HTTP, "http", "json"), (TRITON_GRPC, "grpc", "")]
)
def test_tritonclient_gets_the_policys_chunks(
    code: str, wire: str, mode: str, server: Running, local, expected, tmp_path: Path
):
    """In a process of its own: two packages named `inference` cannot share one."""
    np.savez(tmp_path / "inputs.npz", **infer_arrays())
    address = getattr(server, wire).partition("://")[2]
    command = [sys.executable, "-c", code, address, str(tmp_path / "inputs.npz"), mode]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    assert (answer["id"], answer["version"], answer["server"]) == ("r1", local.content_hash, "remask")
    np.testing.assert_allclose(answer["action"], [chunk.actions for chunk in expected], atol=1e-5)
    np.testing.assert_allclose(answer["confidence"], [chunk.info["confidence"] for chunk in expected], atol=1e-5)
    assert answer["rounds"] == [chunk.info["rounds"] for chunk in expected]


def test_our_client_lives_with_another_inference_package():
    """serve.client speaks the typed service, so a program may import tritonclient.grpc beside it."""
    modules = "tritonclient.grpc, serve.client, serve.client_wires, serve.protocol.policy_pb2_grpc, sys"
    code = f"import {modules}; print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "False"


def test_encoded_images_are_decoded_and_fitted(server: Running, local: TorchPolicy):
    (observation,) = observations(1)
    pictures = {name: encode_jpeg(np.kron(image, np.ones((2, 2, 1), np.uint8))) for name, image in observation.images.items()}
    request = policy_pb2.ActRequest(state=observation.state.tolist(), instruction=observation.instruction, seed=3)
    for name, picture in pictures.items():
        request.images.add(camera=name, encoded=picture)
    from serve.protocol.images import decode_image

    decoded = {name: fit_image(decode_image(picture, max_pixels=10_000), 36) for name, picture in pictures.items()}
    (want,) = local.act([type(observation)(decoded, observation.state, observation.instruction)], seeds=[3])
    with grpc.insecure_channel(server.grpc_address) as channel:
        answer = policy_pb2_grpc.PolicyServiceStub(channel).Act(request, timeout=30)
    np.testing.assert_array_equal(np.reshape(answer.actions.values, (4, 3)), want.actions)


def test_typed_contents_equal_raw_contents_over_grpc(server: Running, local: TorchPolicy):
    (observation, *_) = observations(COUNT)
    tensors = {
        **{f"observation.images.{name}": ("UINT8", image[None]) for name, image in observation.images.items()},
        "observation.state": ("FP32", observation.state[None]),
        "task": ("BYTES", np.array([observation.instruction.encode()], dtype=object)),
    }
    fields = {"UINT8": "uint_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
    request = oip_pb2.ModelInferRequest(model_name="policy", id="7")
    request.parameters["seed"].int64_param = 3
    for name, (datatype, array) in tensors.items():
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        getattr(tensor.contents, fields[datatype]).extend(array.ravel().tolist())
    with grpc.insecure_channel(server.grpc_address) as channel:
        infer = channel.unary_unary(
            f"/{'inference.GRPCInferenceService'}/ModelInfer",
            request_serializer=oip_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=oip_pb2.ModelInferResponse.FromString,
        )
        answer = infer(request, timeout=30)
    position = [output.name for output in answer.outputs].index("action")
    actions = np.frombuffer(answer.raw_output_contents[position], np.float32).reshape(4, 3)
    np.testing.assert_array_equal(actions, alone(local).actions)
    assert answer.id == "7" and answer.model_version == local.content_hash


def test_health_and_reflection_answer_standard_clients(server: Running):
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService", "remask.policy.v1.PolicyService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=10)
        names = {service.name for service in answer.list_services_response.service}
    assert {"inference.GRPCInferenceService", "remask.policy.v1.PolicyService", "grpc.health.v1.Health"} <= names


def test_the_openapi_document_describes_the_inference_body(server: Running):
    document = WEB.get(f"{server.http}/openapi.json").json()
    body = document["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/octet-stream"}
    assert "inputs" in body["application/json"]["schema"]["properties"]


def test_metadata_is_the_signature_that_inference_takes(server: Running, local: TorchPolicy):
    metadata = WEB.get(f"{server.http}/v2/models/policy/versions/{local.content_hash}").json()
    required = {tensor.name for tensor in oip.inputs_of(server.server.batcher.description) if not tensor.optional}
    assert required <= {tensor["name"] for tensor in metadata["inputs"]}
    assert metadata["parameters"]["spec"] == local.spec.to_dict() and metadata["versions"] == [local.content_hash]
    missing = WEB.get(f"{server.http}/v2/models/policy/versions/other")
    assert missing.status_code == 404 and "version" in missing.json()["error"]


def test_metrics_count_what_was_served(server: Running):
    with RemotePolicy(server.http) as remote:
        before = metric(server, "remask_policy_chunks_total")
        remote.act(observations(3))
        assert metric(server, "remask_policy_chunks_total") == before + 3
    assert metric(server, 'remask_requests_total{code="200",method="POST /v2/models/{name}/infer",protocol="http"}') >= 1
    assert metric(server, "remask_ready") == 1


def metric(server: Running, name: str) -> float:
    lines = WEB.get(f"{server.http}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))
