"""Pushes a running episode to a server's page (`vla eval --watch URL`). Never slows an episode, never fails one.

Events go to POST URL/watch (serve/protocol/schemas.py: WatchEvent) from a thread of this process. What the network does
not take in time is dropped; a server that is gone is tried again every few seconds.
"""

import base64
import contextlib
import http.client
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from serve.client import KEY_VARIABLE
from serve.events import chunk_fields
from serve.protocol.images import encode_jpeg
from sim.rollout import Recorder
from vla.interface import ActionChunk, Observation, Policy

EVENTS_PER_POST = 16
BACKLOG = 128  # events
TIMEOUT_S = 5.0
RETRY_S = 5.0
FLUSH_S = 2.0  # an episode's end waits this long for its last events


class Watcher:
    """One simulator process's line to the page. Raises ValueError for a URL of another kind than http or https."""

    def __init__(self, url: str, run: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"watch is {url!r}; write the address of the server's page, http://HOST:PORT.")
        self._url, self._parts, self._run = url, parts, run
        self._events: queue.Queue[dict[str, Any]] = queue.Queue(BACKLOG)
        self._warned = False
        threading.Thread(target=self._send_all, daemon=True).start()

    @contextlib.contextmanager
    def episode(self, task: int, episode: int, instruction: str, camera: str, size: int) -> Iterator["EpisodeWatch"]:
        """What one episode reports to; its end is pushed when the block ends."""
        watch = EpisodeWatch(self, {"run": self._run, "task": task, "episode": episode}, camera, size)
        watch.push("start", instruction=instruction)
        try:
            yield watch
        finally:
            watch.push("end", step=watch.step, success=watch.success)
            until = time.monotonic() + FLUSH_S
            while not self._warned and self._events.unfinished_tasks and time.monotonic() < until:
                time.sleep(0.01)

    def put(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(queue.Full):
            self._events.put_nowait(event)

    def _send_all(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while True:
            events = [self._events.get()]
            while len(events) < EVENTS_PER_POST and not self._events.empty():
                events.append(self._events.get())
            try:
                connection = connection or self._connect()
                self._post(connection, events)
                self._warned = False
            except (OSError, http.client.HTTPException) as error:
                if connection is not None:
                    connection.close()
                connection = None
                if not self._warned:
                    print(f"watch: {self._url} does not take frames ({error}); the evaluation goes on.", file=sys.stderr)
                self._warned = True
                time.sleep(RETRY_S)
            finally:
                for _ in events:
                    self._events.task_done()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT_S)

    def _post(self, connection: http.client.HTTPConnection, events: list[dict[str, Any]]) -> None:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        connection.request("POST", f"{self._parts.path.rstrip('/')}/watch", json.dumps({"events": events}), headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != 200:
            raise http.client.HTTPException(f"HTTP {response.status}: {text[:200]}")


class EpisodeWatch:
    """A sim.rollout.Recorder that shows its frames; chunks and the end come beside them."""

    def __init__(self, watcher: Watcher, identity: dict[str, Any], camera: str, size: int) -> None:
        self._watcher, self._identity = watcher, identity
        self.camera, self.size = camera, size
        self.step, self.success = 0, False

    def add(self, frame: np.ndarray) -> None:
        """frame: uint8 [size, size, 3], upright."""
        image = base64.b64encode(encode_jpeg(np.ascontiguousarray(frame))).decode()
        self.push("frame", step=self.step, image=image)
        self.step += 1

    def chunk(self, chunk: ActionChunk) -> None:
        self.push("chunk", step=self.step, **chunk_fields(chunk))

    def push(self, kind: str, **fields: Any) -> None:
        self._watcher.put({"kind": kind} | self._identity | fields)


class WatchedPolicy:
    """A vla.interface.Policy whose chunks are shown."""

    def __init__(self, policy: Policy, watch: EpisodeWatch) -> None:
        self._policy, self._watch = policy, watch
        self.spec, self.action_horizon = policy.spec, policy.action_horizon

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        chunks = self._policy.act(observations, known=known, seeds=seeds)
        for chunk in chunks:
            self._watch.chunk(chunk)
        return chunks


class Recorders:
    """Several recorders of one camera as one; all take the same frames."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders
        self.camera, self.size = recorders[0].camera, recorders[0].size

    def add(self, frame: np.ndarray) -> None:
        for recorder in self._recorders:
            recorder.add(frame)
