"""Two wires of serve/client.py: Open Inference Protocol over HTTP, and openpi's WebSocket (gRPC: serve/client_grpc.py).

Each imports its library when it is used.
"""

import contextlib
import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from serve.protocol import msgpack_numpy
from serve.protocol.observations import DELAY, chunk_of, message_of
from serve.protocol.refusal import Code, Refusal, parse_line
from serve.protocol.requests import Description
from serve.protocol.tensors import JSON_LENGTH_HEADER, datatype_of, from_raw, to_raw
from vla.interface import ActionChunk, Observation

MAX_ANSWER_BYTES = 64 << 20
HTTP_BATCH = 32  # observations in one HTTP request
PIPELINED = 8  # unanswered WebSocket messages


@dataclass(frozen=True)
class Question:
    """One observation on its way."""

    observation: Observation
    tail: np.ndarray | None  # [n, D]
    delay: int | None
    seed: int


@dataclass(frozen=True)
class TlsFiles:
    """PEM files; None: the system's authorities, no client certificate."""

    ca: Path | None
    certificate: Path | None
    key: Path | None

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


class Wire(Protocol):
    """Raises Refusal for whatever goes wrong, UNAVAILABLE for a connection that cannot be made or breaks."""

    def describe(self, timeout_s: float) -> Description: ...

    def act(self, questions: Sequence[Question], timeout_s: float) -> list[ActionChunk]: ...

    def close(self) -> None: ...


def connect(url: str, key: str | None, tls: TlsFiles) -> Wire:
    """The wire of a URL's scheme; nothing is sent yet."""
    match urlsplit(url).scheme:
        case "grpc" | "grpcs":
            from serve.client_grpc import GrpcWire

            return GrpcWire(url, key, tls)
        case "ws" | "wss":
            return WebSocketWire(url, key, tls)
        case _:
            return HttpWire(url, key, tls)


class HttpWire:
    """One request for all observations, binary tensors both ways."""

    def __init__(self, url: str, key: str | None, tls: TlsFiles) -> None:
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        # Without TLS a context that trusts nobody: reading the system's authorities takes longer than a request.
        verify = tls.context() if urlsplit(url).scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._errors = httpx.HTTPError
        self._timeout = httpx.TimeoutException
        self._client = httpx.Client(base_url=url, headers=headers, verify=verify, trust_env=False)

    def describe(self, timeout_s: float) -> Description:
        return Description.from_dict(self._send("GET", "/v2/models/policy", timeout_s).json()["parameters"])

    def act(self, questions: Sequence[Question], timeout_s: float) -> list[ActionChunk]:
        batches = (questions[first : first + HTTP_BATCH] for first in range(0, len(questions), HTTP_BATCH))
        return [chunk for batch in batches for chunk in self._act(batch, timeout_s)]

    def close(self) -> None:
        self._client.close()

    def _act(self, questions: Sequence[Question], timeout_s: float) -> list[ActionChunk]:
        inputs, blobs = [], []
        for name, array in _tensors(questions).items():
            blobs.append(to_raw(array))
            parameters = {"binary_data_size": len(blobs[-1])}
            inputs.append({"name": name, "datatype": datatype_of(array), "shape": list(array.shape), "parameters": parameters})
        asked = {"inputs": inputs, "parameters": {"binary_data_output": True, "timeout_ms": 1000 * timeout_s}}
        head = json.dumps(asked).encode()
        headers = {JSON_LENGTH_HEADER: str(len(head)), "content-type": "application/octet-stream"}
        response = self._send("POST", "/v2/models/policy/infer", timeout_s, content=head + b"".join(blobs), headers=headers)
        return _chunks(response.content, int(response.headers[JSON_LENGTH_HEADER]))

    def _send(self, method: str, path: str, timeout_s: float, **options: Any) -> Any:
        try:
            response = self._client.request(method, path, timeout=timeout_s, **options)
        except self._timeout as error:
            raise Refusal(Code.DEADLINE, f"no answer within {timeout_s:.1f} s ({type(error).__name__})") from error
        except self._errors as error:
            raise Refusal(Code.UNAVAILABLE, f"the connection failed ({error})", retry_after_s=0.0) from error
        if response.status_code == 200:
            return response
        raise _http_refusal(response)


