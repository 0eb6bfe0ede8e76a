"""Nothing that a client sends or does leaves a process deaf, a task behind, or an answer that another question is given."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from starlette.websockets import WebSocketDisconnect, WebSocketState
from websockets.sync.server import serve

from serve import chat_api, grpc_wire
from serve.chat_process import ChatProcess, ChatSource
from serve.client import RemotePolicy
from serve.events import EventHub
from serve.gate import Gate
from serve.http_api import build_app
from serve.metrics import Metrics
from serve.protocol import msgpack_numpy, policy_pb2
from serve.protocol.frames import frame
from serve.protocol.limits import Limits
from serve.protocol.msgpack_numpy import pack
from serve.protocol.refusal import Refusal
from serve.protocol.requests import Description
from serve.security import Keys
from serve.server import ServeConfig, Server
from serve.services import Services
from serve.websocket_api import _Connection
from vla.interface import Observation, RobotSpec

SPEC = RobotSpec("reacher", ("base",), 8, ("x",), ("dx",), (), 20.0)
LIMITS = Limits()


def services(**parts: object) -> Services:
    metrics = Metrics()
    return Services(limits=LIMITS, metrics=metrics, gate=Gate(LIMITS, metrics), events=EventHub(), keys=Keys(), **parts)


READER = """
import socket, sys
from serve.worker_process import ServerLink
link = ServerLink(int(sys.argv[1]))
while True:
    link.next_message()
"""


def test_a_worker_that_cannot_read_a_message_ends_instead_of_going_deaf(tmp_path: Path) -> None:
    """Its keeper then starts another; a reader that is gone in a living process would leave every later request to time out."""
    ours, theirs = socket.socketpair()
    worker = subprocess.Popen([sys.executable, "-c", READER, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    theirs.close()
    ours.sendall(frame({"settings": 1}) + frame({"numbers": list(range(2**20 + 1))}))
    assert worker.wait(60) == 1 and b"exceeds max_array_len" in worker.stderr.read()
    ours.close()


def test_a_request_that_a_worker_could_not_read_is_refused_before() -> None:
    biases = {str(token): 0.0 for token in range(301)}
    body = {"model": "vlm", "messages": [{"role": "user", "content": "hi"}], "logit_bias": biases}
    with pytest.raises(Refusal, match="logit_bias"):
        chat_api.parse(json.dumps(body).encode(), LIMITS)


@pytest.fixture
def echo() -> Iterator[str]:
    """A server of openpi's messages whose action is the state it was sent."""

    def answer(connection) -> None:
        spec = vars(SPEC) | {name: list(getattr(SPEC, name)) for name in ("cameras", "state_names", "action_names", "binary_actions")}
        connection.send(pack({"spec": spec, "action_horizon": 1, "checkpoint": "c"}))
        for data in connection:
            seen = msgpack_numpy.unpack(data, max_bytes=1 << 24)["observation/state"]
            time.sleep(0.3 if seen[0] < 0 else 0.0)
            action = np.full((1, 1), seen[0], np.float32)
            connection.send(pack({"actions": action, "policy_timing": {"infer_ms": 0.0}, "checkpoint": "c"}))

    server = serve(answer, "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
    server.shutdown()


def seen(state: object) -> Observation:
    return Observation({"base": np.zeros((8, 8, 3), np.uint8)}, np.array([state], np.float32) if isinstance(state, int) else state, "go")


def test_after_an_interruption_an_answer_is_still_that_of_its_observation(echo: str) -> None:
    with RemotePolicy(echo) as policy:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                policy.act([seen(-1)])
        finally:
            signal.signal(signal.SIGALRM, before)
        with pytest.raises(TypeError):
            policy.act([seen(2), seen(object())])
        assert [policy.act([seen(state)])[0].actions.item() for state in (3, 4, 5)] == [3, 4, 5]


def test_a_page_that_goes_leaves_no_task(recwarn: pytest.WarningsRecorder) -> None:
    async def visit() -> tuple[int, int]:
        hub, closed = EventHub(), asyncio.Event()

        async def page() -> None:
            async for _ in hub.subscribe(closed):
                pass

        for _ in range(3):
            task = asyncio.create_task(page())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.01)
        return len(hub._readers), len(asyncio.all_tasks()) - 1

    assert asyncio.run(visit()) == (0, 0)


