"""Laws of draft trees: closed under ancestors whatever ties there are, the likeliest nodes, masks and positions that follow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multimodal.attention import tree_mask
from serve.tree import DraftTree, TreeBuilder, chain, root_only


def grow(seed: int, width: int, depth: int, certain: float, step: float) -> TreeBuilder:
    """EAGLE's growth on a drafter whose log-probabilities are multiples of `step`, a share of them exactly 0."""
    random = np.random.default_rng(seed)
    builder, frontier = TreeBuilder(1), [0]
    for _ in range(depth):
        added = []
        for node in frontier:
            scores = -step * random.integers(0, 4, width)
            scores[random.random(width) < certain] = 0.0
            added += builder.add(node, random.choice(100, width, replace=False), scores)
        frontier = builder.likeliest(added, width)
    return builder


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 10), st.integers(1, 7), st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.5]),
    st.integers(0, 80),
)  # fmt: skip
def test_a_tree_is_closed_under_ancestors_under_any_ties(seed, width, depth, certain, step, budget):
    builder = grow(seed, width, depth, certain, step)
    tree = builder.build(budget)  # asserts closure itself
    assert tree.num_drafted == min(budget, len(builder.tokens) - 1)
    for node, parent in enumerate(tree.parents[1:], 1):
        assert parent < node and tree.depths[node] == tree.depths[parent] + 1
        assert tree.scores[node] <= tree.scores[parent]
    seen = [sorted(np.flatnonzero(row)) for row in tree_mask(tree.parents).numpy()]
    assert seen == [sorted(tree.path(node)) for node in range(len(tree.tokens))]
    assert tree.best(budget // 2).num_drafted == min(budget // 2, tree.num_drafted)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_tree_holds_the_likeliest_candidates(seed, budget):
    builder = grow(seed, 4, 4, 0.2, 0.5)
    kept = sorted(builder.build(budget).scores, reverse=True)
    assert kept == sorted((float(score) for score in builder.scores), reverse=True)[: len(kept)]


def test_impossible_and_unlikely_nodes_are_left_out():
    builder = TreeBuilder(5)
    children = builder.add(0, [1, 2, 3, 4], [-0.1, float("nan"), -float("inf"), -3.0])
    builder.add(children[1], [9], [0.0])  # under an impossible one
    assert builder.build(10).tokens == (5, 1, 4)
    assert builder.build(10, least_score=-1.0).tokens == (5, 1)
    assert builder.likeliest(children, 4) == [children[0], children[3]]
    assert builder.add(0, [8], [0.3]) and builder.scores[-1] == 0  # no probability above 1


def test_a_chain_and_a_root_are_trees():
    tree = chain(7, [3, 4], [-0.5, -0.25])
    assert tree.parents == (-1, 0, 1) and tree.depths == (0, 1, 2) and tree.scores[2] == -0.75
    assert root_only(7) == DraftTree((7,), (-1,), (0.0,)) == tree.best(0)


@pytest.mark.parametrize("parents", [(0, 0), (-1, 1), (-1, 0, 3), (-1,)])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError):
        DraftTree((1, 2, 3)[: max(2, len(parents))], parents, (0.0,) * max(2, len(parents)))
