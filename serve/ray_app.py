"""The same policy and language model as Ray Serve deployments, scaled by their load:

    serve run serve.ray_app:build policy_path=RUN/checkpoints/last/policy vlm_path=VLM draft_path=DRAFT

The HTTP interface (Open Inference Protocol, OpenAI, openpi's WebSocket, the page) is the one of `vla serve`; models live in
replicas of their own, batched per replica. Requests are stateless, so any replica answers any of them. The key is read from
the replicas' environment (REMASK_API_KEY). Needs the extra `ray`; docs/serving.md has a configuration file.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from serve.chat import ChatEnd, ChatPiece, ChatRequest
from serve.chat_process import ChatSource, chat_event, chat_message, chat_refusal
from serve.events import EventHub
from serve.gate import Gate
from serve.http_api import build_app
from serve.metrics import Metrics
from serve.policy_batcher import PolicySource
from serve.policy_worker import answer, load_policy_of, pack_request, unpack_request
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest, Description
from serve.security import Keys, SecurityConfig
from serve.services import Services
from vla.interface import ActionChunk

POLICY, CHAT = "Policy", "Chat"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """Arguments of `build`, as `serve run` gives them: text is converted."""

    policy_path: str = ""
    vlm_path: str = ""
    draft_path: str = ""
    device: str = "cpu"
    num_cpus: float = 1.0  # of a model's replica
    num_gpus: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 4
    target_ongoing_requests: float = 8.0  # per replica; more of them, more replicas
    max_batch: int = 16
    max_wait_ms: float = 5.0
    max_queued_requests: int = 128  # beyond what the replicas take; more are refused as overload
    policy_factory: str = ""  # module:function, instead of policy_path
    vlm_factory: str = ""

    @classmethod
    def parse(cls, arguments: dict[str, Any]) -> "RayConfig":
        """Raises ValueError naming an argument that does not exist or is no number."""
        fields = cls.__dataclass_fields__
        unknown = sorted(set(arguments) - set(fields))
        if unknown:
            raise ValueError(f"serve.ray_app has no argument {unknown[0]!r}; it has {', '.join(fields)}.")
        return cls(**{name: fields[name].type(value) for name, value in arguments.items()})


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application of `serve run serve.ray_app:build name=value ...`. Raises ValueError where there is nothing to serve."""
    config = RayConfig.parse(arguments)
    resources = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
    autoscaling = {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
    }
    options = {
        "ray_actor_options": resources,
        "autoscaling_config": autoscaling,
        "max_queued_requests": config.max_queued_requests,
        "graceful_shutdown_timeout_s": 30,
    }
    models = {}
    if config.policy_path or config.policy_factory:
        ongoing = {"max_ongoing_requests": 4 * config.max_batch}
        models["policy"] = serve.deployment(PolicyReplica, name=POLICY, **options, **ongoing).bind(config)
    if config.vlm_path or config.vlm_factory:
        models["chat"] = serve.deployment(ChatReplica, name=CHAT, **options, max_ongoing_requests=32).bind(config)
    if not models:
        raise ValueError("Nothing to serve. Give policy_path=RUN/checkpoints/last/policy, or vlm_path=FOLDER, or both.")
    ingress = serve.ingress(late_app)(Ingress)
    return serve.deployment(
        ingress, name="Ingress", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=256
    ).bind(**models)


# ------------------------------------------------------------------------------------------------------------- replicas


class PolicyReplica:
    """One policy in one process; concurrent requests become batches."""

    def __init__(self, config: RayConfig) -> None:
        source = PolicySource(path=config.policy_path, device=config.device, threads=max(1, int(config.num_cpus)))
        if config.policy_factory:
            source = PolicySource(factory=config.policy_factory)
        self._policy = load_policy_of(source.settings(config.max_batch))
        self.act.set_max_batch_size(config.max_batch)
        self.act.set_batch_wait_timeout_s(config.max_wait_ms / 1000)

    async def describe(self) -> dict[str, Any]:
        checkpoint = getattr(self._policy, "content_hash", "") or "unknown"
        return Description(self._policy.spec, self._policy.action_horizon, checkpoint).to_dict()

    @serve.batch
    async def act(self, requests: list[tuple[bytes, float]]) -> list[dict[str, Any]]:
        """Rows as serve/policy_worker.py makes them; what is late (by the wall clock) is dropped before compute."""
        now = time.time()
        questions = {index: unpack_request(data) for index, (data, deadline) in enumerate(requests) if deadline > now}
        computed = await asyncio.to_thread(answer, self._policy, list(questions.values())) if questions else []
        rows: list[dict[str, Any]] = [{"late": True}] * len(requests)
        for index, row in zip(questions, computed, strict=True):
            rows[index] = row
        return rows


