"""gRPC: the Open Inference Protocol, the typed PolicyService, grpc.health.v1 and reflection, on one port."""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve import grpc_wire
from serve.grpc_session import Session
from serve.oip_models import find_model
from serve.protocol import oip, open_inference_pb2_grpc, policy_pb2, policy_pb2_grpc
from serve.protocol import open_inference_pb2 as oip_pb2
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.security import Keys
from serve.services import Services

T = TypeVar("T")
OIP_SERVICE = "inference.GRPCInferenceService"
POLICY_SERVICE = "remask.policy.v1.PolicyService"
SERVICES = (OIP_SERVICE, POLICY_SERVICE, "grpc.health.v1.Health")
OPEN_METHOD = "/grpc.health.v1.Health/Check"  # probes have no key
WATCH_S = 0.1  # between looks at whether the models are ready
logger = logging.getLogger(__name__)


class GrpcServer:
    """One listening port; `start`, then `stop` with a grace."""

    def __init__(self, services: Services, address: str, credentials: grpc.ServerCredentials | None) -> None:
        self._server = grpc.aio.server(
            interceptors=[_Doorkeeper(services.keys)],
            options=_options(services.limits),
            maximum_concurrent_rpcs=services.limits.concurrency + services.limits.streams,
        )
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(services), self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(services), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(Health(services), self._server)
        reflection.enable_server_reflection((*SERVICES, reflection.SERVICE_NAME), self._server)
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"Cannot listen for gRPC on {address}: {error}. Is another server there?") from error

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let the running ones end within the grace."""
        await self._server.stop(grace_s)


class InferenceService(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Open Inference Protocol v2 (serve/protocol/oip.py says which tensors mean what)."""

    def __init__(self, services: Services) -> None:
        self.services = services

    async def ServerLive(self, request: Any, context: grpc.aio.ServicerContext) -> oip_pb2.ServerLiveResponse:
        return oip_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: grpc.aio.ServicerContext) -> oip_pb2.ServerReadyResponse:
        return oip_pb2.ServerReadyResponse(ready=not self.services.not_ready)

    async def ServerMetadata(self, request: Any, context: grpc.aio.ServicerContext) -> oip_pb2.ServerMetadataResponse:
        return oip_pb2.ServerMetadataResponse(name=oip.SERVER_NAME, version=self.services.version, extensions=oip.EXTENSIONS)

    async def ModelReady(
        self, request: oip_pb2.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> oip_pb2.ModelReadyResponse:
        async def answer() -> oip_pb2.ModelReadyResponse:
            return oip_pb2.ModelReadyResponse(ready=find_model(self.services, request.name, request.version).ready)

        return await _answer(self.services, context, "ModelReady", answer)

    async def ModelMetadata(
        self, request: oip_pb2.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> oip_pb2.ModelMetadataResponse:
        async def answer() -> oip_pb2.ModelMetadataResponse:
            return grpc_wire.model_metadata(find_model(self.services, request.name, request.version))

        return await _answer(self.services, context, "ModelMetadata", answer)

    async def ModelInfer(
        self, request: oip_pb2.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> oip_pb2.ModelInferResponse:
        async def answer() -> oip_pb2.ModelInferResponse:
            model = find_model(self.services, request.model_name, request.model_version)
            inputs = grpc_wire.infer_inputs(request)
            parameters = grpc_wire.parameters_of(request.parameters)
            remaining_s = context.time_remaining()
            if remaining_s is not None:
                parameters.setdefault("timeout_ms", 1000 * max(remaining_s, 1e-3))
            tensors, checkpoint = await model.infer(inputs, parameters, [output.name for output in request.outputs])
            return grpc_wire.infer_response(request, tensors, checkpoint)

        return await _answer(self.services, context, "ModelInfer", answer)


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """The typed service (serve/protocol/policy.proto)."""

    def __init__(self, services: Services) -> None:
        self.services = services

    async def Describe(self, request: Any, context: grpc.aio.ServicerContext) -> policy_pb2.DescribeResponse:
        async def answer() -> policy_pb2.DescribeResponse:
            return grpc_wire.describe_response(self.services.need_description())

        return await _answer(self.services, context, "Describe", answer)

    async def Act(self, request: policy_pb2.ActRequest, context: grpc.aio.ServicerContext) -> policy_pb2.ActResponse:
        async def answer() -> policy_pb2.ActResponse:
            limits = self.services.limits
            parsed = await grpc_wire.parsed(self.services.need_description(), limits, request, deadline_of(context, limits))
            (chunk,) = await self.services.act([parsed])
            return grpc_wire.act_response(chunk)

        return await _answer(self.services, context, "Act", answer)

    async def Session(
        self, requests: AsyncIterator[policy_pb2.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[policy_pb2.SessionResponse]:
        try:
            with self.services.gate.stream("session"):
                async for response in Session(self.services).run(requests):
                    yield response
        except Refusal as refusal:
            await _abort(context, refusal)


class Health(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, for the server ("") and for each service. `Watch` is a stream like any other: with a key, counted."""

    def __init__(self, services: Services) -> None:
        self.services = services

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        answer = self._answer(request.service)
        if answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return answer

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Each change, until the client leaves or the server drains."""
        gate, last = self.services.gate, None
        try:
            with gate.stream("health"):
                while True:
                    answer = self._answer(request.service)
                    if answer != last:
                        yield answer
                    last = answer
                    if gate.draining:
                        return
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(gate.closed.wait(), WATCH_S)
        except Refusal as refusal:
            await _abort(context, refusal)

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in ("", OIP_SERVICE, POLICY_SERVICE):
            return health_pb2.HealthCheckResponse(status="SERVICE_UNKNOWN")
        return health_pb2.HealthCheckResponse(status="NOT_SERVING" if self.services.not_ready else "SERVING")


def deadline_of(context: grpc.aio.ServicerContext, limits: Limits) -> float:
    """The call's deadline on time.monotonic()'s clock; the server's default if it has none, never beyond its maximum."""
    remaining_s = context.time_remaining()
    seconds = limits.timeout_s if remaining_s is None else min(remaining_s, limits.max_timeout_s)
    return time.monotonic() + seconds


async def _answer(
    services: Services, context: grpc.aio.ServicerContext, method: str, answer: Callable[[], Awaitable[T]]
) -> T:
    """Admit, run, and turn a refusal into its status; gRPC cancels this when the client does."""
    try:
        with services.gate.request("grpc", method):
            return await answer()
    except Refusal as refusal:
        await _abort(context, refusal)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:  # the border of the process: the client gets a name, the log gets the rest
        logger.error("gRPC %s failed:\n%s", method, traceback.format_exc())
        await _abort(context, Refusal(Code.INTERNAL, "The server failed at this call; its log says where."))
    raise AssertionError("abort() does not return")


async def _abort(context: grpc.aio.ServicerContext, refusal: Refusal) -> None:
    await context.abort(grpc_wire.status_of(refusal), refusal.message, grpc_wire.trailers_of(refusal))


class _Doorkeeper(grpc.aio.ServerInterceptor):
    """Turns calls without a key away before their message is read, and calls whose message is none.

    Probes (OPEN_METHOD) need no key. gRPC itself answers bytes that are no message with UNKNOWN and a log entry.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        refusal = Refusal(Code.UNAUTHENTICATED, "This server needs a key: send the metadata authorization: Bearer KEY.")

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            await _abort(context, refusal)

        async def refuse_stream(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await _abort(context, refusal)
            yield

        self._unary, self._stream = refuse, refuse_stream

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        given = dict(details.invocation_metadata or ()).get("authorization")
        if self._keys.accept(given) or details.method == OPEN_METHOD:
            return _forgiving(await continuation(details))
        handler = await continuation(details)
        if handler is None or not (handler.request_streaming or handler.response_streaming):
            return grpc.unary_unary_rpc_method_handler(self._unary)
        if not handler.request_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.stream_stream_rpc_method_handler(self._stream)


@dataclass(frozen=True)
class _Malformed:
    """Bytes that are no message of the method."""

    reason: str


def _forgiving(handler: grpc.RpcMethodHandler | None) -> grpc.RpcMethodHandler | None:
    """The same method, answering INVALID_ARGUMENT to malformed messages; in a stream they count as empty ones."""
    if handler is None or handler.request_deserializer is None:
        return handler
    deserialize = handler.request_deserializer
    if handler.request_streaming:

        def or_empty(data: bytes) -> Any:
            try:
                return deserialize(data)
            except DecodeError:
                return deserialize(b"")

        return handler._replace(request_deserializer=or_empty)
    if handler.response_streaming:
        return handler
    behaviour = handler.unary_unary

    def or_malformed(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(str(error))

    async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, _Malformed):
            await _abort(context, Refusal.invalid(request.reason))
        return await behaviour(request, context)

    return handler._replace(request_deserializer=or_malformed, unary_unary=checked)


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.body_bytes),
        ("grpc.max_send_message_length", limits.body_bytes),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", limits.concurrency),
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls silently
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]
