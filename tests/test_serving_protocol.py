"""Laws of the wires' formats: round trips, the checked-in stubs, and what bytes from a network cannot do."""

import json
import socket
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol import frames, msgpack_numpy, oip, oip_json
from serve.protocol.limits import Limits
from serve.protocol.observations import answer_of, chunk_of, message_of, request_of
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import Description, deadline_after, known_actions
from serve.protocol.stubs import generate
from serve.protocol.tensors import NUMERIC, datatype_of, from_raw, from_values, to_raw, to_values
from tests.reaching import SPEC
from tests.tiny_policy import observations
from vla.interface import ActionChunk

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits()
DESCRIPTION = Description(SPEC, 4, "0123456789abcdef")
ARRAYS = st.sampled_from(["?", "u1", "<i4", "<f4", "<f8", ">f4", "<f2"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=4).map(lambda shape: np.ones(shape, dtype=dtype))
)


def test_the_checked_in_stubs_are_what_the_proto_files_make(tmp_path: Path):
    pytest.importorskip("grpc_tools")
    generate(tmp_path)
    made = sorted((tmp_path / "serve" / "protocol").iterdir())
    assert len(made) == 4
    for path in made:
        kept = ROOT / "serve" / "protocol" / path.name
        assert path.read_text() == kept.read_text(), f"{kept.name} is stale: python -m serve.protocol.stubs"


# ------------------------------------------------------------------------------------------------------------- msgpack


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)


@given(st.recursive(LEAVES | ARRAYS, nested, max_leaves=8))
def test_what_is_packed_comes_back(message):
    def same(a, b) -> bool:
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
        if isinstance(a, list):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return a == b

    data = msgpack_numpy.pack(message)
    assert same(message, msgpack_numpy.unpack(data, max_bytes=len(data)))


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused_with_one_error(data: bytes):
    try:
        msgpack_numpy.unpack(data, max_bytes=1000)
    except ValueError as error:
        assert "Traceback" not in str(error)


def array(**changes) -> bytes:
    fields = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb(fields | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    "data",
    [
        array(dtype="O"),
        array(dtype="|V4"),
        array(dtype="<c8"),
        array(dtype=b"<f4"),
        array(dtype="no such"),
        array(shape=[3]),
        array(shape=[-2]),
        array(shape=[True, 2]),
        array(shape=[2**40, 2**40]),
        array(shape=[1] * 9),
        array(data="text"),
        array(data=None),
        msgpack.packb({b"__npgeneric__": True, b"data": b"\x80\x04.", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "u1"}),
        b"\x91" * 100_000 + b"\xc0",
        msgpack.packb({b"a": 1})[:-1],
        msgpack.packb(1) * 2,
    ],
)
def test_malformed_arrays_are_refused(data: bytes):
    with pytest.raises(ValueError, match="Not msgpack"):
        msgpack_numpy.unpack(data, max_bytes=1 << 20)


def test_objects_are_not_packed():
    for value in (np.array([object()]), object(), np.array([1j])):
        with pytest.raises(TypeError, match="msgpack cannot carry"):
            msgpack_numpy.pack({"value": value})


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("datatype", NUMERIC)
def test_tensors_come_back_from_raw_bytes_and_from_values(datatype: str):
    dtype = NUMERIC[datatype]
    values = np.arange(6).reshape(2, 3).astype(dtype)
    assert datatype_of(values) == datatype
    for back in (
        from_raw("x", datatype, (2, 3), to_raw(values)),
        from_values("x", datatype, (2, 3), json.loads(json.dumps(to_values(values)))),
        from_values("x", datatype, (2, 3), values.tolist()),
    ):
        assert back.dtype == dtype and np.array_equal(back, values)


def test_float32_survives_json_exactly():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert np.array_equal(from_values("x", "FP32", (1000,), json.loads(json.dumps(to_values(values)))), values)


def test_texts_come_back_as_bytes_tensors():
    texts = np.empty(3, dtype=object)
    texts[:] = [b"", "go right".encode(), "größer".encode()]
    assert list(from_raw("x", "BYTES", (3,), to_raw(texts))) == list(texts)
    assert list(from_values("x", "BYTES", (3,), to_values(texts))) == list(texts)


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "says"),
    [
        ("FP33", (1,), [1], "FP33"),
        ("FP32", (2,), [1], "carries 1 values"),
        ("FP32", (1,), ["a"], "does not consist"),
        ("FP32", (1,), [None], "does not consist"),
        ("FP32", (2, 2), [[1, 2], [3]], "ragged"),
        ("UINT8", (1,), [256], "range of UINT8"),
        ("UINT8", (1,), [-1], "range of UINT8"),
        ("UINT8", (1,), [1.5], "does not consist"),
        ("INT64", (1,), [2**70], "does not consist|range|too large"),
        ("BOOL", (1,), [1], "does not consist"),
        ("FP32", (-1,), [], "sizes are >= 0"),
        ("FP32", (1,) * 9, [1], "at most 8"),
        ("FP32", (2**20, 2**20), [], "at most"),
        ("BYTES", (1,), [5], "strings"),
        ("BYTES", (1,), ["\ud800"], "not Unicode"),
    ],
)
def test_wrong_values_name_the_input_and_what_is_wrong(datatype, shape, values, says):
    with pytest.raises(Refusal, match=says) as caught:
        from_values("state", datatype, shape, values)
    assert caught.value.code is Code.INVALID and "'state'" in str(caught.value)


