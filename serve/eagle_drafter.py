"""The draft model as a drafter: lazily caught up with the target, then grown level by level, many requests in one pass.

What a request's target passes gave is only stored; the draft reads it when it is asked to propose. So a request that does not
speculate costs nothing, and drafting can stop and start again at any round.

At temperature > 0 the draft adds the same noise to its logits that the target's choice at that position will use
(multimodal.sampling), so it guesses the sample and not only the law. The answer cannot depend on it: it is a function of the
target's logits and the noise.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multimodal.attention import causal_mask, ragged_mask
from multimodal.compressor import Compressed
from multimodal.sampling import gumbel_noise
from multimodal.slot_cache import SlotCache
from multimodal.vlm import VLM
from serve.draft_model import DraftModel, prompt_entries
from serve.drafters import DraftLimits, Proposal
from serve.generation import Generation
from serve.image_cache import ImageCache
from serve.tree import DraftTree, TreeBuilder


_CATCH_UP = 16  # tokens that requests read together; who has missed more reads the rest alone first


@dataclass
class _State:
    """Of one request: how many of its tokens the draft has read, and the features that it has not."""

    images: ImageCache
    num_read: int = 0  # tokens 0 .. num_read - 1 have entered (or never do)
    first: int = 0  # position of the first feature in `features`
    features: list[Tensor] = field(default_factory=list)

    def take(self, first: int, stop: int) -> Tensor:
        """Features of positions first .. stop - 1."""
        self.features = [torch.cat(self.features)]
        return self.features[0][first - self.first : stop - self.first]

    def forget(self, stop: int) -> None:
        """Features of positions before `stop` are not needed any more."""
        rest = self.features[0][stop - self.first :]
        self.features, self.first = [rest] if len(rest) else [], stop


class EagleDrafter:
    """Drafts with a DraftModel. One key/value slot per engine slot."""

    needs_features = True

    def __init__(
        self, model: DraftModel, target: VLM, *, num_slots: int, capacity: int, chunk: int = 256, branch: str | None = None
    ) -> None:
        """capacity: positions of a slot, the longest request and `width * depth` of the widest tree; chunk: prompt per pass.

        branch: always compress images so, whatever the gate thinks.
        """
        self.model, self.target, self.chunk, self.branch = model.eval(), target, chunk, branch
        weight = model.fuse.weight
        self.device = weight.device
        room = capacity + _CATCH_UP  # a short row of a pass is padded to the longest
        self.cache = SlotCache(model.decoder.config, num_slots, room, weight.dtype, weight.device)
        self._head = model.head_weight(target).detach().clone() if not model.has_full_head else target.head_weight.detach()
        self._num_ids = target.config.vocab_size + target.config.num_new_tokens  # of the target's choice, and so of its noise
        self._states: dict[int, _State] = {}
        self.branches: dict[str, int] = {}  # compressor branch -> images
        self.visual_tokens = [0, 0]  # before and after the compressor

    def begin(self, generation: Generation, images: ImageCache) -> None:
        self.cache.erase(generation.slot)  # what the last request left may be NaN, which reaches over a mask
        self._states[generation.id] = _State(images)

    def observe(self, generation: Generation, start: int, features: Tensor) -> None:
        state = self._states[generation.id]
        if not state.features:
            state.first = start
        state.features.append(features)

    def end(self, generation: Generation) -> None:
        del self._states[generation.id]

    @torch.inference_mode()
    def propose(self, generations: Sequence[Generation], limits: Sequence[DraftLimits]) -> Proposal:
        read_seconds = sum(self._read_missed(generation) for generation in generations)
        hidden = self._catch_up(generations)
        builders = [TreeBuilder(generation.last_token) for generation in generations]
        grow = _Growth(self, generations, limits, builders)
        grow.children([[0]] * len(generations), hidden[:, None])
        for level in range(1, max(limit.max_depth for limit in limits)):
            if not grow.level(level):
                break
        trees = [builder.build(limit.max_nodes, limit.least_score) for builder, limit in zip(builders, limits, strict=True)]
        return Proposal(trees, grow.levels, read_seconds)

    @torch.inference_mode()
    def time_level(self, rows: int, past: int) -> float:
        """Seconds of one level of `rows` nodes behind `past` positions of slot 0, which must be free."""
        start = time.perf_counter()
        width = self.target.config.decoder.hidden_size
        embeddings = self.target.embed_text(torch.zeros(1, rows, dtype=torch.int64, device=self.device))
        features = torch.zeros(1, rows, width, dtype=embeddings.dtype, device=self.device)
        mask = ragged_mask([past], torch.eye(rows, dtype=torch.bool)[None]).to(self.device)
        positions = torch.full((1, rows), past, device=self.device)
        hidden = self.model.decoder(self.model.enter(embeddings, features), mask, positions, self.cache.rows([0], rows, [past]))
        self._ranked(hidden, [None], 0, 4)
        return time.perf_counter() - start

    def _ranked(
        self, hidden: Tensor, generations: Sequence[Generation | None], depth: int, count: int
    ) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
        """Log-probabilities and ids of the `count` likeliest tokens after each estimated feature [R, W, width].

        The tokens stand `depth` places after the next one of their request. Sampled requests get the noise that the target's
        choice there will use.
        """
        logits = (self.target.scale_for_head(hidden) @ self._head.T).float()
        for row, generation in enumerate(generations):
            if generation is not None and not generation.sampling.is_greedy:
                sampling = generation.sampling
                noise = gumbel_noise(sampling.seed, generation.num_tokens + depth, self._num_ids)
                noise = torch.tensor(noise, dtype=torch.float32, device=logits.device)
                noise = noise if self.model.has_full_head else noise[self.model.head_ids]
                logits[row] = logits[row] / sampling.temperature + noise
        best, columns = logits.topk(min(count, logits.shape[-1]), dim=-1)
        scores = best - logits.logsumexp(-1, keepdim=True)
        ids = columns if self.model.has_full_head else self.model.head_ids[columns]
        return scores.tolist(), ids.tolist()

    def _read_missed(self, generation: Generation) -> float:
        """Read the prompt, and an answer up to what `_catch_up` reads; the seconds of it."""
        state = self._states[generation.id]
        if state.num_read and generation.num_tokens - state.num_read <= _CATCH_UP:
            return 0.0
        started = time.perf_counter()
        if state.num_read == 0:
            self._read_prompt(generation)
        while (missed := generation.num_tokens - state.num_read) > _CATCH_UP:
            self._read_answer([generation], [min(missed - _CATCH_UP, self.chunk)])
        if self.device.type == "cuda":  # queued there is not read
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def _read_prompt(self, generation: Generation) -> None:
        state, ids = self._states[generation.id], generation.prompt
        features = state.take(0, len(ids))
        compressed = self._compress(generation, features[-1])
        embeddings = self.target.embed_prompt(ids, None)
        entries = prompt_entries(self.model, ids, embeddings, features, None if compressed is None else compressed.tokens)
        for start in range(0, len(entries.inputs), self.chunk):
            part = entries.inputs[start : start + self.chunk]
            count = len(part)
            rows = self.cache.rows([generation.slot], count)
            mask = causal_mask(count, rows.num_keys, self.device)
            self.model.decoder(part[None], mask, entries.positions[None, start : start + count], rows)
            self.cache.commit(generation.slot, range(count))
        state.num_read = len(ids)
        state.forget(len(ids) - 1)

    def _compress(self, generation: Generation, question: Tensor) -> Compressed | None:
        """The request's images as the draft sees them; None if one is no longer in the cache: then it drafts on text alone."""
        found = [self._states[generation.id].images.peek(key) for key in generation.image_keys]
        if not found or any(features is None for features in found):
            return None
        images = self.target.place_images(torch.stack(found))
        seeds = [int(key[:15], 16) for key in generation.image_keys]
        compressed = self.model.compress(images, question.expand(len(images), -1), seeds, branch=self.branch)
        for branch, tokens in zip(compressed.chosen, compressed.tokens, strict=True):
            self.branches[branch] = self.branches.get(branch, 0) + 1
            self.visual_tokens[0] += images.shape[1]
            self.visual_tokens[1] += len(tokens)
        return compressed

    def _catch_up(self, generations: Sequence[Generation]) -> Tensor:
        """Read the last tokens, at least one each; the estimated feature [R, width] after the last."""
        counts = [generation.num_tokens - self._states[generation.id].num_read for generation in generations]
        hidden = self._read_answer(generations, counts)
        return hidden[torch.arange(len(counts)), torch.tensor(counts) - 1]

    def _read_answer(self, generations: Sequence[Generation], counts: Sequence[int]) -> Tensor:
        """Read the next counts[r] tokens of each answer in one pass; estimated features [R, max(counts), width] after them."""
        longest, slots = max(counts), [generation.slot for generation in generations]
        tokens = torch.zeros(len(generations), longest, dtype=torch.int64)
        positions = torch.zeros_like(tokens)
        blocks = torch.eye(longest, dtype=torch.bool).repeat(len(generations), 1, 1)
        features = []
        for row, (generation, count) in enumerate(zip(generations, counts, strict=True)):
            state, prompt = self._states[generation.id], len(generation.prompt)
            first, stop = state.num_read, state.num_read + count
            tokens[row, :count] = torch.tensor(generation.answer[first - prompt : stop - prompt])
            positions[row, :count] = torch.arange(first, stop)
            blocks[row, :count, :count] = causal_mask(count, count)
            known = state.take(first - 1, stop - 1)
            features.append(torch.cat([known, known.new_zeros(longest - count, known.shape[1])]))
            state.forget(stop - 1)
            state.num_read = stop
        starts = [self.cache.lengths[slot] for slot in slots]
        inputs = self.model.enter(self.target.embed_text(tokens.to(self.device)), torch.stack(features))
        rows = self.cache.rows(slots, longest)
        hidden = self.model.decoder(inputs, ragged_mask(starts, blocks).to(self.device), positions.to(self.device), rows)
        for slot, count in zip(slots, counts, strict=True):
            self.cache.commit(slot, range(count))
        return hidden


