"""Malformed and hostile traffic for a server, by wire; every answer is judged. tests and bench_fuzz share it.

Allowed answers: success, a refusal in the protocol's own form, or a closed connection where the protocol itself was broken.
Not allowed: INTERNAL (5xx) other than a named overload or deadline, a traceback, silence.
"""

import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serve.protocol import msgpack_numpy, policy_pb2
from serve.protocol import open_inference_pb2 as oip_pb2
from serve.protocol.observations import message_of
from tests.odd_policy import odd_observation

NAMED_5XX = (503, 504)
TIMEOUT_S = 30.0
ALLOWED_CLOSES = (1000, 1002, 1003, 1006, 1007, 1008, 1009)
BAD_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)


class Misbehaved(AssertionError):
    """The server answered as it must not; the text says to what."""


def judge_http(status: int, body: bytes, what: str) -> None:
    if status >= 500 and status not in NAMED_5XX:
        raise Misbehaved(f"HTTP {status} for {what}: {body[:300]!r}")
    if status >= 400 and not (b"error" in body or b"ready" in body or status == 400):
        raise Misbehaved(f"HTTP {status} without a reason for {what}: {body[:300]!r}")
    if b"Traceback" in body:
        raise Misbehaved(f"a traceback for {what}: {body[:300]!r}")


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The bytes with a few of them flipped, cut, doubled or replaced."""
    array = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        if not array:
            array += generator.randbytes(8)
        place = generator.randrange(len(array))
        match generator.randrange(5):
            case 0:
                array[place] ^= 1 << generator.randrange(8)
            case 1:
                del array[place : place + generator.randint(1, 16)]
            case 2:
                array[place:place] = array[place : place + 16]
            case 3:
                array[place:place] = generator.randbytes(generator.randint(1, 8))
            case 4:
                array[place : place + 4] = struct.pack("<I", generator.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    return bytes(array)


# ------------------------------------------------------------------------------------------------------------------ gRPC


def valid_act(generator: random.Random) -> policy_pb2.ActRequest:
    observation = odd_observation(state=generator.random())
    request = policy_pb2.ActRequest(state=observation.state.tolist(), instruction="go", seed=generator.randrange(1 << 32))
    for name, image in observation.images.items():
        raw = request.images.add(camera=name).raw
        raw.height, raw.width, raw.data = *image.shape[:2], image.tobytes()
    return request


def odd_act(generator: random.Random) -> policy_pb2.ActRequest:
    """A well-formed message with one field that makes no sense."""
    request = valid_act(generator)
    match generator.randrange(9):
        case 0:
            request.state.extend([float("nan")] * generator.randrange(5))
        case 1:
            del request.images[generator.randrange(len(request.images)) :]
        case 2:
            request.images[0].raw.height = generator.choice((-1, 0, 1 << 30))
        case 3:
            request.images[0].encoded = generator.randbytes(50)
        case 4:
            request.tail.steps, request.tail.dims = generator.choice(((1 << 30, 1 << 30), (-1, 7), (2, 7), (0, 0)))
        case 5:
            request.delay = generator.choice((-(1 << 31), -1, 1, (1 << 31) - 1))
        case 6:
            request.seed = (1 << 64) - 1
        case 7:
            request.instruction = "\0" * generator.randrange(5000)
        case 8:
            request.images.add(camera="other" * generator.randrange(100))
    return request


def odd_infer(generator: random.Random) -> oip_pb2.ModelInferRequest:
    request = oip_pb2.ModelInferRequest(model_name="policy")
    observation = odd_observation()
    tensors = [
        *((f"observation.images.{name}", "UINT8", (1, *o.shape), o.tobytes()) for name, o in observation.images.items()),
        ("observation.state", "FP32", (1, 3), observation.state.tobytes()),
        ("task", "BYTES", (1,), b"\x02\0\0\0go"),
    ]
    for name, datatype, shape, data in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(data)
    place = generator.randrange(len(request.inputs))
    match generator.randrange(9):
        case 0:
            request.inputs[place].datatype = generator.choice(("FP16", "BF16", "BYTES", "", "INT64"))
        case 1:
            request.inputs[place].shape[0] = generator.choice((-1, 0, 2, 1 << 62))
        case 2:
            request.raw_input_contents[place] = generator.randbytes(generator.randrange(100))
        case 3:
            del request.raw_input_contents[place]
        case 4:
            request.inputs[place].name = generator.choice(("", "x", "task", "known", "delay"))
        case 5:
            request.parameters["timeout_ms"].string_param = "soon"
        case 6:
            request.parameters["seed"].double_param = float("inf")
        case 7:
            request.outputs.add(name=generator.choice(("", "action", "x")))
        case 8:
            request.model_name = generator.choice(("", "other", "policy"))
    return request


METHODS: dict[str, Callable[[random.Random], Any]] = {
    "/remask.policy.v1.PolicyService/Act": odd_act,
    "/inference.GRPCInferenceService/ModelInfer": odd_infer,
    "/inference.GRPCInferenceService/ModelMetadata": lambda g: oip_pb2.ModelMetadataRequest(
        name=g.choice(("policy", "x" * 1000, ""))
    ),
    "/inference.GRPCInferenceService/ModelReady": lambda g: oip_pb2.ModelReadyRequest(
        name="policy", version=g.choice(("", "x"))
    ),
    "/remask.policy.v1.PolicyService/Describe": lambda g: policy_pb2.DescribeRequest(),
    "/remask.policy.v1.PolicyService/NoSuch": lambda g: policy_pb2.DescribeRequest(),
}


def fuzz_grpc(address: str, count: int, seed: int, *, at_once: int = 16) -> Counter[str]:
    """Unary calls with odd or broken messages, and streams of them; answers by status."""
    generator, answers = random.Random(seed), Counter[str]()
    with grpc.insecure_channel(address) as channel:
        waiting: list[tuple[Any, str]] = []

        def collect(keep: int) -> None:
            while len(waiting) > keep:
                call, what = waiting.pop(0)
                answers[judge_grpc(call, what)] += 1

        for index in range(count):
            if index % 50 == 0:
                answers.update(_fuzz_session(channel, generator))
            method = generator.choice(list(METHODS))
            data = METHODS[method](generator).SerializeToString()
            if generator.random() < 0.5:
                data = mutated(data, generator)
            call = channel.unary_unary(method).future(data, timeout=TIMEOUT_S)
            if generator.random() < 0.02:
                call.cancel()
            waiting.append((call, f"{method} {data[:80]!r}"))
            collect(at_once)
        collect(0)
    return answers


def judge_grpc(call: Any, what: str) -> str:
    try:
        call.result()
        return "OK"
    except grpc.FutureCancelledError:
        return "CANCELLED"
    except grpc.RpcError as error:
        if error.code() in BAD_CODES or "Traceback" in (error.details() or ""):
            raise Misbehaved(f"{error.code()} {error.details()} for {what}") from error
        return error.code().name


def _fuzz_session(channel: grpc.Channel, generator: random.Random) -> Counter[str]:
    """A stream of odd messages: every one is answered, in order, or the stream ends with a status of its own."""
    messages = []
    for sequence in range(generator.randrange(1, 8)):
        request = policy_pb2.SessionRequest(sequence=sequence)
        match generator.randrange(3):
            case 0:
                request.observe.CopyFrom(odd_act(generator))
            case 1:
                request.reset.SetInParent()
        messages.append(request.SerializeToString())
    broken = generator.random() < 0.3
    if broken:
        messages.append(mutated(messages[-1] + b"\xff", generator))
    call = channel.stream_stream("/remask.policy.v1.PolicyService/Session")(iter(messages), timeout=TIMEOUT_S)
    try:
        answered = [policy_pb2.SessionResponse.FromString(data) for data in call]
    except grpc.RpcError as error:
        if error.code() in BAD_CODES:
            raise Misbehaved(f"a session ended with {error.code()} {error.details()}") from error
        return Counter({error.code().name: 1})
    if not broken and [answer.sequence for answer in answered] != list(range(len(messages))):
        raise Misbehaved(f"a session of {len(messages)} messages had the answers {[answer.sequence for answer in answered]}")
    wrong = [answer.error for answer in answered if answer.error.code in ("INTERNAL", "UNKNOWN")]
    if wrong:
        raise Misbehaved(f"a session's observation failed: {wrong[0]}")
    return Counter({"session answers": len(answered)})


# ------------------------------------------------------------------------------------------------------------- WebSocket


def odd_message(generator: random.Random) -> bytes | str:
    """One frame: text, noise, odd msgpack, or an observation with one odd value."""
    observation = odd_observation(state=generator.random())
    message: dict[Any, Any] = message_of(observation, seed=generator.randrange(1 << 32))
    match generator.randrange(8):
        case 0:
            return generator.randbytes(generator.randrange(200))
        case 1:
            return "text " * generator.randrange(20)
        case 2:
            return msgpack.packb(generator.choice((None, 1, [], "x", {1: 2}, {b"__ndarray__": True})))
        case 3:
            return mutated(msgpack_numpy.pack(message), generator)
        case 4:
            key = generator.choice(list(message))
            message[key] = generator.choice((None, -1, 2**63, 1.5, "x", b"x", [[]], {}, np.zeros((1 << 12,)), float("inf")))
        case 5:
            message["remask/tail"] = np.full((generator.randrange(10), generator.randrange(10)), generator.random(), np.float32)
            message["remask/delay"] = generator.randrange(-2, 12)
        case 6:
            del message[generator.choice(list(message))]
        case 7:
            pass
    return msgpack_numpy.pack(message)


def fuzz_websocket(url: str, count: int, seed: int, *, pipelined: int = 8) -> Counter[str]:
    """Messages on connections that are opened again when the server has closed them; answers by kind."""
    generator, answers = random.Random(seed), Counter[str]()
    sent = 0
    while sent < count:
        with connect(url, compression=None, max_size=None, proxy=None) as socket_:
            socket_.recv(TIMEOUT_S)
            try:
                for _ in range(generator.randrange(1, 200)):
                    burst = generator.randrange(1, pipelined + 1)
                    messages = [odd_message(generator) for _ in range(burst)]
                    for message in messages:
                        socket_.send(message)
                    sent += burst
                    for message in messages:
                        answers[judge_websocket(socket_.recv(TIMEOUT_S), message)] += 1
                    if sent >= count or generator.random() < 0.01:
                        break
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else 1006
                if code not in ALLOWED_CLOSES:
                    raise Misbehaved(f"the connection was closed with {code}") from closed
                answers[f"close {code}"] += 1
            except TimeoutError as error:
                raise Misbehaved(f"no answer within {TIMEOUT_S} s") from error
    return answers


def judge_websocket(answer: bytes | str, message: bytes | str) -> str:
    if isinstance(answer, str):
        name = answer.partition(":")[0]
        if name == "INTERNAL" or "Traceback" in answer:
            raise Misbehaved(f"{answer} for {message[:200]!r}")
        return name
    actions = msgpack_numpy.unpack(answer, max_bytes=1 << 20)["actions"]
    if not np.isfinite(actions).all():
        raise Misbehaved(f"actions that are not finite for {message[:200]!r}")
    return "OK"


def fuzz_sockets(port: int, count: int, seed: int) -> Counter[str]:
    """Bytes that are no HTTP, or HTTP and WebSocket frames cut and bent: an answer or a closed connection, soon."""
    generator, answers = random.Random(seed), Counter[str]()
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    frames = [b"\x82\x81\0\0\0\0x", b"\x81\x82\0\0\0\0\xff\xfe", b"\x83\x80\0\0\0\0", b"\x80\x80\0\0\0\0"]
    frames += [b"\x82\xff" + b"\xff" * 8, b"\x02\x80\0\0\0\0"]
    plain = b"POST /v2/models/policy/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\nConnection: close\r\n\r\n{}{}"
    for _ in range(count):
        data = generator.choice((
            generator.randbytes(60), mutated(plain, generator), upgrade + generator.choice(frames), mutated(upgrade, generator)
        ))
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                said = b"".join(iter(lambda: connection.recv(65536), b""))  # noqa: B023
            except TimeoutError as error:
                raise Misbehaved(f"neither an answer nor an end to {data!r}") from error
            except ConnectionError:
                answers["reset"] += 1
                continue
        status = said.split(b" ", 2)[1].decode() if said.startswith(b"HTTP/1.1 ") else "nothing"
        if status.startswith("5") and int(status) not in NAMED_5XX or b"Traceback" in said:
            raise Misbehaved(f"{said[:200]!r} for {data!r}")
        answers[status] += 1
    return answers


def summary(answers: Counter[str]) -> str:
    return json.dumps(dict(sorted(answers.items())))
