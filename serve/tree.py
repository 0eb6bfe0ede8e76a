"""Draft trees: grown level by level, cut to the likeliest nodes, always closed under ancestors. numpy and lists, no model.

A node's score is the cumulative log-probability that the drafter gives its path (EAGLE-2, arXiv 2406.16858): the estimate of
the probability that the target will walk through it. Scores are float32 sums of terms <= 0, so a child never outscores its
parent, and a stable sort lets the parent, which stands earlier, win ties. A kept node's ancestors are therefore kept; published
code sorts by top-k, whose order among equals is arbitrary, and loses parents as soon as a probability rounds to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class DraftTree:
    """tokens[0] is the root, the last committed token; node i continues node parents[i] < i."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]  # parents[0] = -1
    scores: tuple[float, ...]  # cumulative log-probability, scores[0] = 0

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.parents) == len(self.scores) >= 1 or self.parents[0] != -1:
            raise ValueError(f"A tree is a root and its nodes; got {len(self.tokens)} tokens and parents {self.parents}.")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node:
                raise ValueError(f"parents[{node}] is {parent}; a parent precedes its child and 0 is the root.")

    @property
    def num_drafted(self) -> int:
        return len(self.tokens) - 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """0 for the root; a node's position is that of the root plus its depth."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """Of each node: token -> child. Of twins the first counts."""
        children: tuple[dict[int, int], ...] = tuple({} for _ in self.tokens)
        for node, parent in enumerate(self.parents[1:], 1):
            children[parent].setdefault(self.tokens[node], node)
        return children

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to `node`, both included."""
        nodes = [node]
        while nodes[-1] != 0:
            nodes.append(self.parents[nodes[-1]])
        return tuple(reversed(nodes))

    def best(self, num_drafted: int) -> "DraftTree":
        """The tree of the `num_drafted` likeliest drafted nodes."""
        if num_drafted >= self.num_drafted:
            return self
        return _subtree(self, select(np.array(self.scores, dtype=np.float32), self.parents, num_drafted + 1))


def root_only(token: int) -> DraftTree:
    """Nothing drafted: plain decoding."""
    return DraftTree((token,), (-1,), (0.0,))


def chain(root: int, tokens: Sequence[int], log_probs: Sequence[float]) -> DraftTree:
    """One guess: `tokens` after the root, each with its log-probability given those before it."""
    builder = TreeBuilder(root)
    parent = 0
    for token, log_prob in zip(tokens, log_probs, strict=True):
        (parent,) = builder.add(parent, [token], [log_prob])
    return builder.build(len(tokens))


class TreeBuilder:
    """Candidates of a tree while it grows; `build` keeps the likeliest."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents = [root], [-1]
        self.scores = [np.float32(0.0)]

    def add(self, parent: int, tokens: Sequence[int], log_probs: Sequence[float]) -> list[int]:
        """Children of a candidate; their candidate numbers. A log-probability above 0 counts as 0, NaN as impossible."""
        first = len(self.tokens)
        for token, log_prob in zip(tokens, log_probs, strict=True):
            term = np.float32(min(0.0, log_prob)) if log_prob == log_prob else np.float32(-np.inf)
            self.tokens.append(int(token))
            self.parents.append(parent)
            self.scores.append(self.scores[parent] + term)
        return list(range(first, len(self.tokens)))

    def likeliest(self, candidates: Sequence[int], count: int, least_score: float = -np.inf) -> list[int]:
        """The `count` best of some candidates, in the order of their numbers; those below `least_score` left out."""
        ranked = sorted(candidates, key=lambda node: -self.scores[node])  # stable
        return sorted(node for node in ranked[:count] if self.scores[node] >= least_score and self.scores[node] > -np.inf)

    def build(self, num_drafted: int, least_score: float = -np.inf) -> DraftTree:
        """The tree of at most `num_drafted` likeliest candidates whose score is at least `least_score`."""
        scores = np.array(self.scores, dtype=np.float32)
        whole = DraftTree(tuple(self.tokens), tuple(self.parents), tuple(float(score) for score in scores))
        return _subtree(whole, select(scores, self.parents, num_drafted + 1, least_score))


def select(scores: np.ndarray, parents: Sequence[int], count: int, least_score: float = -np.inf) -> list[int]:
    """Numbers, ascending, of the `count` best candidates, root included; float32 scores, stable in the candidate's number."""
    order = np.argsort(-scores, kind="stable")[:count]
    possible = scores[order] > -np.inf
    kept = sorted(int(node) for node in order[possible & (scores[order] >= min(least_score, 0.0))])
    members = set(kept)
    assert 0 in members and all(parents[node] in members for node in kept[1:]), "a draft tree lost an ancestor"
    return kept


def _subtree(tree: DraftTree, kept: Sequence[int]) -> DraftTree:
    place = {node: index for index, node in enumerate(kept)}
    return DraftTree(
        tuple(tree.tokens[node] for node in kept),
        tuple(place.get(tree.parents[node], -1) for node in kept),
        tuple(tree.scores[node] for node in kept),
    )