@given(st.binary(max_size=40), st.integers(0, 4))
def test_random_bytes_tensors_are_read_or_refused(data: bytes, count: int):
    try:
        items = from_raw("x", "BYTES", (count,), data)
        assert len(items) == count and to_raw(items) == data
    except Refusal as refusal:
        assert refusal.code is Code.INVALID


# -------------------------------------------------------------------------------------------- the Open Inference Protocol


def infer_body(**changes) -> dict:
    (observation,) = observations(1)
    inputs = {
        **{f"observation.images.{name}": ("UINT8", image[None]) for name, image in observation.images.items()},
        "observation.state": ("FP32", observation.state[None]),
        "task": ("BYTES", [observation.instruction]),
    }
    entries = [
        {"name": name, "datatype": datatype, "shape": list(np.shape(values)), "data": np.asarray(values).ravel().tolist()}
        for name, (datatype, values) in inputs.items()
    ]
    return {"inputs": entries} | changes


def requests_of(body: dict | bytes, json_length: str | None = None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parsed = oip_json.parse(data, json_length, LIMITS)
    return oip.act_requests(DESCRIPTION, LIMITS, parsed.inputs, parsed.parameters)


def test_an_inference_request_is_the_observation_it_was_made_of():
    (observation,) = observations(1)
    (request,) = requests_of(infer_body(parameters={"seed": 7}))
    assert request.seed == 7 and request.observation.instruction == observation.instruction
    assert np.array_equal(request.observation.state, observation.state)
    assert all(np.array_equal(request.observation.images[name], image) for name, image in observation.images.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body["inputs"].pop(0), "observation.images.base' is missing"),
        (lambda body: body["inputs"].append(dict(body["inputs"][0])), "there twice"),
        (lambda body: body["inputs"].append({"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}), "no input 'x'"),
        (lambda body: body["inputs"][2].update(shape=[3]), "rows"),
        (lambda body: body["inputs"][2].update(data=[1.0, 2.0, 1e39]), "not finite"),
        (lambda body: body["inputs"][3].update(data=["x" * 3000]), "3000 characters"),
        (lambda body: body.update(parameters={"seed": -1}), "seed"),
        (lambda body: body.update(parameters={"timeout_ms": 0}), "timeout"),
        (lambda body: body.update(inputs=[]), "inputs"),
        (lambda body: body["inputs"][0].pop("data"), "neither data nor binary_data_size"),
        (lambda body: body["inputs"][0].update(parameters={"binary_data_size": 10}), "binary_data_size"),
    ],
)
def test_a_wrong_request_names_what_is_wrong(change, says: str):
    body = infer_body()
    change(body)
    with pytest.raises(Refusal, match=says) as caught:
        requests_of(body)
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"inputs": NaN}', b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"inputs": 1}']
)
def test_a_body_that_is_no_request_is_refused(data: bytes):
    with pytest.raises(Refusal) as caught:
        requests_of(data)
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "1e3", "", "٣"])
def test_a_wrong_json_length_is_refused(length: str):
    with pytest.raises(Refusal, match=oip_json.JSON_LENGTH_HEADER):
        requests_of(json.dumps(infer_body()).encode(), length)


def test_an_answer_is_the_same_as_json_and_as_binary_tensors():
    chunk = ActionChunk(
        np.ones((4, 3), np.float32) / 3, {"rounds": 2, "confidence": np.full((4, 3), 0.1, np.float32), "milliseconds": 1.5}
    )
    tensors = oip.output_tensors([chunk, chunk])
    assert list(tensors) == ["action", "confidence", "rounds", "milliseconds"]
    request = oip_json.InferRequest("id", {}, {}, (), None)
    body, length = oip_json.response(request, "policy", "v", tensors)
    head, position = json.loads(body[:length]), length
    plain, no_length = oip_json.response(oip_json.InferRequest("id", {}, {}, (), frozenset()), "policy", "v", tensors)
    assert no_length is None and head["id"] == "id"
    for output, values in zip(head["outputs"], json.loads(plain)["outputs"], strict=True):
        size = output["parameters"]["binary_data_size"]
        binary = from_raw("x", output["datatype"], output["shape"], body[position : position + size])
        position += size
        assert np.array_equal(binary, from_values("x", values["datatype"], values["shape"], values["data"]))
    assert position == len(body)


