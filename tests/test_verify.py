"""Acceptance is lossless: by exact enumeration on tiny vocabularies, against sequential rejection, and in every corner."""

from fractions import Fraction
from itertools import product
from math import prod

import numpy as np
import pytest

from serve.tree import DraftTree, chain, root_only
from serve.verify import accept, accept_by_rejection, accept_greedy

TREES = {
    "root": root_only(0),
    "chain": chain(0, [2, 1], [-0.1, -0.1]),
    "siblings": DraftTree((0, 1, 2), (-1, 0, 0), (0.0,) * 3),
    "bushy": DraftTree((0, 1, 0, 2, 1), (-1, 0, 0, 1, 1), (0.0,) * 5),
    "twins": DraftTree((0, 1, 1, 0), (-1, 0, 0, 2), (0.0,) * 4),
}


def laws(tree: DraftTree, seed: int) -> list[list[Fraction]]:
    """A rational law over three tokens after each node; some probabilities are 0."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, 5, (len(tree.tokens), 3)) + np.eye(3, dtype=int)[random.integers(0, 3, len(tree.tokens))]
    return [[Fraction(int(count), int(row.sum())) for count in row] for row in counts]


def emitted_laws(tree: DraftTree, law: list[list[Fraction]]) -> dict[tuple[int, ...], Fraction]:
    """What the target says up to the first token that the tree lacks: the definition."""
    result: dict[tuple[int, ...], Fraction] = {}

    def walk(node: int, said: tuple[int, ...], weight: Fraction) -> None:
        for token, share in enumerate(law[node]):
            child = tree.children[node].get(token)
            if child is None:
                result[(*said, token)] = weight * share
            else:
                walk(child, (*said, token), weight * share)

    walk(0, (), Fraction(1))
    return {said: weight for said, weight in result.items() if weight}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_emitted_tokens_have_the_targets_law_exactly(name, seed):
    tree = TREES[name]
    law = laws(tree, seed)
    totals: dict[tuple[int, ...], Fraction] = {}
    for choices in product(range(3), repeat=len(tree.tokens)):  # what the target would say after each node
        weight = prod((law[node][token] for node, token in enumerate(choices)), start=Fraction(1))
        acceptance = accept(tree, lambda node, said, choices=choices: choices[node])
        totals[acceptance.tokens] = totals.get(acceptance.tokens, Fraction(0)) + weight
    assert {said: weight for said, weight in totals.items() if weight} == emitted_laws(tree, law)


@pytest.mark.parametrize("name", TREES)
def test_rejection_over_siblings_has_the_same_law(name):
    tree = TREES[name]
    law = laws(tree, 1)
    probs = np.array([[float(share) for share in row] for row in law])
    random = np.random.default_rng(0)
    said = [accept_by_rejection(tree, probs, random.random).tokens for _ in range(8000)]
    expected = emitted_laws(tree, law)
    assert set(said) <= set(expected)
    for tokens, weight in expected.items():
        share, spread = said.count(tokens) / len(said), (float(weight * (1 - weight)) / len(said)) ** 0.5
        assert abs(share - weight) <= 4.5 * spread


def test_the_walk_hands_each_node_the_tokens_before_it():
    seen = []
    tree = TREES["bushy"]
    accept(tree, lambda node, said: seen.append((node, said)) or (1, 2, 0)[len(said)])
    assert seen == [(0, ()), (1, (1,)), (3, (1, 2))]


def test_greedy_acceptance_counts():
    tree = chain(0, [4, 5, 6], [0.0] * 3)
    assert accept_greedy(tree, [4, 5, 6, 7]).tokens == (4, 5, 6, 7)
    half = accept_greedy(tree, [4, 9, 6, 7])
    assert half.tokens == (4, 9) and half.path == (0, 1) and half.num_accepted == 1
    assert accept_greedy(root_only(3), [8]).tokens == (8,)


@pytest.mark.parametrize("probs", [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_an_impossible_token_is_never_accepted(probs, draw):
    tree = DraftTree((0, 0, 2), (-1, 0, 0), (0.0,) * 3)
    tokens = accept_by_rejection(tree, np.array([probs] * 3), lambda: draw).tokens
    assert all(probs[token] > 0 for token in tokens)
