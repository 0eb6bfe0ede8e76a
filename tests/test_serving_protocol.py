"""Laws of the wires' formats: round trips, the checked-in stubs, and what bytes from a network cannot do."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol import frames, msgpack_numpy, oip, oip_json
from serve.protocol.images import decode_data_url, decode_image, encode_jpeg, fit_image
from serve.protocol.limits import Limits
from serve.protocol.observations import answer_of, chunk_of, message_of, request_of
from serve.protocol.refusal import Code, Refusal, parse_line
from serve.protocol.requests import Description, deadline_after, known_actions
from serve.protocol.stubs import generate
from serve.protocol.tensors import NUMERIC, datatype_of, from_raw, from_values, to_raw, to_values
from serve.recordings import film, list_episodes, list_runs
from serve.security import Keys, SecurityConfig, check_binding
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


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary() | ARRAYS,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8))  # fmt: skip
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


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"inputs": NaN}', b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"inputs": 1}'])
def test_a_body_that_is_no_request_is_refused(data: bytes):
    with pytest.raises(Refusal) as caught:
        requests_of(data)
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize("length", ["-1", "x", "99999999", "1e3", "", "٣"])
def test_a_wrong_json_length_is_refused(length: str):
    with pytest.raises(Refusal, match=oip_json.JSON_LENGTH_HEADER):
        requests_of(json.dumps(infer_body()).encode(), length)


def test_an_answer_is_the_same_as_json_and_as_binary_tensors():
    chunk = ActionChunk(np.ones((4, 3), np.float32) / 3, {"rounds": 2, "confidence": np.full((4, 3), 0.1, np.float32), "milliseconds": 1.5})
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
    assert deadline_after(1e9, LIMITS) - deadline_after(None, LIMITS) == pytest.approx(LIMITS.max_timeout_s - LIMITS.timeout_s, abs=0.1)


# --------------------------------------------------------------------------------------------------------------- images


def png_header_of(width: int, height: int) -> bytes:
    """A small PNG that says it is huge."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0" * 10_000)) + block(b"IEND", b"")


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(Refusal, match="pixels") as caught:
        decode_image(png_header_of(60_000, 60_000), max_pixels=1 << 22)
    assert caught.value.code is Code.TOO_LARGE


def test_other_formats_and_damaged_files_are_refused():
    from PIL import Image

    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, format="GIF")
    jpeg = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    for data in (b"", b"x" * 100, gif.getvalue(), jpeg[:100], png_header_of(64, 64)):
        with pytest.raises(Refusal) as caught:
            decode_image(data, max_pixels=1 << 22)
        assert caught.value.code is Code.INVALID


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "data:text/html;base64,AAAA", "data:image/png,AAAA", "", "data:image/png;base64,@@@@"])
def test_only_data_urls_are_images(url: str):
    with pytest.raises(Refusal):
        decode_data_url(url, max_bytes=1000, max_pixels=1000)


def test_an_image_in_a_data_url_is_that_image():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert np.array_equal(decode_data_url(url, max_bytes=10_000, max_pixels=63), pixels)


def test_fitting_pads_to_a_square_and_leaves_a_fitting_image_alone():
    wide = np.full((40, 80, 3), 200, np.uint8)
    fitted = fit_image(wide, 36)
    assert fitted.shape == (36, 36, 3) and (fitted[:9] == 0).all() and (fitted[10:26] == 200).all()
    assert fit_image(fitted, 36) is fitted


# ------------------------------------------------------------------------------------------------ refusals, keys, files


@pytest.mark.parametrize("code", Code)
def test_a_refusal_comes_back_from_its_line(code: Code):
    for after in (None, 0.25):
        refusal = Refusal(code, "what: where, next move.", retry_after_s=after)
        back = parse_line(refusal.line)
        assert (back.code, back.message, back.retry_after_s) == (code, refusal.message, refusal.retry_after_s)
    assert parse_line("some traceback").code is Code.INTERNAL


def test_keys_are_accepted_in_both_schemes_and_nothing_else_is():
    keys = Keys(("correct horse battery", "another key of ours"))
    assert keys.accept("Bearer correct horse battery") and keys.accept("Api-Key another key of ours")
    for header in (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic correct horse battery", "correct horse battery", "Bearer corr\udce9ct"):
        assert not keys.accept(header)
    assert Keys().accept(None) and not Keys()
    with pytest.raises(ValueError, match="16"):
        Keys(("short",))


@pytest.mark.parametrize(("host", "allowed"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False), ("10.0.0.1", False)])
def test_a_server_without_key_or_tls_stays_on_this_machine(host: str, allowed: bool):
    if allowed:
        check_binding(host, SecurityConfig(), Keys())
    else:
        with pytest.raises(ValueError, match="key"):
            check_binding(host, SecurityConfig(), Keys())
        check_binding(host, SecurityConfig(), Keys(("correct horse battery",)))


def test_a_key_file_may_hold_comments_and_must_hold_a_key(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("REMASK_API_KEY", raising=False)
    (tmp_path / "keys").write_text("# robots\ncorrect horse battery\n\n")
    assert Keys.load(SecurityConfig(key_file=tmp_path / "keys")).accept("Bearer correct horse battery")
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys.load(SecurityConfig(key_file=tmp_path / "keys"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "lift"
    (run / "videos").mkdir(parents=True)
    (run / "videos" / "e.mp4").write_bytes(b"film")
    row = {"suite": "robosuite_lift", "task": 0, "episode": 1, "instruction": "lift", "success": True, "steps": 9, "error": None,
           "rounds": 2.5, "policy_ms": 3.0, "video": "videos/e.mp4", "wall_s": 1.0}  # fmt: skip
    (run / "episodes.jsonl").write_text(json.dumps(row) + '\n{"torn": \n' + '{"other": 1}\n')
    (tmp_path / "secret.mp4").write_text("secret")
    (run / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    return tmp_path / "runs"


def test_recordings_are_listed_and_their_films_found(runs: Path):
    (run,) = list_runs(runs)
    assert (run.name, run.suite, run.films) == ("lift", "robosuite_lift", 1)
    (episode,) = list_episodes(runs, "lift")
    assert episode.success and film(runs, "lift", episode.video).read_bytes() == b"film"


@pytest.mark.parametrize("path", ["../episodes.jsonl", "videos/../../secret.mp4", "/etc/passwd", "videos/link.mp4", "episodes.jsonl", "videos", "videos/none.mp4"])
def test_nothing_outside_a_runs_films_is_ever_opened(runs: Path, path: str):
    with pytest.raises(Refusal) as caught:
        film(runs, "lift", path)
    assert caught.value.code is Code.NOT_FOUND


@pytest.mark.parametrize("name", ["..", ".", "", "../runs/lift", "none", "li\0ft", "lift/"])
def test_a_run_is_a_folder_of_the_root(runs: Path, name: str):
    with pytest.raises(Refusal):
        list_episodes(runs, name)


def test_frames_come_back_on_both_kinds_of_socket():
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames.send(ours, {"a": np.arange(3)})
        assert np.array_equal(frames.receive(theirs)["a"], np.arange(3))
        ours.close()
        with pytest.raises(EOFError):
            frames.receive(theirs)
