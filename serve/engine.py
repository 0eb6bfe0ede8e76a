"""Continuous batching with speculation: schedule -> draft -> verify -> commit, one round per `step`.

Requests of any length share a pass. Each round every request's draft tree is verified at once, and each goes on by as many
tokens as were right: lengths are ragged, nothing waits for a batch mate, and no answer depends on one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from multimodal.sampling import choose
from multimodal.vlm import image_runs
from multimodal.vlm_folder import most_images
from serve.answer_text import AnswerText
from serve.controller import Controller, Drafting, FixedController, Round
from serve.drafters import Drafter, DraftLimits
from serve.errors import InvalidRequest, QueueFull
from serve.generation import Clock, Generation
from serve.image_cache import ImageCache, image_key
from serve.request import Delta, Event, Finished, Limits, Request, check_length, check_request
from serve.runner import Runner, token_logprobs
from serve.scheduler import PromptPart, Scheduler
from serve.stats import EngineStats, StatsKeeper
from serve.target import Target
from serve.tree import DraftTree, root_only
from serve.verify import Acceptance, accept, accept_greedy


@dataclass(frozen=True)
class EngineConfig:
    """What the engine may use. Key/value memory is max_batch * (context + max_nodes + 1) positions, taken at the start."""

    max_batch: int = 4  # requests that hold a slot
    context: int = 1024  # positions of prompt, images and answer of one request
    max_waiting: int = 64  # requests beyond the slots; more are refused
    prefill_chunk: int = 256  # prompt positions read per step, so that running answers are not held up
    max_nodes: int = 64  # drafted tokens of one request and round, at most
    max_pixels: int = 4096 * 4096  # of one image
    image_cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_batch", "context", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"EngineConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("max_waiting", "max_nodes", "max_pixels", "image_cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"EngineConfig.{name} is {getattr(self, name)}; it must not be negative.")


class Engine:
    """`submit` and `cancel` from any thread, `step` from one. Without a drafter it decodes plainly."""

    def __init__(
        self,
        target: Target,
        config: EngineConfig | None = None,
        drafter: Drafter | None = None,
        controller: Controller | None = None,
    ) -> None:
        self.target, self.config = target, config or EngineConfig()
        self.drafter = drafter
        self.controller = controller or FixedController(DraftLimits())
        vlm = target.vlm.eval()
        self.runner = Runner(vlm, self.config.max_batch, self.config.context + self.config.max_nodes + 1)
        self.image_cache = ImageCache(self.config.image_cache_bytes)
        places = most_images(vlm)
        self.limits = Limits(
            vocab_size=vlm.config.vocab_size,
            context=self.config.context,
            tokens_per_image=vlm.tokens_per_image,
            max_images=self.config.context // max(1, vlm.tokens_per_image) if places is None else places,
            max_pixels=self.config.max_pixels,
            min_side=target.min_side,
        )
        self._scheduler = Scheduler(self.config.max_batch, self.config.max_waiting, self.config.prefill_chunk)
        self._generations: dict[int, Generation] = {}
        self._embeddings: dict[int, Tensor] = {}  # of prompts being read: [T, hidden_size]
        self._cancelled: list[int] = []
        self._stats = StatsKeeper(self.config.max_nodes)
        self._next_id = 0
        self._lock = threading.Lock()  # scheduler, cancellations and the table of generations

    # ---------------------------------------------------------------------------------------------------------- outside

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises the RequestError that names what is wrong with it, before any compute."""
        prompt = self.check(request)
        if request.max_tokens is None:
            request = replace(request, max_tokens=self.limits.context - len(prompt))
        keys = tuple(image_key(image) for image in request.images)
        end_ids = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else frozenset(self.target.eos_ids))
        text = AnswerText(self.target.tokenizer.decode, request.stop)
        with self._lock:
            retry_after = self._stats.retry_after(self._scheduler.num_waiting, self.config.max_batch)
            self._scheduler.offer(self._next_id, len(prompt), retry_after, self._whole_runs(prompt))
            request_id, self._next_id = self._next_id, self._next_id + 1
            clock = Clock(submitted=time.perf_counter())
            generation = Generation(request_id, request, prompt, end_ids, text, keys, clock=clock)
            self._generations[request_id] = generation
        return request_id

    def check(self, request: Request) -> list[int]:
        """A request's prompt, expanded. Raises the RequestError that names what is wrong with it."""
        check_request(request, self.limits)
        count, asked = len(request.images), request.prompt
        try:
            ids = self.target.encode(asked, count) if isinstance(asked, str) else list(asked)
            prompt = self.target.vlm.expand_prompt(ids, count)
        except ValueError as error:
            raise InvalidRequest("prompt", str(error)) from error
        check_length(len(prompt), request, self.limits)
        return prompt

    def _whole_runs(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """Image runs that see themselves whole, so that they must be read at once."""
        return image_runs(prompt) if self.target.vlm.config.bidirectional_images else []

    def cancel(self, request_id: int) -> bool:
        """End a request at the next round boundary, wherever it stands. False if it is not here (any more)."""
        with self._lock:
            if request_id not in self._generations or request_id in self._cancelled:
                return False
            self._cancelled.append(request_id)
            return True

    @property
    def has_work(self) -> bool:
        return bool(self._generations)

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of this moment."""
        with self._lock:
            return self._stats.snapshot(
                running=self._scheduler.num_running,
                waiting=self._scheduler.num_waiting,
                kv_tokens_used=sum(self.runner.cache.lengths),
                kv_tokens_capacity=self.runner.cache.capacity * self.config.max_batch,
                image_cache=self.image_cache,
            )

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request, driving the engine; closing the iterator cancels it. For one thread and no other `step`."""
        request_id = self.submit(request)
        try:
            while True:
                for event in self.step():
                    if event.request_id == request_id:
                        yield event
                        if isinstance(event, Finished):
                            return
        finally:
            if self.cancel(request_id):
                self.step()

    def run(self, requests: Sequence[Request]) -> list[Finished]:
        """The answers to some requests, in their order; more than the queue holds are fed in as it empties."""
        order: list[int] = []
        finished: dict[int, Finished] = {}
        while len(finished) < len(requests):
            while len(order) < len(requests):
                try:
                    order.append(self.submit(requests[len(order)]))
                except QueueFull:
                    if not self.has_work:
                        raise
                    break
            finished |= {event.request_id: event for event in self.step() if isinstance(event, Finished)}
        return [finished[request_id] for request_id in order]

    # ----------------------------------------------------------------------------------------------------------- a round

    def step(self) -> list[Event]:
        """One round: cancel, admit, read a chunk of prompts, then draft and verify for everyone who decodes."""
        started = time.perf_counter()
        with self._lock:
            leaving = [self._generations[request_id] for request_id in self._cancelled]
            self._cancelled.clear()
        events: list[Event] = []
        for generation in leaving:
            generation.reason = "cancelled"
            generation.text.finish()
            events += self._leave(generation)
        with self._lock:
            plan = self._scheduler.plan()
        for request_id, slot in plan.admitted:
            self._admit(self._generations[request_id], slot)
        for part in plan.prompts:
            events += self._read(part)
        decoding = [self._generations[request_id] for request_id in plan.decoding]
        if decoding:
            events += self._decode(decoding)
        self._stats.total_seconds += time.perf_counter() - started
        return events

    def _admit(self, generation: Generation, slot: int) -> None:
        generation.slot = slot
        generation.clock.admitted = time.perf_counter()
        self.runner.cache.lengths[slot] = 0
        images = zip(generation.image_keys, generation.request.images, strict=True)
        features = [self._image_features(key, image) for key, image in images]
        with torch.inference_mode():
            stacked = torch.stack(features) if features else None
            self._embeddings[generation.id] = self.target.vlm.embed_prompt(generation.prompt, stacked)
        if self.drafter is not None:
            self.drafter.begin(generation, self.image_cache)
        self._stats.prefill_seconds += time.perf_counter() - generation.clock.admitted

    @torch.inference_mode()
    def _image_features(self, key: str, image: np.ndarray) -> Tensor:
        features = self.image_cache.get(key)
        if features is None:
            features = self.target.vlm.image_features(self.target.prepare_all([image]))[0]
            self.image_cache.put(key, features)
        return features

    def _read(self, part: PromptPart) -> list[Event]:
        """Part of a prompt through the target; the first token if that was all of it."""
        started = time.perf_counter()
        generation = self._generations[part.id]
        mask = self.target.vlm.sequence_mask(generation.prompt[: part.stop], part.start)
        hidden = self.runner.read(generation.slot, self._embeddings[part.id][part.start : part.stop], mask)
        self._stats.prompt_tokens += part.stop - part.start
        if self._wants_features(generation):
            self.drafter.observe(generation, part.start, hidden)
        with self._lock:
            is_complete = self._scheduler.was_read(part)
        events: list[Event] = []
        if is_complete:
            del self._embeddings[part.id]
            with torch.inference_mode():
                logits = self.runner.vlm.logits(hidden[-1:])
            best = logits.argmax(-1).tolist()
            first = self._accept(generation, root_only(generation.prompt[-1]), logits, best)
            generation.clock.first_token = time.perf_counter()
            events = self._emit(generation, first.tokens, logits)
        self._stats.prefill_seconds += time.perf_counter() - started
        return events

    def _decode(self, generations: list[Generation]) -> list[Event]:
        """Draft, verify and commit for all of them in one pass of the target."""
        started = time.perf_counter()
        trees, drafting = self._draft(generations)
        drafted = time.perf_counter()
        verified = self.runner.verify([generation.slot for generation in generations], trees)
        best = verified.best()
        verify_seconds = time.perf_counter() - drafted
        paths: list[tuple[int, ...]] = []
        accepted: list[int] = []
        events: list[Event] = []
        for row, (generation, tree) in enumerate(zip(generations, trees, strict=True)):
            acceptance = self._accept(generation, tree, verified.logits[row], best[row])
            path = list(acceptance.path)
            self.runner.cache.commit(generation.slot, path)
            generation.count_round(tree.num_drafted)
            start, before = generation.num_tokens - 1, generation.accepted
            events += self._emit(generation, acceptance.tokens, verified.logits[row, path])
            paths.append(acceptance.path)
            accepted.append(generation.accepted - before)
            if generation.reason is None and self._wants_features(generation):
                self.drafter.observe(generation, start, verified.hidden[row, path])
        outcome = Round(
            ids=tuple(generation.id for generation in generations),
            trees=tuple(trees),
            paths=tuple(paths),
            accepted=tuple(accepted),
            drafting=drafting,
            draft_seconds=drafted - started - drafting.read_seconds,
            verify_seconds=verify_seconds,
            seconds=time.perf_counter() - started - drafting.read_seconds,
        )
        self.controller.observe(outcome)
        self._stats.count_round(outcome)
        return events

    def _draft(self, generations: list[Generation]) -> tuple[list[DraftTree], Drafting]:
        """A tree for each, drafted where controller, request and what is left of the answer allow it; and what it cost."""
        trees = [root_only(generation.last_token) for generation in generations]
        if self.drafter is None:
            return trees, Drafting()
        planned = self.controller.plan(generations)
        limits = [self._capped(generation, limit) for generation, limit in zip(generations, planned, strict=True)]
        rows = [row for row, limit in enumerate(limits) if limit.allow_any]
        if not rows:
            return trees, Drafting()
        proposal = self.drafter.propose([generations[row] for row in rows], [limits[row] for row in rows])
        for row, tree in zip(rows, proposal.trees, strict=True):
            trees[row] = tree.best(limits[row].max_nodes)
        levels = {generations[row].id: count for row, count in zip(rows, proposal.levels, strict=True)}
        drafting = Drafting(levels, proposal.read_seconds)
        return self.controller.trim(trees, drafting), drafting

    def _capped(self, generation: Generation, limits: DraftLimits) -> DraftLimits:
        """A round emits one token more than it accepts, so a path needs no more than the tokens left, less one."""
        wish = generation.request.speculation
        allowed = self.config.max_nodes if wish.max_nodes is None else min(wish.max_nodes, self.config.max_nodes)
        return limits.capped(allowed if wish.enabled else 0, generation.num_remaining - 1)

    def _wants_features(self, generation: Generation) -> bool:
        return self.drafter is not None and self.drafter.needs_features and generation.request.speculation.enabled

    def _accept(self, generation: Generation, tree: DraftTree, logits: Tensor, best: Sequence[int]) -> Acceptance:
        """logits [M, V] and their argmax at each node."""
        sampling, answer = generation.sampling, generation.answer
        if sampling.is_plain_greedy:
            return accept_greedy(tree, best)

        def choose_at(node: int, said: tuple[int, ...]) -> int:
            row = logits[node].double().cpu().numpy()
            return choose(row, sampling, generation.num_tokens + len(said), generation.prompt, [*answer, *said])

        return accept(tree, choose_at)

    def _emit(self, generation: Generation, tokens: Sequence[int], rows: Tensor) -> list[Event]:
        """Events of tokens that a pass gave: rows [n, V] are the logits that each was chosen from."""
        if not bool(torch.isfinite(rows).all()):
            generation.reason = "error"
            self.runner.cache.erase(generation.slot)
            return self._leave(generation, "the model gave logits that are not finite; the request was given up.")
        taken, accepted = generation.take(tokens)
        self._stats.generation_tokens += len(taken)
        top = generation.request.top_logprobs
        logprobs = None if top is None else token_logprobs(rows[: len(taken)], taken, top)
        events: list[Event] = [Delta(generation.id, generation.text.take(), taken, accepted, logprobs)]
        return events if generation.reason is None else events + self._leave(generation)

    def _leave(self, generation: Generation, error: str | None = None) -> list[Event]:
        """A request whose `reason` is set goes: slot, prompt, draft state."""
        if self.drafter is not None and generation.slot >= 0:
            self.drafter.end(generation)
        self.controller.release(generation.id)
        self._embeddings.pop(generation.id, None)
        if generation.slot >= 0:
            self.runner.cache.rollback(generation.slot, 0)
        with self._lock:
            self._scheduler.leave(generation.id)
            del self._generations[generation.id]
            if generation.id in self._cancelled:  # it ended by itself in this very round
                self._cancelled.remove(generation.id)
        images = len(generation.image_keys) * self.limits.tokens_per_image
        finished = generation.finished(time.perf_counter(), images, error)
        self._stats.count_finished(finished)
        rest = generation.text.take()
        last: list[Event] = [Delta(generation.id, rest, ())] if rest else []  # what was held back when it was cancelled
        return [*last, finished]
