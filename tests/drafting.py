"""Drafters that only tests and benchmarks need: the target itself, a malicious one, and two that change their minds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from serve.drafters import Drafter, DraftLimits, Proposal, Stateless
from serve.eagle_drafter import EagleDrafter
from serve.generation import Generation
from serve.image_cache import ImageCache
from serve.target import Target
from serve.tree import DraftTree, TreeBuilder, chain
from tests.tiny_vlm import naive


class SelfDrafter(Stateless):
    """The target drafts for itself, by the slow truth: everything must be accepted."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        said = len(generation.answer)
        asked = replace(generation.request, max_tokens=said + limits.max_depth, ignore_eos=True, stop_ids=())
        ahead = naive(self.target, asked)[said:]
        return chain(generation.tokens[-1], ahead, [0.0] * len(ahead))


class AdversarialDrafter(Stateless):
    """Knows the answer and hides it: right tokens beside twins and wrong ones, all with probability 1, wrong at a chosen depth.
    """

    def __init__(self, answer_of: Callable[[Generation], Sequence[int]], vocab_size: int) -> None:
        self._answer_of, self.vocab_size = answer_of, vocab_size

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        ahead = list(self._answer_of(generation)[len(generation.answer) :])
        lie = generation.num_tokens % (limits.max_depth + 1)
        builder, node = TreeBuilder(generation.tokens[-1]), 0
        for depth in range(limits.max_depth):
            right = ahead[depth] if depth < len(ahead) else 0
            wrong = (right + 1) % self.vocab_size
            tokens = [wrong, wrong] if depth == lie else [wrong, right, right, wrong]
            children = builder.add(node, tokens, [0.0] * len(tokens))
            builder.add(children[0], [right, wrong], [0.0, 0.0])  # the right token under the wrong parent
            node = children[-1 if depth == lie else 1]
        return builder.build(limits.max_nodes)


class Fickle:
    """Another drafter for every round, at random; each is told of everything."""

    def __init__(self, drafters: Sequence[Drafter], seed: int = 0) -> None:
        self.drafters, self._random = drafters, np.random.default_rng(seed)
        self.needs_features = any(drafter.needs_features for drafter in drafters)

    def begin(self, generation: Generation, images: ImageCache) -> None:
        for drafter in self.drafters:
            drafter.begin(generation, images)

    def observe(self, generation: Generation, start: int, features) -> None:
        for drafter in self.drafters:
            if drafter.needs_features:
                drafter.observe(generation, start, features)

    def propose(self, generations: Sequence[Generation], limits: Sequence[DraftLimits]) -> Proposal:
        return self.drafters[self._random.integers(len(self.drafters))].propose(generations, limits)

    def end(self, generation: Generation) -> None:
        for drafter in self.drafters:
            drafter.end(generation)


class SwappedCompressor(EagleDrafter):
    """Every round another branch of its compressor, or another random gate."""

    def propose(self, generations: Sequence[Generation], limits: Sequence[DraftLimits]) -> Proposal:
        compressor, random = self.model.compressor, np.random.default_rng([g.num_tokens for g in generations])
        self.branch = [None, *compressor.branches][random.integers(len(compressor.branches) + 1)]
        for weight in compressor.gate.parameters():
            weight.data = torch.as_tensor(random.normal(size=weight.shape)).to(weight)
        return super().propose(generations, limits)