class ChatReplica:
    """One engine in one process, driven by a thread; requests share its batches."""

    def __init__(self, config: RayConfig) -> None:
        from serve.chat_worker import ChatLoop, build, warm_up

        source = ChatSource(
            path=config.vlm_path, device=config.device, threads=max(1, int(config.num_cpus)), factory=config.vlm_factory
        )
        engine = build(source.settings(config.draft_path))
        warm_up(engine)
        self._checkpoint = engine.target.name or "unknown"
        self._loop = asyncio.get_running_loop()
        self._rows: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._number = 0
        self._link = _ThreadLink(self._deliver)
        self._thread = _start_thread(ChatLoop(engine, self._link).run)

    async def describe(self) -> str:
        return self._checkpoint

    async def stream(self, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Events as serve/chat_worker.py sends them, until the last one; closing it ends the generation."""
        number, self._number = self._number, self._number + 1
        rows = self._rows[number] = asyncio.Queue()
        self._link.put(message | {"ask": number})
        ended = False
        try:
            while not ended:
                row = await rows.get()
                ended = "reason" in row or "refused" in row or "overloaded" in row
                yield row
        finally:
            del self._rows[number]
            if not ended:
                self._link.put({"cancel": number})

    def _deliver(self, message: dict[str, Any]) -> None:
        """From the engine's thread into the replica's loop."""

        def hand_over() -> None:
            for row in message["events"]:
                if row["number"] in self._rows:
                    self._rows[row["number"]].put_nowait(row)

        self._loop.call_soon_threadsafe(hand_over)


class _ThreadLink:
    """What ChatLoop needs of a worker's link, between threads of one process."""

    def __init__(self, deliver: Any) -> None:
        import queue

        self._messages: Any = queue.SimpleQueue()
        self._empty = queue.Empty
        self.send, self.put = deliver, self._messages.put

    def next_message(self, *, wait: bool = True) -> dict[str, Any] | None:
        try:
            return self._messages.get(block=wait)
        except self._empty:
            return None


def _start_thread(run: Any) -> Any:
    import threading

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


# -------------------------------------------------------------------------------------------------------------- ingress


class RayPolicy:
    """A `PolicyBackend` behind a deployment handle."""

    def __init__(self, handle: Any, description: Description) -> None:
        self._handle, self.description, self.ready = handle, description, True

    async def act(self, requests: Sequence[ActRequest]) -> list[ActionChunk]:
        deadline = min(request.deadline for request in requests)
        until = time.time() + deadline - time.monotonic()  # the replica may be on another machine
        calls = [self._handle.act.remote((pack_request(request), until)) for request in requests]
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                rows = await asyncio.gather(*calls)
        except TimeoutError:
            raise Refusal(Code.DEADLINE, "No chunk within the deadline; give more time or send less.") from None
        except BackPressureError as error:
            raise Refusal(Code.OVERLOADED, "The policy's replicas and their queue are full.", retry_after_s=0.5) from error
        except (RayError, RayServeException) as error:
            logger.error("policy replica: %s", error)
            raise Refusal(
                Code.UNAVAILABLE, f"The policy's replica failed ({type(error).__name__}); another is being started."
            ) from error
        return [self._chunk(row) for row in rows]

    def _chunk(self, row: dict[str, Any]) -> ActionChunk:
        if "late" in row:
            raise Refusal(Code.DEADLINE, "The deadline passed before the observation was computed.")
        if "refused" in row:
            raise Refusal.invalid(row["refused"])
        return ActionChunk(row["actions"], row["info"] | {"checkpoint": self.description.checkpoint})


class RayChat:
    """A `ChatBackend` behind a deployment handle."""

    def __init__(self, handle: Any, checkpoint: str) -> None:
        self._handle, self.checkpoint, self.name, self.ready = handle.options(stream=True), checkpoint, ChatSource().name, True
        self.max_images = None

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatPiece | ChatEnd]:
        try:
            async for row in self._handle.stream.remote(chat_message(request)):
                refusal = chat_refusal(row)
                if refusal is not None:
                    raise refusal
                yield chat_event(row)
        except (RayError, RayServeException) as error:
            logger.error("chat replica: %s", error)
            raise Refusal(Code.UNAVAILABLE, f"The language model's replica failed ({type(error).__name__}).") from error


class Ingress:
    """The deployment that holds the HTTP application; being bound to the models makes Ray deploy them with it."""

    def __init__(self, policy: Any = None, chat: Any = None) -> None:
        LateApp.handles = {"policy": policy, "chat": chat}


def late_app() -> "LateApp":
    """What Ray calls in each replica of the ingress."""
    return LateApp()


class LateApp:
    """The ASGI application of a replica, built at its first request: its parts cannot travel between processes."""

    handles: dict[str, Any] = {}

    def __init__(self) -> None:
        self._app: Any = None
        self._building = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        async with self._building:
            if self._app is None:
                self._app = build_app(await self._services())
        await self._app(scope, receive, send)

    async def _services(self) -> Services:
        limits, metrics = Limits(), Metrics()
        services = Services(
            limits=limits, metrics=metrics, gate=Gate(limits, metrics), events=EventHub(), keys=Keys.load(
                SecurityConfig()
            ), version="ray"
        )
        if self.handles["policy"] is not None:
            described = await self.handles["policy"].describe.remote()
            services.policy = RayPolicy(self.handles["policy"], Description.from_dict(described))
        if self.handles["chat"] is not None:
            services.chat = RayChat(self.handles["chat"], await self.handles["chat"].describe.remote())
        return services
