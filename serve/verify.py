"""Lossless acceptance: which drafted tokens the target would have said itself. Pure functions of a tree and of choices.

The target's token at a node is a function of its logits there and of the noise of that position (multimodal.sampling).
Acceptance walks from the root: the token chosen at a node is emitted; if a child of the node holds it, the walk goes on there.
What is emitted is what plain decoding emits, token for token, at any temperature, whatever the tree. At temperature > 0 and for
a tree drawn without knowledge of that noise, the chance to find the chosen token among the children is the target's mass on
them, exactly what sequential rejection (`accept_by_rejection`, the published rule for trees of point-mass drafts) attains. The
trained draft shares the noise (serve/eagle_drafter.py): this does not hold for its trees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serve.tree import DraftTree


@dataclass(frozen=True)
class Acceptance:
    """Nodes whose positions become part of the sequence, and the tokens that follow the root."""

    path: tuple[int, ...]  # root first
    tokens: tuple[int, ...]  # accepted drafts, then the target's own: as many as the path has nodes

    @property
    def num_accepted(self) -> int:
        return len(self.path) - 1


def accept(tree: DraftTree, choose_at: Callable[[int, tuple[int, ...]], int]) -> Acceptance:
    """Walk the tree. choose_at(node, said): the target's token after `node`, where `said` are the tokens after the root so far.
    """
    path, tokens = [0], []
    while True:
        token = choose_at(path[-1], tuple(tokens))
        tokens.append(token)
        child = tree.children[path[-1]].get(token)
        if child is None:
            return Acceptance(tuple(path), tuple(tokens))
        path.append(child)


def accept_greedy(tree: DraftTree, best: Sequence[int]) -> Acceptance:
    """`accept` where the target's token after each node is known: best[node] = argmax of its logits."""
    return accept(tree, lambda node, said: best[node])


def accept_by_rejection(tree: DraftTree, probs: np.ndarray, uniforms: Callable[[], float]) -> Acceptance:
    """Sequential rejection over siblings (Leviathan et al. 2023; trees: SpecInfer, EAGLE), the definition others use.

    probs [nodes, V]: the target's law after each node; uniforms() draws from [0, 1). Each child in turn is accepted with its
    residual probability (strictly below: a probability of 0 is never accepted) or struck out; if none is left the residual is
    drawn from. The engine does not use it: the same law costs more random numbers and ties the sample to the tree.
    """
    path, tokens = [0], []
    while True:
        residual = np.asarray(probs[path[-1]]).copy()
        for token, child in tree.children[path[-1]].items():
            if uniforms() * residual.sum() < residual[token]:
                path.append(child)
                tokens.append(token)
                break
            residual[token] = 0
        else:
            if residual.sum() <= 0:  # only rounding can strike out everything
                residual = np.asarray(probs[path[-1]]).copy()
            bound = np.cumsum(residual)
            tokens.append(int(np.searchsorted(bound, uniforms() * bound[-1], side="right")))
            return Acceptance(tuple(path), tuple(tokens))