# --------------------------------------------------------------------------------------------------- openpi's messages


def test_openpi_messages_are_the_observation_they_were_made_of():
    (observation,) = observations(1)
    known = np.ones((2, 3), np.float32)
    data = msgpack_numpy.pack(message_of(observation, known=known, seed=3, timeout_s=2.0))
    request = request_of(DESCRIPTION, LIMITS, msgpack_numpy.unpack(data, max_bytes=len(data)))
    assert np.array_equal(request.known, known) and request.seed == 3 and 1.0 < request.remaining_s <= 2.0
    assert all(np.array_equal(request.observation.images[name], image) for name, image in observation.images.items())


def test_openpi_libero_keys_are_understood_and_its_image_size_is_fitted():
    message = {
        "observation/image": np.full((224, 224, 3), 7, np.uint8),
        "observation/wrist_image": np.full((224, 224, 3), 9, np.uint8),
        "observation/state": np.zeros(3, np.float64),
        "prompt": "go to the bright side",
    }
    images = request_of(DESCRIPTION, LIMITS, message).observation.images
    assert images["base"].shape == (36, 36, 3) and (images["base"] == 7).all() and (images["wrist"] == 9).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "must be text"),
        ({"prompt": b"bytes"}, "must be text"),
        ({"observation/state": "text"}, "expected numbers"),
        ({"observation/state": [[1.0], [2.0, 3.0]]}, "ragged"),
        ({"observation/state": np.zeros(5)}, "expected \\(3,\\)"),
        ({"observation/image": np.zeros((8, 8, 3))}, "expected uint8"),
        ({"observation/image": np.zeros((0, 8, 3), np.uint8)}, "pixels"),
        ({"observation/image": np.zeros((3000, 3000, 3), np.uint8)}, "pixels"),
        ({"remask/seed": 1.5}, "expected a number"),
        ({"remask/seed": True}, "expected a number"),
        ({"remask/delay": 1}, "no actions were sent"),
        ({"remask/tail": np.ones((2, 2), np.float32)}, "known actions"),
        ({"remask/timeout_ms": float("nan")}, "timeout"),
    ],
)
def test_a_wrong_openpi_message_names_what_is_wrong(change: dict, says: str):
    (observation,) = observations(1)
    message = message_of(observation) | {"observation/image": observation.images["base"]} | change
    with pytest.raises(Refusal, match=says):
        request_of(DESCRIPTION, LIMITS, message)


def test_a_chunk_comes_back_from_openpi_answer():
    chunk = ActionChunk(np.ones((4, 3), np.float32), {"rounds": 2, "milliseconds": 1.5, "checkpoint": "v"})
    data = msgpack_numpy.pack(answer_of(chunk))
    back = chunk_of(msgpack_numpy.unpack(data, max_bytes=len(data)))
    assert np.array_equal(back.actions, chunk.actions) and back.info == chunk.info


# ------------------------------------------------------------------------------------------------- real-time chunking


def test_an_answer_starts_with_the_part_of_the_tail_that_the_delay_covers():
    tail = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert np.array_equal(known_actions(DESCRIPTION, tail, 2), tail[:2])
    assert np.array_equal(known_actions(DESCRIPTION, tail, None), tail)
    assert known_actions(DESCRIPTION, tail, 0) is None and known_actions(DESCRIPTION, None, None) is None


@pytest.mark.parametrize(("rows", "delay"), [(3, 4), (5, None), (0, 1), (3, -1)])
def test_a_delay_that_the_tail_or_the_chunk_cannot_bridge_is_refused(rows: int, delay: int | None):
    with pytest.raises(Refusal, match="delay"):
        known_actions(DESCRIPTION, np.zeros((rows, 3), np.float32), delay)


def test_deadlines_are_the_clients_within_the_servers():
    assert deadline_after(None, LIMITS) - deadline_after(1.0, LIMITS) == pytest.approx(LIMITS.timeout_s - 1, abs=0.1)
    assert deadline_after(1e9, LIMITS) - deadline_after(None, LIMITS) == pytest.approx(
        LIMITS.max_timeout_s - LIMITS.timeout_s, abs=0.1
    )


def test_frames_come_back_on_both_kinds_of_socket():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, {"a": np.arange(3)})
        assert np.array_equal(frames.receive(theirs)["a"], np.arange(3))
        ours.close()
        with pytest.raises(EOFError):
            frames.receive(theirs)
