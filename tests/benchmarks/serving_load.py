"""A server in a process of its own and closed-loop clients for it: what the serving benchmarks share."""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import httpx
import numpy as np
import torch

from multimodal.config import get_preset
from multimodal.tokenizer import train_tokenizer
from serve.protocol import policy_pb2
from sim.suites import get_suite, robot_spec
from vla.action_tokenizer import ActionTokenizer
from vla.interface import Observation, RobotSpec
from vla.model import VLA, VLAConfig
from vla.normalization import Statistics
from vla.policy import PolicyAssets

ROOT = Path(__file__).resolve().parents[2]
ACT = "/remask.policy.v1.PolicyService/Act"
START_SECONDS = 300


def untrained_policy(folder: Path, preset: str = "desk", *, suite: str = "robosuite_lift") -> Path:
    """A checkpoint of the preset's size for the suite's robot; its answers cost what a trained one's do at full rounds."""
    spec = robot_spec(get_suite(suite), get_suite(suite).image_size)
    generator = np.random.default_rng(0)
    actions = Statistics.of(generator.uniform(-1, 1, (500, spec.action_dim)))
    tokenizer = ActionTokenizer.from_statistics(actions, binary=spec.binary_actions)
    text = train_tokenizer(["lift the red cube and put it into the basket"])
    model = VLAConfig(
        vlm=replace(get_preset(preset), vocab_size=text.vocab_size, num_cameras=len(spec.cameras)),
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        num_action_ids=tokenizer.vocab_size,
    )
    torch.manual_seed(0)
    crop = {"desk": 112, "desk-s": 84, "debug": 32}[preset]
    states = Statistics.of(generator.uniform(-1, 1, (500, spec.state_dim)))
    assets = PolicyAssets(model, spec, states, tokenizer, text)
    replace(assets, images=replace(assets.images, crop=crop)).save(folder, VLA(model).state_dict())
    return folder


def observations(spec: RobotSpec, count: int) -> list[Observation]:
    generator = np.random.default_rng(1)
    size = spec.image_size
    return [
        Observation(
            {camera: generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in spec.cameras},
            generator.uniform(-1, 1, spec.state_dim).astype(np.float32),
            "lift the red cube",
        )
        for _ in range(count)
    ]


class ServerProcess:
    """`vla serve ARGUMENTS` on free ports of 127.0.0.1, ready; use as a context manager."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments

    def __enter__(self) -> "ServerProcess":
        command = [sys.executable, "-m", "vla.cli", "serve", "--port=0", "--grpc_port=0", *self._arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        threading.Thread(target=lambda: self._lines.extend(iter(self.process.stdout.readline, "")), daemon=True).start()
        self.grpc_address = self._wait_for("grpc://").partition("://")[2]
        self.http = self._wait_for("http://")
        self.ws = self.http.replace("http", "ws", 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.exit_code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.exit_code = self.process.wait()

    @property
    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[-1])

    def resident_mb(self) -> float:
        """Of the server and its workers, MB."""
        pids = [
            self.process.pid, *map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
        ]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metric(self, name: str) -> float:
        """A sample of /metrics, summed over labels not named."""
        text = httpx.get(f"{self.http}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def batch_histogram(self) -> dict[str, float]:
        """Batches computed so far by size, cumulative: upper bound -> count."""
        text = httpx.get(f"{self.http}/metrics", trust_env=False).text
        found = re.findall(r'remask_policy_batch_size_bucket\{le="([^"]+)"\} (\S+)', text)
        return {bound: float(count) for bound, count in found}

    def ready(self) -> bool:
        return httpx.get(f"{self.http}/readyz", trust_env=False).status_code == 200

    def _wait_for(self, text: str) -> str:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            for line in list(self._lines):
                for word in line.split():
                    if word.startswith(text):
                        return word
            if self.process.poll() is not None:
                raise ChildProcessError(f"vla serve ended with exit code {self.process.returncode}; see above.")
            time.sleep(0.05)
        raise TimeoutError(f"vla serve did not become ready within {START_SECONDS} s")


def histogram_between(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    """Batches by size (the bucket's upper bound), of what was computed between two readings."""
    counts, below = {}, 0.0
    for bound, total in after.items():
        grown = total - before.get(bound, 0.0)
        if grown > below:
            counts[bound] = round(grown - below)
        below = grown
    return counts


@dataclass
class Outcome:
    """What clients saw."""

    latencies_ms: list[float] = field(default_factory=list)  # of answered requests
    refused_ms: list[float] = field(default_factory=list)  # of those refused as overload
    errors: dict[str, int] = field(default_factory=dict)  # everything else, by status
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return len(self.latencies_ms) / self.seconds

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies_ms, share)) if self.latencies_ms else float("nan")


def grpc_message(observation: Observation) -> bytes:
    request = policy_pb2.ActRequest(state=observation.state.tolist(), instruction=observation.instruction)
    for camera, image in observation.images.items():
        raw = request.images.add(camera=camera).raw
        raw.height, raw.width, raw.data = *image.shape[:2], image.tobytes()
    return request.SerializeToString()


def load(
    address: str,
    messages: list[bytes],
    clients: int,
    seconds: float,
    *,
    timeout_s: float = 30.0,
    meanwhile: Callable[[], None] | None = None,
) -> Outcome:
    """`clients` robots over gRPC, each asking again as soon as it is answered, for so many seconds.

    A robot whose request is refused as overload waits as long as the server says. meanwhile: called once in the middle.
    """

    async def run() -> Outcome:
        outcome = Outcome()
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(address, options) for _ in range(min(clients, 8))]
        calls = [channel.unary_unary(ACT) for channel in channels]
        began = time.perf_counter()
        until = began + seconds

        async def robot(index: int) -> None:
            call, message = calls[index % len(calls)], messages[index % len(messages)]
            while time.perf_counter() < until:
                asked = time.perf_counter()
                try:
                    await call(message, timeout=timeout_s)
                    outcome.latencies_ms.append(1000 * (time.perf_counter() - asked))
                except grpc.aio.AioRpcError as error:
                    status = error.code().name
                    pause_ms = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
                    if status == "RESOURCE_EXHAUSTED":
                        outcome.refused_ms.append(1000 * (time.perf_counter() - asked))
                    else:
                        outcome.errors[status] = outcome.errors.get(status, 0) + 1
                    await asyncio.sleep(int(pause_ms) / 1000 if pause_ms else 0.05)

        robots = [asyncio.ensure_future(robot(index)) for index in range(clients)]
        if meanwhile is not None:
            await asyncio.sleep(seconds / 2)
            await asyncio.to_thread(meanwhile)
        await asyncio.gather(*robots)
        outcome.seconds = time.perf_counter() - began
        for channel in channels:
            await channel.close()
        return outcome

    return asyncio.run(run())


class TemporaryPolicy:
    """The path of a given policy, or of an untrained one in a folder that goes away."""

    def __init__(self, given: Path | None, preset: str) -> None:
        self._given, self._preset = given, preset
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Path:
        if self._given is not None:
            return self._given
        self._folder = tempfile.TemporaryDirectory()
        return untrained_policy(Path(self._folder.name) / "policy", self._preset)

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()
