"""Many sequences in one buffer: each row of a ragged pass equals the same sequence alone; commits equal a fresh pass."""

import pytest
import torch

from multimodal.attention import causal_mask, ragged_mask
from multimodal.config import DecoderConfig
from multimodal.decoder import Decoder
from multimodal.slot_cache import SlotCache
from serve.runner import tree_inputs
from serve.tree import DraftTree

CONFIG = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48)
TREE = DraftTree((0, 0, 0, 0, 0), (-1, 0, 0, 2, 2), (0.0,) * 5)


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).double().eval()


def read(decoder: Decoder, cache: SlotCache, slot: int, x: torch.Tensor) -> torch.Tensor:
    start = cache.lengths[slot]
    positions = torch.arange(start, start + len(x))[None]
    hidden = decoder(x[None], causal_mask(len(x), start + len(x)), positions, cache.rows([slot], len(x)))
    cache.commit(slot, range(len(x)))
    return hidden[0]


def alone(decoder: Decoder, x: torch.Tensor) -> torch.Tensor:
    return decoder(x[None], causal_mask(len(x), len(x)), torch.arange(len(x))[None])[0]


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0), (1,), (0, 3), (3, 2, 1)])
@torch.no_grad()
def test_a_ragged_pass_over_trees_equals_each_path_alone(decoder, slots):
    random = torch.Generator().manual_seed(1)
    cache = SlotCache(CONFIG, 4, 24, torch.float64)
    cache.buffer.fill_(99.0)  # what was never written must not be seen
    prompts = [torch.randn(length, 32, dtype=torch.float64, generator=random) for length in (5, 1, 9, 5)]
    for slot, prompt in enumerate(prompts):
        read(decoder, cache, slot, prompt)
    trees = [TREE if index % 2 == 0 else DraftTree((0, 0), (-1, 0), (0.0, 0.0)) for index in range(len(slots))]
    nodes = torch.randn(len(slots), len(trees[0].tokens), 32, dtype=torch.float64, generator=random)
    inputs = tree_inputs([cache.lengths[slot] for slot in slots], trees, torch.device("cpu"))
    hidden = decoder(nodes, inputs.mask, inputs.positions, cache.rows(list(slots), nodes.shape[1]))
    for row, (slot, tree) in enumerate(zip(slots, trees, strict=True)):
        for node in range(len(tree.tokens)):
            path = list(tree.path(node))
            expected = alone(decoder, torch.cat([prompts[slot], nodes[row, path]]))[-1]
            torch.testing.assert_close(hidden[row, node], expected)


@torch.no_grad()
def test_what_a_commit_keeps_equals_a_fresh_pass(decoder):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(6, 32, dtype=torch.float64, generator=random)
    nodes = torch.randn(5, 32, dtype=torch.float64, generator=random)
    cache = SlotCache(CONFIG, 2, 24, torch.float64)
    read(decoder, cache, 1, x)
    for path in ((0, 2, 4), (0, 1), (0,)):
        inputs = tree_inputs([cache.lengths[1]], [TREE], torch.device("cpu"))
        decoder(nodes[None], inputs.mask, inputs.positions, cache.rows([1], 5))
        cache.commit(1, path)
        x = torch.cat([x, nodes[list(path)]])
        fresh = SlotCache(CONFIG, 1, 24, torch.float64)
        read(decoder, fresh, 0, x)
        assert cache.lengths == [0, len(x)]
        torch.testing.assert_close(cache.buffer[:, :, 1, :, : len(x)], fresh.buffer[:, :, 0, :, : len(x)])


@torch.no_grad()
def test_a_rollback_forgets_the_tail(decoder):
    x = torch.randn(7, 32, dtype=torch.float64)
    cache = SlotCache(CONFIG, 1, 24, torch.float64)
    read(decoder, cache, 0, x)
    cache.rollback(0, 4)
    torch.testing.assert_close(read(decoder, cache, 0, x[4:]), alone(decoder, x)[4:])
    with pytest.raises(ValueError, match="holds 7"):
        cache.rollback(0, 8)
    with pytest.raises(ValueError, match="capacity of 24"):
        cache.rows([0], 18)


def test_a_ragged_mask_is_what_its_name_says():
    blocks = torch.tensor([[[1, 0], [1, 1]], [[1, 0], [0, 1]]]).bool()
    assert ragged_mask([1, 3], blocks)[:, 0].int().tolist() == [
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
    ]
