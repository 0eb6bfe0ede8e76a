"""One request between submission and its last event: what it has said, where it stands, what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from multimodal.sampling import SamplingConfig
from serve.answer_text import AnswerText
from serve.request import Finished, Request, Usage


@dataclass
class Clock:
    """Moments in seconds of one monotonic clock; 0 where not reached."""

    submitted: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0


@dataclass(eq=False)
class Generation:
    """State of a request. Tokens are the prompt (images as negative ids) and the answer so far."""

    id: int
    request: Request
    prompt: list[int]
    end_ids: frozenset[int]
    text: AnswerText
    image_keys: tuple[str, ...] = ()
    answer: list[int] = field(default_factory=list)
    slot: int = -1
    clock: Clock = field(default_factory=Clock)
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    reason: str | None = None  # why it ended

    @property
    def sampling(self) -> SamplingConfig:
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def last_token(self) -> int:
        return self.answer[-1] if self.answer else self.prompt[-1]

    @property
    def num_remaining(self) -> int:
        """Tokens that max_tokens still allows."""
        return self.request.max_tokens - len(self.answer)

    def count_round(self, num_drafted: int) -> None:
        self.rounds += 1
        self.drafted += num_drafted

    def take(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Continue the answer with what a round emitted, up to its end; the tokens that count, and how many were drafted.

        All but the last of `tokens` were. Sets `reason` when the answer ends: at an end id, at a completed stop string or at
        max_tokens, whichever comes first.
        """
        taken = []
        for token in tokens:
            self.answer.append(token)
            taken.append(token)
            if token in self.end_ids:
                self.reason = "stop"
            elif self.text.push(token):
                self.reason = "stop"
            elif self.num_remaining == 0:
                self.reason = "length"
            if self.reason is not None:
                self.text.finish()
                break
        accepted = min(len(taken), len(tokens) - 1)
        self.accepted += accepted
        return tuple(taken), accepted

    def finished(self, now: float, num_image_tokens: int, error: str | None = None) -> Finished:
        """The last event; `reason` must be set."""
        clock = self.clock
        admitted = clock.admitted or now
        first = clock.first_token or now
        usage = Usage(
            prompt_tokens=len(self.prompt),
            image_tokens=num_image_tokens,
            completion_tokens=len(self.answer),
            rounds=self.rounds,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            queue_seconds=admitted - clock.submitted,
            first_token_seconds=first - clock.submitted,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
        )
        reason = self.reason or "error"
        return Finished(self.id, reason, self.text.text, tuple(self.answer), usage, self.text.stop_string, error)
