"""What the wires ask the language side and what it answers, as values; and ChatBackend, which answers. No engine here."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ChatRequest:
    """One answer to be generated."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    images: tuple[np.ndarray, ...] = ()  # uint8 [H, W, 3], in the order of the messages
    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no log-probabilities
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    speculate: bool = True  # False: plain decoding, for comparisons; the answer is the same


@dataclass(frozen=True)
class TokenProbability:
    """One token as logprobs show it."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()  # (token, logprob), most likely first


@dataclass(frozen=True)
class ChatPiece:
    """What one round of the engine made final."""

    text: str
    num_tokens: int
    num_accepted: int  # of these, drafted and accepted
    logprobs: tuple[TokenProbability, ...] | None = None


@dataclass(frozen=True)
class ChatEnd:
    """The last event of an answer."""

    reason: str  # stop | length
    usage: dict[str, Any]  # prompt_tokens, completion_tokens, rounds, drafted_tokens, accepted_tokens, seconds


class ChatBackend(Protocol):
    """The language side, in this process or another."""

    name: str  # of the model, as clients ask for it

    @property
    def ready(self) -> bool: ...

    @property
    def checkpoint(self) -> str: ...

    @property
    def max_images(self) -> int | None:
        """That the model has places for; None while it is not known."""
        ...

    def stream(self, request: ChatRequest) -> AsyncIterator[ChatPiece | ChatEnd]:
        """Pieces, then one end. Raises Refusal, before the first piece for whatever is wrong with the request.

        Closing the iterator ends the generation.
        """
        ...


def prompt_of(messages: tuple[tuple[str, str], ...]) -> str:
    """One text of a conversation: a single question as it is, what it was trained on; else its turns, a line each."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n".join(f"{role}: {text}" for role, text in messages)
