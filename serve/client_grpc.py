"""The gRPC wire of serve/client.py.

It speaks the typed PolicyService, so no `inference` package is imported here and a program may bring its own (tritonclient,
kserve): two packages of that name cannot share a process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np

from serve.client_wires import MAX_ANSWER_BYTES, Question, TlsFiles
from serve.protocol import policy_pb2, policy_pb2_grpc
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import Description
from vla.interface import ActionChunk, RobotSpec


class GrpcWire:
    """One call per observation, all at once; the server makes a batch of them."""

    def __init__(self, url: str, key: str | None, tls: TlsFiles) -> None:
        options = [
            ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
            ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.enable_http_proxy", 0),
        ]
        parts = urlsplit(url)
        if parts.scheme == "grpcs":
            read = [None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.key, tls.certificate)]
            self._channel = grpc.secure_channel(parts.netloc, grpc.ssl_channel_credentials(*read), options)
        else:
            self._channel = grpc.insecure_channel(parts.netloc, options)
        self._stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def describe(self, timeout_s: float) -> Description:
        try:
            answer = self._stub.Describe(
                policy_pb2.DescribeRequest(), timeout=timeout_s, metadata=self._metadata, wait_for_ready=True
            )
        except grpc.RpcError as error:
            refusal = self._refusal(error)
            if refusal.code is Code.DEADLINE:  # nobody answers at that address
                refusal = Refusal(Code.UNAVAILABLE, "the connection failed", retry_after_s=0.0)
            raise refusal from error
        spec = RobotSpec(
            name=answer.robot,
            cameras=tuple(answer.cameras),
            image_size=answer.image_size,
            state_names=tuple(answer.state_names),
            action_names=tuple(answer.action_names),
            binary_actions=tuple(answer.binary_actions),
            control_hz=answer.control_hz,
        )
        return Description(spec, answer.action_horizon, answer.checkpoint)

    def act(self, questions: Sequence[Question], timeout_s: float) -> list[ActionChunk]:
        calls = [
            self._stub.Act.future(self._request(question), timeout=timeout_s, metadata=self._metadata) for question in questions
        ]
        try:
            return [self._chunk(call.result()) for call in calls]
        except grpc.RpcError as error:
            raise self._refusal(error) from error
        finally:
            for call in calls:
                call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _request(self, question: Question) -> Any:
        request = policy_pb2.ActRequest(
            state=np.asarray(question.observation.state, np.float32).tolist(),
            instruction=question.observation.instruction,
            seed=question.seed,
        )
        for camera, image in question.observation.images.items():
            raw = request.images.add(camera=camera).raw
            raw.height, raw.width, raw.data = image.shape[0], image.shape[1], np.ascontiguousarray(image).tobytes()
        if question.tail is not None:
            tail = np.asarray(question.tail, np.float32)
            request.tail.steps, request.tail.dims = tail.shape
            request.tail.values.extend(tail.ravel().tolist())
        if question.delay is not None:
            request.delay = question.delay
        return request

    def _chunk(self, answer: Any) -> ActionChunk:
        shape = (answer.actions.steps, answer.actions.dims)
        info: dict[str, Any] = {"milliseconds": answer.milliseconds, "checkpoint": answer.checkpoint}
        if answer.rounds:
            info["rounds"] = answer.rounds
        if answer.confidence:
            info["confidence"] = np.array(answer.confidence, dtype=np.float32).reshape(shape)
        if answer.committed:
            info["committed"] = np.array(answer.committed, dtype=np.int32).reshape(shape)
        return ActionChunk(np.array(answer.actions.values, dtype=np.float32).reshape(shape), info)

    def _refusal(self, error: Any) -> Refusal:
        status, text = error.code().name, error.details() or ""
        pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        if pushback is not None:
            code = Code.OVERLOADED if status == "RESOURCE_EXHAUSTED" else Code.UNAVAILABLE
            return Refusal(code, text, retry_after_s=int(pushback) / 1000)
        if status == "RESOURCE_EXHAUSTED":
            return Refusal(Code.TOO_LARGE, text)
        if status == "UNAVAILABLE":
            return Refusal(Code.UNAVAILABLE, f"the connection failed ({text})", retry_after_s=0.0)
        first = [code for code in Code if code.value.grpc == status and code is not Code.SLOW_BODY]
        return Refusal(first[0] if first else Code.INTERNAL, text)
