"""A server for tests: in this process, on a thread of its own, on free ports of 127.0.0.1; ends with its block."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from serve.policy_batcher import PolicySource
from serve.server import ServeConfig, Server

FAKE_POLICY = PolicySource(factory="tests.point_world:PointPolicy")
START_SECONDS = 600  # importing torch takes minutes where ten jobs share two cores
WEB = httpx.Client(verify=False, trust_env=False, timeout=30.0)  # plain HTTP: reading the authorities takes longer than a test


class FakeWorker:
    """A serve.worker_process.WorkerProcess without a process; `died.set_result("why")` ends it. Made in a running loop."""

    def __init__(self, **hello: Any) -> None:
        self.hello, self.died = hello, asyncio.get_running_loop().create_future()

    async def post(self, message: dict[str, Any]) -> None: ...

    async def close(self) -> None:
        if not self.died.done():
            self.died.set_result("closed")


@dataclass
class Running:
    """A server that is ready."""

    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def http(self) -> str:
        return f"{self.server.scheme}://127.0.0.1:{self.server.port}"

    @property
    def ws(self) -> str:
        return self.http.replace("http", "ws", 1)

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    @property
    def grpc(self) -> str:
        return f"{'grpcs' if self.server.config.security.has_tls else 'grpc'}://{self.grpc_address}"

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 60.0) -> Any:
        """The result of a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)


@contextmanager
def running(config: ServeConfig) -> Iterator[Running]:
    """Start on free ports, be ready, stop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    config = replace(config, host="127.0.0.1", port=0, grpc_port=0 if config.grpc_port is not None else None)

    async def build() -> Server:
        server = Server(config)
        await server.start()
        return server

    async def rest() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        server = asyncio.run_coroutine_threadsafe(build(), loop).result(START_SECONDS)
        try:
            yield Running(server, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(grace_s=5.0), loop).result(30)
    finally:
        asyncio.run_coroutine_threadsafe(rest(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
