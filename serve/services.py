"""What every wire of one server shares."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve.chat import ChatBackend
from serve.events import EventHub
from serve.gate import Gate
from serve.metrics import Metrics
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest, Description, PolicyBackend
from serve.security import Keys
from serve.tensor_process import TensorProcess
from vla.interface import ActionChunk


@dataclass
class Services:
    """Made by serve/server.py (or a Ray deployment), read by the HTTP, gRPC and WebSocket interfaces."""

    limits: Limits
    metrics: Metrics
    gate: Gate
    events: EventHub
    keys: Keys
    policy: PolicyBackend | None = None
    chat: ChatBackend | None = None
    encoders: dict[str, TensorProcess] = field(default_factory=dict)  # by name
    runs: Path | None = None  # folder of evaluation folders that the page replays
    swap: Callable[[], Awaitable[tuple[str, str]]] | None = None
    hosts: frozenset[str] | None = None  # names a browser may use; None: any
    version: str = "0"

    @property
    def not_ready(self) -> str:
        """Why the server is not ready; "" if it is."""
        if self.gate.draining:
            return "draining"
        for name, backend in (("policy", self.policy), ("chat", self.chat), *self.encoders.items()):
            if backend is not None and not backend.ready:
                return f"the {name} model is being loaded"
        return ""

    def need_policy(self) -> PolicyBackend:
        """Raises Refusal where this server has none, or not yet."""
        if self.policy is None:
            raise Refusal(Code.NOT_FOUND, "This server has no policy; start it with --policy.path=RUN/checkpoints/last/policy.")
        if not self.policy.ready:
            raise Refusal(Code.UNAVAILABLE, "The policy is being loaded.", retry_after_s=1.0)
        return self.policy

    def need_description(self) -> Description:
        """Of the policy, even while it is being restarted."""
        if self.policy is None:
            raise Refusal(Code.NOT_FOUND, "This server has no policy; start it with --policy.path=RUN/checkpoints/last/policy.")
        if self.policy.description is None:
            raise Refusal(Code.UNAVAILABLE, "The policy is being loaded.", retry_after_s=1.0)
        return self.policy.description

    def need_chat(self) -> ChatBackend:
        """Raises Refusal where this server has no language side, or not yet."""
        if self.chat is None:
            raise Refusal(Code.NOT_FOUND, "This server has no language model; start it with --vlm.path=FOLDER.")
        if not self.chat.ready:
            raise Refusal(Code.UNAVAILABLE, "The language model is being loaded.", retry_after_s=1.0)
        return self.chat

    async def act(self, requests: Sequence[ActRequest]) -> list[ActionChunk]:
        """The policy's chunks; whoever watches the page sees the first of them."""
        chunks = await self.need_policy().act(requests)
        if self.events.has_readers:
            self.events.publish_request(requests[0], chunks[0])
        return chunks