class WebSocketWire:
    """openpi's messages; a few observations may be on the way at once."""

    def __init__(self, url: str, key: str | None, tls: TlsFiles) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"} if key else {}
        self._context = tls.context() if urlsplit(url).scheme == "wss" else None
        self._socket: Any = None
        self._opened = contextlib.ExitStack()
        self._metadata: dict[str, Any] = {}

    def describe(self, timeout_s: float) -> Description:
        self._open(timeout_s)
        return Description.from_dict(self._metadata)

    def act(self, questions: Sequence[Question], timeout_s: float) -> list[ActionChunk]:
        from websockets.exceptions import ConnectionClosed

        messages = [_message(question, timeout_s) for question in questions]
        self._open(timeout_s)
        answers: list[Any] = []
        with contextlib.ExitStack() as unless_answered:
            unless_answered.callback(self.close)  # also on Ctrl-C: an answer that is left unread would be taken for another's
            try:
                for index, message in enumerate(messages):
                    self._socket.send(message)
                    if index >= PIPELINED - 1:
                        answers.append(self._socket.recv(timeout_s))
                while len(answers) < len(questions):
                    answers.append(self._socket.recv(timeout_s))
            except TimeoutError as error:
                raise Refusal(Code.DEADLINE, f"no answer within {timeout_s:.1f} s") from error
            except (ConnectionClosed, OSError) as error:
                raise Refusal(Code.UNAVAILABLE, f"the connection broke ({error})", retry_after_s=0.0) from error
            unless_answered.pop_all()
        refused = [parse_line(answer) for answer in answers if isinstance(answer, str)]
        if refused:
            raise refused[0]
        return [chunk_of(msgpack_numpy.unpack(answer, max_bytes=MAX_ANSWER_BYTES)) for answer in answers]

    def close(self) -> None:
        self._socket = None
        with contextlib.suppress(OSError):
            self._opened.close()

    def _open(self, timeout_s: float) -> None:
        if self._socket is not None:
            return
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect as websocket

        try:
            connection = websocket(
                self._url,
                additional_headers=self._headers,
                ssl=self._context,
                compression=None,
                max_size=MAX_ANSWER_BYTES,
                open_timeout=timeout_s,
                close_timeout=1.0,
                proxy=None,
            )
            self._socket = self._opened.enter_context(connection)
            self._metadata = msgpack_numpy.unpack(self._socket.recv(timeout_s), max_bytes=MAX_ANSWER_BYTES)
        except InvalidStatus as error:
            raise _status_refusal(error.response.status_code, bytes(error.response.body or b"")) from error
        except (WebSocketException, OSError, TimeoutError) as error:
            self.close()
            raise Refusal(Code.UNAVAILABLE, f"the connection failed ({error})", retry_after_s=0.0) from error


def _message(question: Question, timeout_s: float) -> bytes:
    message = message_of(question.observation, known=question.tail, seed=question.seed, timeout_s=timeout_s)
    return msgpack_numpy.pack(message if question.delay is None else message | {DELAY: question.delay})


def _tensors(questions: Sequence[Question]) -> dict[str, np.ndarray]:
    """The inputs of serve/protocol/oip.py."""
    observations = [question.observation for question in questions]
    tasks = np.empty(len(questions), dtype=object)
    tasks[:] = [observation.instruction.encode() for observation in observations]
    tensors = {
        f"observation.images.{camera}": np.stack([observation.images[camera] for observation in observations])
        for camera in observations[0].images
        if all(camera in observation.images for observation in observations)
    }
    tensors |= {
        "observation.state": np.stack([np.asarray(observation.state, np.float32) for observation in observations]),
        "task": tasks,
        "seed": np.array([question.seed for question in questions], dtype=np.int64),
    }
    tails = [question.tail for question in questions]
    if any(tail is not None for tail in tails):
        lengths = [0 if tail is None else len(tail) for tail in tails]
        width = next(np.shape(tail)[1] for tail in tails if tail is not None)
        known = np.zeros((len(tails), max(lengths), width), dtype=np.float32)
        for row, tail in enumerate(tails):
            if tail is not None:
                known[row, : len(tail)] = tail
        delays = [length if q.delay is None else q.delay for q, length in zip(questions, lengths, strict=True)]
        tensors |= {"known": known, "known_length": np.array(lengths, np.int32), "delay": np.array(delays, np.int32)}
    return tensors


def _chunks(body: bytes, json_length: int) -> list[ActionChunk]:
    """The answer of an inference request, all of whose outputs are binary."""
    answer = json.loads(body[:json_length])
    tensors, position = {}, json_length
    for output in answer["outputs"]:
        size = output["parameters"]["binary_data_size"]
        tensors[output["name"]] = from_raw(
            output["name"], output["datatype"], output["shape"], body[position : position + size]
        )
        position += size
    actions = tensors.pop("action")
    checkpoint = {"checkpoint": answer["model_version"]}
    scalars = ("rounds", "milliseconds")
    return [
        ActionChunk(
            actions[row].copy(),
            checkpoint | {name: array[row].item() if name in scalars else array[row].copy() for name, array in tensors.items()},
        )
        for row in range(len(actions))
    ]


def _http_refusal(response: Any) -> Refusal:
    refusal = _status_refusal(response.status_code, response.content)
    after_ms = response.headers.get("retry-after-ms")
    if after_ms is not None:
        refusal.retry_after_s = int(after_ms) / 1000
    return refusal


def _status_refusal(status: int, body: bytes) -> Refusal:
    """What an HTTP status says, with the server's message if it is one of ours."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body[:200].decode(errors="replace")
    by_status = {code.value.http: code for code in reversed(Code)}  # of two codes with one status, the first
    return Refusal(by_status.get(status, Code.INTERNAL), f"{text} (HTTP {status})")
