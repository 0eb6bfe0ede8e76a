"""`vla serve` as a process: signals, swaps of the checkpoint, and what a killed server leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serve.client import RemotePolicy
from tests.odd_policy import odd_observation
from tests.serving import WEB

ROOT = Path(__file__).resolve().parents[1]


class Served:
    """`vla serve` as a user starts it, in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "vla.cli", "serve", "--port=0", "--grpc_port=0", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True).start()

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """The first line that holds `text`."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for line in list(self.lines):
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.lines}")

    def url(self, scheme: str) -> str:
        return next(word for word in self.wait_for(f"{scheme}://").split() if word.startswith(f"{scheme}://"))

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait(30)


def odd_file(path: Path, content_hash: str, delay_s: float = 0.0) -> str:
    """A module-level factory that reads its answer from a file: a checkpoint that can be swapped."""
    path.write_text(json.dumps({"content_hash": content_hash, "delay_s": delay_s}))
    return f"--policy.arguments={{path: {path}}}"


def test_sigterm_finishes_what_is_in_flight_and_exits_0(tmp_path: Path):
    arguments = odd_file(tmp_path / "odd.json", "first", delay_s=1.0)
    served = Served("--policy.factory=tests.odd_policy:odd_from_file", arguments, "--grace_s=20")
    try:
        urls = [served.url("http"), served.url("ws"), served.url("grpc")]
        results: dict[str, object] = {}

        def robot(url: str) -> None:
            try:
                with RemotePolicy(url, timeout_s=15) as remote:
                    results[url + " ready"] = True
                    results[url] = remote.act([odd_observation()])[0].actions.shape
            except OSError as error:
                results[url] = error

        threads = [threading.Thread(target=robot, args=(url,)) for url in urls]
        for thread in threads:
            thread.start()
        while sum(key.endswith("ready") for key in results) < 3:
            time.sleep(0.01)
        time.sleep(0.4)
        served.process.send_signal(signal.SIGTERM)
        served.wait_for("draining")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(urls[0].rpartition(":")[2])), timeout=5).close()
        for thread in threads:
            thread.join(30)
        assert [results[url] for url in urls] == [(4, 7)] * 3
        assert served.process.wait(30) == 0
        served.wait_for("stopped", 5)
    finally:
        served.end()


def test_sighup_and_the_endpoint_swap_the_checkpoint_without_dropping_a_request(tmp_path: Path):
    path = tmp_path / "odd.json"
    served = Served("--policy.factory=tests.odd_policy:odd_from_file", odd_file(path, "first", 0.01))
    try:
        url, answers, stop = served.url("http"), [], threading.Event()

        def robot() -> None:
            with RemotePolicy(url, timeout_s=30) as remote:
                while not stop.is_set():
                    answers.append(remote.act([odd_observation()])[0].info["checkpoint"])

        thread = threading.Thread(target=robot)
        thread.start()
        odd_file(path, "second")
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("swapped first for second")
        odd_file(path, "third")
        swapped = WEB.post(f"{url}/admin/reload", timeout=60)
        assert swapped.status_code == 200 and swapped.json()["checkpoint"] == "third"
        path.write_text("{broken")
        refused = WEB.post(f"{url}/admin/reload", timeout=60)
        assert refused.status_code == 409 and "the old one goes on" in refused.json()["error"]
        count = len(answers)
        while len(answers) < count + 3:
            time.sleep(0.01)
        stop.set()
        thread.join(30)
        order = list(dict.fromkeys(answers))
        assert order in (["first", "second", "third"], ["first", "third"], ["second", "third"]), order
    finally:
        served.end()


def test_a_killed_server_leaves_no_worker_behind(tmp_path: Path):
    served = Served("--policy.factory=tests.odd_policy:odd_from_file", odd_file(tmp_path / "odd.json", "first"))
    try:
        served.wait_for("HTTP: page")
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        assert children
        served.process.kill()
        until = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        served.end()