class _Growth:
    """The trees of one proposal while they grow; the draft's keys of drafted nodes stand behind each slot's length."""

    def __init__(
        self,
        drafter: EagleDrafter,
        generations: Sequence[Generation],
        limits: Sequence[DraftLimits],
        builders: list[TreeBuilder],
    ) -> None:
        self.drafter, self.generations, self.limits, self.builders = drafter, generations, limits, builders
        self.starts = [drafter.cache.lengths[generation.slot] for generation in generations]
        self.frontiers: list[list[int]] = []  # candidates to go on from, per request
        self.parents: Tensor | None = None  # their parents' estimated features [R, W, width]
        # Of each request: candidate -> keys, behind the slot's length, of its path, itself included.
        self.ancestors: list[dict[int, list[int]]] = [{0: []} for _ in generations]
        self.num_keys = 0  # behind each slot's length
        self.levels = [0] * len(builders)  # of children so far, per request

    def children(self, nodes: list[list[int]], hidden: Tensor) -> None:
        """Continue `nodes` (per request) by what follows from their estimated features [R, W, width]; pick the next frontier."""
        drafter, depth = self.drafter, max(self.levels)
        widest = max(limit.width for limit in self.limits)
        scores, ids = drafter._ranked(hidden, self.generations, depth, widest)
        frontiers, parents = [], []
        self.levels = [count + (len(of_request) > 0) for count, of_request in zip(self.levels, nodes, strict=True)]
        for row, (builder, limit) in enumerate(zip(self.builders, self.limits, strict=True)):
            added: list[int] = []
            origin: dict[int, int] = {}
            for place, node in enumerate(nodes[row]):
                for child in builder.add(node, ids[row][place][: limit.width], scores[row][place][: limit.width]):
                    added.append(child)
                    origin[child] = place
            is_deepest = depth + 1 >= limit.max_depth
            frontier = [] if is_deepest else builder.likeliest(added, limit.width, limit.expand_score)
            frontiers.append(frontier)
            parents.append([origin[node] for node in frontier])
        self.frontiers = frontiers
        width = max(map(len, frontiers))
        if width:
            index = torch.tensor([row + [0] * (width - len(row)) for row in parents], device=hidden.device)
            self.parents = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def level(self, depth: int) -> bool:
        """Run the frontier, nodes `depth` places after the root, and add its children; False if there is none (or no room)."""
        width = max(map(len, self.frontiers))
        drafter = self.drafter
        if width == 0 or max(self.starts) + self.num_keys + width > drafter.cache.capacity:
            return False
        tokens, blocks = [], torch.zeros(len(self.builders), width, self.num_keys + width, dtype=torch.bool)
        for row, (builder, frontier) in enumerate(zip(self.builders, self.frontiers, strict=True)):
            tokens.append([builder.tokens[node] for node in frontier] + [0] * (width - len(frontier)))
            for place, node in enumerate(frontier):
                key = self.num_keys + place
                path = [*self.ancestors[row][builder.parents[node]], key]
                self.ancestors[row][node] = path
                blocks[row, place, path] = True
            for place in range(len(frontier), width):
                blocks[row, place, self.num_keys + place] = True
        embeddings = drafter.target.embed_text(torch.tensor(tokens, device=drafter.device))
        positions = torch.tensor([generation.num_tokens - 1 + depth for generation in self.generations], device=drafter.device)
        slots = [generation.slot for generation in self.generations]
        rows = drafter.cache.rows(slots, width, [start + self.num_keys for start in self.starts])
        mask = ragged_mask(self.starts, blocks).to(drafter.device)
        inputs = drafter.model.enter(embeddings, self.parents)
        hidden = drafter.model.decoder(inputs, mask, positions[:, None].expand(-1, width), rows)
        self.num_keys += width
        self.children(self.frontiers, hidden)
        return True
