"""A policy on another machine: RemotePolicy, a `vla.interface.Policy` over HTTP, gRPC or openpi's WebSocket. No torch.

    with RemotePolicy("grpc://127.0.0.1:8001") as policy:
        (chunk,) = policy.act([observation])

Several observations travel together and share a batch on the server. Requests are stateless, so one that met an
overload, a restart or a broken connection is sent again, after the pause the server names, within its deadline.
"""

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from serve.client_wires import Question, TlsFiles, Wire, connect
from serve.protocol.refusal import RETRYABLE, Code, Refusal
from vla.interface import ActionChunk, Observation, RobotSpec

KEY_VARIABLE = "REMASK_API_KEY"
SCHEMES = ("http", "https", "grpc", "grpcs", "ws", "wss")
FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0


class RemotePolicy:
    """See `vla.interface.Policy`. Not for several threads at once: give each its own.

    url: grpc://HOST:PORT, http://... or ws://..., with an s for TLS. key: default the environment's REMASK_API_KEY.
    timeout_s: deadline of one `act`, retries included. ca: PEM file that signs the server's certificate, default the
    system's. certificate, certificate_key: PEM files for mutual TLS. same_checkpoint: refuse to go on when the server has
    swapped its checkpoint, as an evaluation must.
    Raises ValueError for a URL of another kind, OSError if the server cannot be reached within timeout_s.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 10.0,
        ca: Path | None = None,
        certificate: Path | None = None,
        certificate_key: Path | None = None,
        same_checkpoint: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise ValueError(
                f"{url!r} is no address of a policy server; write one of {', '.join(s + '://HOST:PORT' for s in SCHEMES)}."
            )
        self.url, self.timeout_s, self.same_checkpoint = url, timeout_s, same_checkpoint
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        self._wire: Wire = connect(url, key or None, TlsFiles(ca, certificate, certificate_key))
        description = self._insist(lambda left_s: self._wire.describe(left_s))
        self.spec: RobotSpec = description.spec
        self.action_horizon: int = description.action_horizon
        self.content_hash: str = description.checkpoint

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._wire.close()

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
        delays: Sequence[int | None] | None = None,
    ) -> list[ActionChunk]:
        """See `vla.interface.Policy.act`. info: what the server's policy says, and its checkpoint.

        delays: per observation how many of the `known` actions (then the whole unexecuted tail) will have been executed when
            the answer arrives; the answer starts with those only. Default: all of them.
        Raises ValueError for an observation that the policy refuses, TimeoutError after timeout_s, PermissionError without
        the right key, ConnectionError for the rest.
        """
        count = len(observations)
        questions = [
            Question(observation, tail, delay, int(seed))
            for observation, tail, delay, seed in zip(
                observations, known or [None] * count, delays or [None] * count, seeds or [0] * count, strict=True
            )
        ]
        if not questions:
            return []
        chunks = self._insist(lambda left_s: self._wire.act(questions, left_s))
        for chunk in chunks:
            checkpoint = chunk.info.get("checkpoint", self.content_hash)
            if checkpoint != self.content_hash:
                if self.same_checkpoint:
                    raise ConnectionError(
                        f"{self.url} has swapped checkpoint {self.content_hash} for {checkpoint} meanwhile; start again."
                    )
                self.content_hash = checkpoint
        return chunks

    def _insist(self, call):
        """The result of call(seconds left), tried again while that can help."""
        until = time.monotonic() + self.timeout_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return call(max(1e-3, until - time.monotonic()))
            except Refusal as refusal:
                wait_s = max(pause_s, refusal.retry_after_s or 0.0) * random.uniform(0.8, 1.2)
                if refusal.code not in RETRYABLE or time.monotonic() + wait_s >= until:
                    raise _as_error(self.url, refusal) from None
            time.sleep(wait_s)
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)


def _as_error(url: str, refusal: Refusal) -> Exception:
    """The exception of `vla.interface.Policy.act` for what a server answered."""
    text = f"{url}: {refusal.message}"
    match refusal.code:
        case Code.UNAUTHENTICATED | Code.FORBIDDEN:
            return PermissionError(f"{text} (set {KEY_VARIABLE})")
        case Code.DEADLINE | Code.SLOW_BODY:
            return TimeoutError(text)
        case Code.INTERNAL | Code.UNAVAILABLE | Code.OVERLOADED:
            return ConnectionError(text)
        case _:
            return ValueError(text)
