"""Who guesses the next tokens: one protocol, and the drafters that need no weights.

A drafter can only be slow or wrong, never change an answer: what it proposes is verified.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from serve.generation import Generation
from serve.image_cache import ImageCache
from serve.tree import DraftTree, TreeBuilder, chain


@dataclass(frozen=True)
class DraftLimits:
    """How much may be drafted for one request in one round. The published tree is 59 nodes, depth 8, width 10."""

    max_nodes: int = 8  # drafted tokens
    max_depth: int = 5  # of a path
    width: int = 4  # children of a node, and nodes that a level goes on from
    least_score: float = -float("inf")  # log of the path probability below which a node is not worth verifying
    expand_score: float = -float("inf")  # and below which it is not worth going on from

    @property
    def allow_any(self) -> bool:
        return min(self.max_nodes, self.max_depth, self.width) > 0

    def capped(self, max_nodes: int, max_depth: int) -> "DraftLimits":
        return replace(self, max_nodes=min(self.max_nodes, max_nodes), max_depth=min(self.max_depth, max_depth))


@dataclass(frozen=True)
class Proposal:
    """What some requests' drafting gave and cost, request by request."""

    trees: list[DraftTree]  # rooted at each request's last token
    levels: list[int]  # that ran for it, whatever the tree keeps of them; 0: there was nothing to begin with
    read_seconds: float = 0.0  # reading prompts and answers missed while paused: paid once, by no round in particular


class Drafter(Protocol):
    """`begin` and `end` frame a request; `observe` follows each of the target's passes; `propose` guesses."""

    needs_features: bool  # whether `observe` wants the target's hidden states

    def begin(self, generation: Generation, images: ImageCache) -> None: ...

    def observe(self, generation: Generation, start: int, features: Any) -> None:
        """Hidden states [n, hidden_size] of positions start .. start + n - 1.

        Their tokens, and by the next `propose` their successors, are in generation.tokens.
        """

    def propose(self, generations: Sequence[Generation], limits: Sequence[DraftLimits]) -> Proposal: ...

    def end(self, generation: Generation) -> None: ...


class Stateless:
    """A drafter that only reads the tokens so far."""

    needs_features = False

    def begin(self, generation: Generation, images: ImageCache) -> None:
        pass

    def observe(self, generation: Generation, start: int, features: Any) -> None:
        pass

    def end(self, generation: Generation) -> None:
        pass

    def propose(self, generations: Sequence[Generation], limits: Sequence[DraftLimits]) -> Proposal:
        trees = [self.tree(generation, limit) for generation, limit in zip(generations, limits, strict=True)]
        return Proposal(trees, [int(tree.num_drafted > 0) for tree in trees])

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        raise NotImplementedError


class NgramDrafter(Stateless):
    """What followed the last n tokens when they stood in the prompt or answer before (prompt lookup decoding).

    Up to `width` continuations of the longest repeated suffix, the most recent first, share a tree.
    """

    def __init__(self, longest: int = 4, shortest: int = 1, confidence: float = 0.7) -> None:
        self.longest, self.shortest = longest, shortest
        self.confidence = confidence  # assumed chance that one more token of the most recent match is right

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        tokens = generation.tokens
        builder = TreeBuilder(tokens[-1])
        known: dict[tuple[int, ...], int] = {(): 0}
        for rank, start in enumerate(self._matches(tokens, limits.width)):
            path: tuple[int, ...] = ()
            for depth, token in enumerate(tokens[start : start + limits.max_depth]):
                if token < 0:  # an image position
                    break
                parent, path = known[path], (*path, token)
                if path not in known:
                    share = self.confidence if rank == 0 or depth > 0 else self.confidence * 0.5**rank
                    (known[path],) = builder.add(parent, [token], [float(np.log(share))])
        return builder.build(limits.max_nodes, limits.least_score)

    def _matches(self, tokens: Sequence[int], count: int) -> list[int]:
        """Positions after earlier occurrences of the longest suffix that has any, latest first."""
        row = np.asarray(tokens)
        for size in range(min(self.longest, len(row) - 1), self.shortest - 1, -1):
            suffix = row[-size:]
            if (suffix < 0).any():
                continue
            windows = np.lib.stride_tricks.sliding_window_view(row[:-1], size)
            places = np.flatnonzero((windows == suffix).all(1))
            if len(places):
                return [int(place) + size for place in places[::-1][:count]]
        return []


class OracleDrafter(Stateless):
    """Knows the answers: the ceiling of any drafter, in tests and benchmarks. answer_of(generation): all of its tokens."""

    def __init__(self, answer_of: Callable[[Generation], Sequence[int]]) -> None:
        self._answer_of = answer_of

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        said = len(generation.answer)
        ahead = self._answer_of(generation)[said : said + min(limits.max_depth, limits.max_nodes)]
        return chain(generation.last_token, ahead, [0.0] * len(ahead))


class RandomDrafter(Stateless):
    """Trees of random tokens: the floor of any drafter. The same request and place give the same tree."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size, self.seed = vocab_size, seed

    def tree(self, generation: Generation, limits: DraftLimits) -> DraftTree:
        random = np.random.default_rng([self.seed, generation.num_tokens])
        builder = TreeBuilder(generation.last_token)
        frontier = [0]
        for _ in range(limits.max_depth):
            width = min(limits.width, self.vocab_size)
            added = []
            for node in frontier:
                scores = np.log(random.dirichlet(np.ones(width)))
                added += builder.add(node, random.choice(self.vocab_size, width, replace=False), scores)
            frontier = builder.likeliest(added, limits.width, limits.expand_score)
        return builder.build(limits.max_nodes, limits.least_score)