def test_a_client_that_vanishes_while_the_server_drains_holds_it_up_no_longer() -> None:
    class Gone:
        client_state = WebSocketState.DISCONNECTED

        def __init__(self) -> None:
            self.messages: asyncio.Queue[dict] = asyncio.Queue()

        async def receive(self) -> dict:
            return await self.messages.get()

        async def send_text(self, text: str) -> None:
            raise WebSocketDisconnect(1006)

    async def drain() -> bool:
        parts, client = services(), Gone()
        connection = _Connection(parts, client)

        async def answer(data: bytes) -> str:
            await asyncio.sleep(0.05)
            return "late"

        connection._answer = answer
        running = asyncio.create_task(connection.run())
        for _ in range(3):
            client.messages.put_nowait({"type": "websocket.receive", "bytes": b""})
        await asyncio.sleep(0.02)
        parts.gate.close()
        done, _ = await asyncio.wait({running}, timeout=10)
        running.cancel()
        return bool(done)

    assert asyncio.run(drain())


def test_counters_of_an_engine_that_is_swapped_out_are_counted_once() -> None:
    metrics = Metrics()
    chat = ChatProcess(ChatSource(path="x"), "", metrics)
    told = {"prompt": 0, "drafted": 0, "accepted": 0, "accepted_per_position": [], "image_cache_hits": 0, "image_cache_misses": 0}
    old, new = {}, {}
    for counted, total in ((old, 1000), (old, 1001), (new, 5), (old, 1002), (new, 6)):
        chat._take(counted, {"events": [], "stats": told | {"rounds": total, "completion": total}})
    assert metrics.tokens.labels("completion")._value.get() == 1002 + 6


def test_pictures_of_cameras_that_the_policy_has_not_are_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(grpc_wire, "decode_image", lambda data, **_: decoded.append(threading.current_thread()) or np.zeros((8, 8, 3), np.uint8))
    message = policy_pb2.ActRequest(state=[0.0], instruction="go")
    for camera in ("base", "other", "third"):
        message.images.add(camera=camera).encoded = b"a picture"
    request = asyncio.run(grpc_wire.parsed(Description(SPEC, 1, "c"), LIMITS, message, time.monotonic() + 10))
    assert list(request.observation.images) == ["base"]
    assert len(decoded) == 1 and decoded[0] is not threading.main_thread(), "nor is one on the event loop"


def test_more_images_than_the_model_takes_are_refused_before_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_api, "decode_data_url", lambda *_, **__: pytest.fail("decoded"))
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}] * 3
    asked = chat_api.parse(json.dumps({"model": "vlm", "messages": [{"role": "user", "content": parts}]}).encode(), LIMITS)
    with pytest.raises(Refusal, match="3 images; this model takes at most 2") as refused:
        chat_api.requests_of(asked, LIMITS, 2)
    assert refused.value.name == "too_many_images"


class Policy:
    ready, description = True, Description(SPEC, 1, "c")


class Worker:
    """A chat worker that only packs what it is sent."""

    hello = {"max_images": 2}

    def __init__(self) -> None:
        self.died = asyncio.get_running_loop().create_future()

    async def post(self, message: dict) -> None:
        frame(message)


CHAT = '{"model": "vlm", "messages": [{"role": "user", "content": "hi"}], "stop": %s}'
INFER = [
    {"name": "observation.images.base", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [0] * 192},
    {"name": "observation.state", "datatype": "FP32", "shape": [1, 1], "data": [0]},
    {"name": "task", "datatype": "BYTES", "shape": [1], "data": ["go"]},
]
BAD = [
    ("POST", "/v2/models/policy/infer", json.dumps({"inputs": INFER, "parameters": {"timeout_ms": 10**400}}), 400),
    ("POST", "/v1/chat/completions", CHAT % '["\\ud800"]', 400),
    ("POST", "/v1/chat/completions", CHAT % '"\\ud800"', 400),
    ("GET", f"/runs/{'a' * 300}/episodes", None, 404),
    ("GET", "/runs/r/films/a%00.mp4", None, 404),
    ("GET", f"/runs/r/films/{'a' * 300}.mp4", None, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD, ids=range(len(BAD)))
def test_a_bad_value_is_the_clients_fault_and_no_traceback(tmp_path: Path, method: str, path: str, body: str | None, status: int) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "episodes.jsonl").write_text("")

    async def ask() -> httpx.Response:
        chat = ChatProcess(ChatSource(path="x"), "", Metrics())
        chat._keeper.worker = Worker()
        app = build_app(services(policy=Policy(), chat=chat, runs=tmp_path))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, content=body)

    assert asyncio.run(ask()).status_code == status


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoders": {"tower": {"path": "RUN"}}}, "encoders.tower .*under its `arguments`. has no setting 'path'; it has factory, arguments"),
        ({"port": 70000}, "port is 70000; allowed: 0"),
        ({"grpc_port": -1}, "grpc_port is -1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Server(ServeConfig(vlm=ChatSource(path="x"), **changes))
