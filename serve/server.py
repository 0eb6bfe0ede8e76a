"""`vla serve`: one process, HTTP with WebSocket on one port and gRPC on another, models in worker processes.

    vla serve --policy.path=RUN/checkpoints/last/policy
    vla serve --policy.path=... --vlm.path=VLM --draft.path=DRAFT --runs=~/.cache/remask/evaluations

SIGTERM or Ctrl-C: not ready, no new connections, what is in flight is finished within the grace, exit 0. SIGHUP: the
checkpoint is read again and swapped in without dropping a request.
"""

import asyncio
import importlib.metadata
import logging
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.chat_process import ChatProcess, ChatSource
from serve.events import EventHub
from serve.gate import Gate
from serve.grpc_api import GrpcServer
from serve.http_api import build_app
from serve.http_server import HttpServer
from serve.metrics import Metrics
from serve.policy_batcher import BatchConfig, PolicyBatcher, PolicySource
from serve.policy_worker import CHECKPOINT_FACTORY
from serve.protocol import oip
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.security import Keys, SecurityConfig, check_binding, grpc_credentials, is_loopback, tls_context
from serve.services import Services
from serve.tensor_model import EncoderSource
from serve.tensor_process import TensorProcess

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
logger = logging.getLogger("remask")


@dataclass(frozen=True)
class DraftSource:
    """What drafts for the language model."""

    path: str = ""  # checkpoint folder of a draft model; none: n-grams draft


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `vla serve`."""

    policy: PolicySource = field(default_factory=PolicySource)
    vlm: ChatSource = field(default_factory=ChatSource)
    draft: DraftSource = field(default_factory=DraftSource)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, see serve/tensor_model.py
    batching: BatchConfig = field(default_factory=BatchConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"  # another address needs a key or TLS
    port: int = 8000  # HTTP and WebSocket; 0: any free one
    grpc_port: int | None = 8001  # 0: any free one; null: no gRPC
    grace_s: float = 30.0  # after SIGTERM, for what is in flight
    runs: Path | None = None  # folder of evaluation folders that the page replays

    @property
    def has_policy(self) -> bool:
        return bool(self.policy.path) or self.policy.factory != CHECKPOINT_FACTORY


class Server:
    """All of it. `start`, then `stop`; `run` does both, with signals between them."""

    def __init__(self, config: ServeConfig) -> None:
        if not config.has_policy and not config.vlm.is_given and not config.encoders:
            raise ValueError("Nothing to serve. Give --policy.path=RUN/checkpoints/last/policy, or --vlm.path=FOLDER, or both.")
        if oip.MODEL_NAME in config.encoders:
            raise ValueError(f"An encoder cannot be called {oip.MODEL_NAME!r}; that is the policy's name.")
        for setting, port in (("port", config.port), ("grpc_port", config.grpc_port or 0)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{setting} is {port}; allowed: 0 (any free one) to 65535.")
        self.config = config
        keys = Keys.load(config.security)
        check_binding(config.host, config.security, keys)
        self.metrics = Metrics()
        self.gate = Gate(config.limits, self.metrics)
        self.batcher = PolicyBatcher(config.policy, config.batching, self.metrics) if config.has_policy else None
        self.encoders = {
            name: TensorProcess(name, EncoderSource.of(name, source), self.metrics) for name, source in config.encoders.items()
        }
        self.chat = ChatProcess(config.vlm, config.draft.path, self.metrics) if config.vlm.is_given else None
        # Whoever cannot know the key cannot use it under another name either; without one, only this machine's names.
        open_names = None if keys or not is_loopback(config.host) else LOOPBACK_NAMES | set(config.security.hosts)
        self.services = Services(
            limits=config.limits,
            metrics=self.metrics,
            gate=self.gate,
            events=EventHub(),
            keys=keys,
            policy=self.batcher,
            chat=self.chat,
            encoders=self.encoders,
            runs=None if config.runs is None else Path(config.runs).expanduser(),
            swap=self._swap,
            hosts=None if open_names is None else frozenset(open_names),
            version=_version(),
        )
        self._http: HttpServer | None = None
        self._grpc: GrpcServer | None = None
        self._swaps: set[asyncio.Task[None]] = set()
        self._swapping = asyncio.Lock()
        self.port = self.grpc_port = 0

    @property
    def _backends(self) -> list[PolicyBatcher | ChatProcess | TensorProcess]:
        return [backend for backend in (self.batcher, self.chat, *self.encoders.values()) if backend is not None]

    @property
    def scheme(self) -> str:
        return "https" if self.config.security.has_tls else "http"

    async def start(self) -> None:
        """Listen (live, not ready), load and warm the models, then be ready.

        Raises ValueError or OSError saying why it cannot; nothing is left running.
        """
        config = self.config
        try:
            http = HttpServer(build_app(self.services), config.host, config.port, config.limits, tls_context(config.security))
            self.port = await http.start()
            self._http = http
            if config.grpc_port is not None:
                host = f"[{config.host}]" if ":" in config.host else config.host
                self._grpc = GrpcServer(self.services, f"{host}:{config.grpc_port}", grpc_credentials(config.security))
                await self._grpc.start()
                self.grpc_port = self._grpc.port
            started = await asyncio.gather(*(backend.start() for backend in self._backends), return_exceptions=True)
            for failure in started:
                if failure is not None:
                    raise failure
        except BaseException:
            await self.stop(grace_s=0.0)
            raise

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain: refuse what is new, finish what is in flight within the grace, then close."""
        grace_s = self.config.grace_s if grace_s is None else grace_s
        until = time.monotonic() + grace_s
        self.gate.close()
        if self._http is not None:
            self._http.stop_accepting()
        if not await self.gate.drained(grace_s):
            logger.warning("%d requests are cut: they took longer than the grace of %.0f s", self.gate.in_flight, grace_s)
        left = max(0.0, until - time.monotonic())
        closing = [self._http.stop(left)] if self._http is not None else []
        closing += [self._grpc.stop(left)] if self._grpc is not None else []
        await asyncio.gather(*closing)
        for backend in self._backends:
            await backend.close()

    async def run(self) -> None:
        """Until a signal ends it."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        loop.add_signal_handler(signal.SIGHUP, self._swap_soon)
        began = time.monotonic()
        starting = asyncio.ensure_future(self.start())
        ending = asyncio.ensure_future(ended.wait())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        starting.result()
        print(self.greeting(time.monotonic() - began), flush=True)
        await ended.wait()
        print(f"draining: {self.gate.in_flight} requests in flight, at most {self.config.grace_s:.0f} s", flush=True)
        await self.stop()
        print("stopped", flush=True)

    def greeting(self, seconds: float) -> str:
        """What is printed when it is ready."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        lines = [f"ready after {seconds:.1f} s"]
        if self.batcher is not None:
            description = self.batcher.description
            shape = f"chunks of {description.action_horizon} x {description.spec.action_dim}"
            lines.append(f"  policy {description.checkpoint} for {description.spec.name}, {shape}")
        lines += [f"  encoder {name!r}, {encoder.signature.checkpoint}" for name, encoder in self.encoders.items()]
        if self.chat is not None:
            lines.append(f"  language model {self.chat.name!r}, {self.chat.checkpoint}")
        lines.append(f"  HTTP: page, Open Inference Protocol, OpenAI   {self.scheme}://{host}:{self.port}")
        if self.batcher is not None:
            lines.append(
                f"  WebSocket: openpi                             {self.scheme.replace('http', 'ws')}://{host}:{self.port}"
            )
        if self._grpc is not None:
            scheme = "grpcs" if self.config.security.has_tls else "grpc"
            lines.append(f"  gRPC: PolicyService, Open Inference Protocol  {scheme}://{host}:{self.grpc_port}")
        return "\n".join(lines)

    async def _swap(self) -> tuple[str, str]:
        """Every model's checkpoint is read again; the hashes before and after, joined where there are two models.

        Raises Refusal, with every old model in service, if a model is not ready or one cannot be loaded.
        """
        async with self._swapping, AsyncExitStack() as unused:
            if self.services.not_ready:
                raise Refusal(Code.UNAVAILABLE, f"No checkpoint was swapped: {self.services.not_ready}.")
            loaded = []
            for backend in self._backends:
                loaded.append(await backend.load())
                unused.push_async_callback(loaded[-1].close)
            unused.pop_all()  # all are loaded: from here on they are used
            swaps = (backend.swap(new) for backend, new in zip(self._backends, loaded, strict=True))
            previous, new = zip(*await asyncio.gather(*swaps), strict=True)
        return "+".join(previous), "+".join(new)

    def _swap_soon(self) -> None:
        async def swap() -> None:
            try:
                previous, checkpoint = await self.services.swap()
                print(f"swapped {previous} for {checkpoint}", flush=True)
            except Refusal as refusal:
                logger.error("%s", refusal.message)

        task = asyncio.ensure_future(swap())
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)


def _version() -> str:
    try:
        return importlib.metadata.version("remask")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(argv: list[str]) -> None:
    """`vla serve`."""
    from vla.cli import parse_config

    config: Any = parse_config(ServeConfig, argv, verb="serve")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every client that speaks no HTTP
    server = Server(config)
    asyncio.run(server.run())
