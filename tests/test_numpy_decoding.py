"""The numpy decoding loop gives the tokens of the torch one: every rule, order, temperature, seed and known slot."""

import itertools

import numpy as np
import pytest
import torch

from vla import decoding, numpy_decoding
from vla.unmasking import REMASK_RULES, DecodeConfig, RowNoise

BATCH, NUM_SLOTS, VOCAB = 5, 14, 9
MASK = VOCAB
SETTINGS = [
    {"rounds": rounds, "threshold": threshold, "token_temperature": token, "order_temperature": order, "confidence_radius": radius}
    for rounds, threshold, (token, order, radius) in itertools.product(
        (1, 2, 6, 20), (0.5, 0.9, 2.0), ((0.0, 0.0, 0), (0.0, 0.0, 2), (0.8, 0.0, 1), (0.0, 1.5, 0), (1.0, 1.0, 0))
    )
]


def random_logits(seed: int, sharpness: float):
    """Logits that depend on the row and on every token of the row: float32 [R, L, V], some ids not allowed."""
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(NUM_SLOTS, VOCAB + 1, NUM_SLOTS * VOCAB))
    bias = generator.normal(size=(BATCH, NUM_SLOTS * VOCAB))
    allowed = generator.random((NUM_SLOTS, VOCAB)) < 0.8
    allowed[:, 0] = True

    def logits_of(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        mixed = weight[np.arange(NUM_SLOTS), tokens].sum(1) / 3 + bias[rows]
        logits = (sharpness * mixed).reshape(-1, NUM_SLOTS, VOCAB)
        return np.where(allowed, logits, -np.inf).astype(np.float32)

    return logits_of


def both(logits_of, known: np.ndarray, is_known: np.ndarray, config: DecodeConfig, seeds: list[int], is_ordinal: np.ndarray):
    def torch_logits_of(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(logits_of(tokens.numpy(), rows.numpy()))

    there = decoding.decode(
        torch_logits_of, torch.from_numpy(known), torch.from_numpy(is_known), MASK, config, seeds, torch.from_numpy(is_ordinal)
    )
    return there, numpy_decoding.decode(logits_of, known, is_known, MASK, config, seeds, is_ordinal)


def assert_equal(there: decoding.Decoded, here: numpy_decoding.Decoded) -> None:
    np.testing.assert_array_equal(here.tokens, there.tokens.numpy())
    np.testing.assert_array_equal(here.rounds, there.rounds.numpy())
    np.testing.assert_allclose(here.confidence, there.confidence.numpy(), atol=1e-6)
    np.testing.assert_allclose(here.probs, there.probs.numpy(), atol=1e-6)
    for mine, theirs in ((here.tokens, there.tokens), (here.probs, there.probs), (here.confidence, there.confidence)):
        assert mine.dtype == theirs.numpy().dtype


@pytest.mark.parametrize("remask", REMASK_RULES)
def test_random_logits_give_the_tokens_of_torch(remask: str):
    """Fresh rows, rows with a known beginning, scattered known slots, and a row that is known altogether."""
    known = np.random.default_rng(9).integers(0, VOCAB, (BATCH, NUM_SLOTS))
    is_known = np.zeros((BATCH, NUM_SLOTS), dtype=bool)
    is_known[1, :5], is_known[2, ::2], is_known[3] = True, True, True
    is_ordinal = np.arange(NUM_SLOTS) % 3 != 0
    for number, changes in enumerate(SETTINGS):
        for sharpness in (0.3, 3.0):
            seeds = [number, 7 * number + 1, 2**63 + number, 0, -number - 1]
            config = DecodeConfig(remask=remask, **changes)
            assert_equal(*both(random_logits(number, sharpness), known, is_known, config, seeds, is_ordinal))


def test_chunks_that_are_known_altogether_are_returned():
    known = np.random.default_rng(0).integers(0, VOCAB, (2, NUM_SLOTS))
    is_known = np.ones_like(known, dtype=bool)
    there, here = both(random_logits(0, 1.0), known, is_known, DecodeConfig(), [0, 0], np.ones(NUM_SLOTS, dtype=bool))
    assert_equal(there, here)
    assert here.probs.shape == (2, NUM_SLOTS, VOCAB) and np.array_equal(here.tokens, known)


def test_equal_logits_are_decided_alike():
    """Ties: the lowest id, the first slot; saturated probabilities are ties too."""

    def flat(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        logits = np.zeros((len(rows), NUM_SLOTS, VOCAB), dtype=np.float32)
        logits[:, ::2, 3] = 200.0
        return logits

    nothing = np.zeros((2, NUM_SLOTS), dtype=np.int64)
    for remask in REMASK_RULES:
        config = DecodeConfig(rounds=5, threshold=2.0, remask=remask)
        assert_equal(*both(flat, nothing, nothing > 0, config, [0, 1], np.ones(NUM_SLOTS, dtype=bool)))


def test_a_token_too_unlikely_for_its_neighbourhoods_sum_is_committed_all_the_same():
    """Ids of probability 1e-8, sampled hot: their mass within a radius is the difference of two sums near 1, so exactly 0."""

    def peaked(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        logits = np.full((len(rows), NUM_SLOTS, VOCAB), -18.0, dtype=np.float32)
        logits[:, :, 0] = 0.0
        return logits

    nothing = np.zeros((20, NUM_SLOTS), dtype=np.int64)
    config = DecodeConfig(rounds=2, token_temperature=6.0, confidence_radius=1)
    there, here = both(peaked, nothing, nothing > 0, config, list(range(20)), np.ones(NUM_SLOTS, dtype=bool))
    assert_equal(there, here)
    assert (here.tokens > 1).any() and (here.tokens != MASK).all()


def test_a_rows_noise_depends_on_its_seed_alone():
    together, alone = RowNoise([3, 4]), RowNoise([4])
    together.uniform([0, 1], 2)
    np.testing.assert_array_equal(together.uniform([1], 5)[0], np.append(alone.uniform([0], 2), alone.uniform([0], 5))[2:])
    assert not np.array_equal(RowNoise([0]).normal([0], 8), RowNoise([1]).normal([0], 8))
    gumbel = RowNoise([0]).gumbel([0], 40_000)
    assert abs(gumbel.mean() - np.euler_gamma) < 0.03 and abs(gumbel.var() - np.pi**2 / 6) < 0.05
