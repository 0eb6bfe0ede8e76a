"""What the engine counts: requests, tokens, drafts and seconds; names follow vLLM's metrics where it has them."""

from collections import Counter
from dataclasses import dataclass

from serve.controller import Round
from serve.image_cache import ImageCache
from serve.request import Finished


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start; gauges (running, waiting, kv_tokens_*) of the moment."""

    num_requests_finished: dict[str, int]  # by reason
    num_requests_running: int
    num_requests_waiting: int
    prompt_tokens: int
    generation_tokens: int
    rounds: int  # target passes with decoding requests
    request_rounds: int  # the same, counted once for each of its requests
    spec_decode_num_drafts: int  # trees verified that had a drafted node
    spec_decode_num_draft_tokens: int
    spec_decode_num_accepted_tokens: int  # those that became part of an answer
    spec_decode_num_accepted_tokens_per_pos: tuple[int, ...]  # [i]: trees of which i + 1 drafted tokens or more were accepted
    image_cache_hits: int
    image_cache_misses: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    draft_seconds: float
    draft_read_seconds: float  # the draft's reading of prompts, and of what it missed while drafting paused
    verify_seconds: float
    prefill_seconds: float  # images, prompts, first tokens
    overhead_seconds: float  # of `step`, what is none of the above

    @property
    def tokens_per_round(self) -> float:
        """Mean of what a round brings a request, drafted or not, the target's own token included; 1 is plain decoding."""
        return 1 + self.spec_decode_num_accepted_tokens / max(1, self.request_rounds)


class StatsKeeper:
    """The counters while they move."""

    def __init__(self, max_depth: int) -> None:
        self.prompt_tokens = self.generation_tokens = self.rounds = self.request_rounds = 0
        self.drafts = self.draft_tokens = self.accepted_tokens = 0
        self.per_position = [0] * max_depth
        self.draft_seconds = self.draft_read_seconds = self.verify_seconds = self.prefill_seconds = self.total_seconds = 0.0
        self.finished: Counter[str] = Counter()
        self._mean_seconds = 1.0  # of a request in its slot, recent ones weighing more

    def count_round(self, outcome: Round) -> None:
        self.rounds += 1
        self.request_rounds += len(outcome.ids)
        self.draft_seconds += outcome.draft_seconds
        self.draft_read_seconds += outcome.drafting.read_seconds
        self.verify_seconds += outcome.verify_seconds
        for tree, accepted in zip(outcome.trees, outcome.accepted, strict=True):
            if tree.num_drafted:
                self.drafts += 1
                self.draft_tokens += tree.num_drafted
                self.accepted_tokens += accepted
                for position in range(accepted):
                    self.per_position[position] += 1

    def count_finished(self, finished: Finished) -> None:
        self.finished[finished.reason] += 1
        if finished.reason in ("stop", "length"):
            seconds = finished.usage.prefill_seconds + finished.usage.decode_seconds
            self._mean_seconds += 0.2 * (seconds - self._mean_seconds)

    def retry_after(self, waiting: int, slots: int) -> float:
        """Seconds until a place in the queue is likely to be free."""
        return max(0.1, self._mean_seconds * max(1, waiting) / (slots * 4))

    def snapshot(
        self, *, running: int, waiting: int, kv_tokens_used: int, kv_tokens_capacity: int, image_cache: ImageCache
    ) -> EngineStats:
        deepest = max((index + 1 for index, count in enumerate(self.per_position) if count), default=0)
        spent = self.draft_seconds + self.draft_read_seconds + self.verify_seconds + self.prefill_seconds
        return EngineStats(
            num_requests_finished=dict(self.finished),
            num_requests_running=running,
            num_requests_waiting=waiting,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            rounds=self.rounds,
            request_rounds=self.request_rounds,
            spec_decode_num_drafts=self.drafts,
            spec_decode_num_draft_tokens=self.draft_tokens,
            spec_decode_num_accepted_tokens=self.accepted_tokens,
            spec_decode_num_accepted_tokens_per_pos=tuple(self.per_position[:deepest]),
            image_cache_hits=image_cache.hits,
            image_cache_misses=image_cache.misses,
            kv_tokens_used=kv_tokens_used,
            kv_tokens_capacity=kv_tokens_capacity,
            draft_seconds=self.draft_seconds,
            draft_read_seconds=self.draft_read_seconds,
            verify_seconds=self.verify_seconds,
            prefill_seconds=self.prefill_seconds,
            overhead_seconds=max(0.0, self.total_seconds - spent),
        )
