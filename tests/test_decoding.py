"""Laws of iterative unmasking, on a logits function that is a fixed pure function of the tokens."""

import pytest
import torch

from vla.decoding import DecodeConfig, confidence_of, decode

NUM_SLOTS, VOCAB = 14, 9
MASK = VOCAB
RULES = ["none", "threshold", "residual_drop", "remdm"]


def contextual_logits(batch_seed: int = 0, sharpness: float = 3.0):
    """Logits that depend on the row and on every token of the row, so that order matters."""
    generator = torch.Generator().manual_seed(batch_seed)
    weight = torch.randn(NUM_SLOTS * (VOCAB + 1), NUM_SLOTS * VOCAB, generator=generator, dtype=torch.float64)
    bias = torch.randn(8, NUM_SLOTS * VOCAB, generator=generator, dtype=torch.float64)

    def logits_of(tokens, rows):
        one_hot = torch.nn.functional.one_hot(tokens, VOCAB + 1).flatten(1).double()
        flat = torch.stack([row @ weight for row in one_hot]) / 3 + bias[rows]  # row by row: no batched GEMM rounding
        return (sharpness * flat).view(-1, NUM_SLOTS, VOCAB)

    return logits_of


def fresh(batch: int):
    return torch.zeros(batch, NUM_SLOTS, dtype=torch.long), torch.zeros(batch, NUM_SLOTS, dtype=torch.bool)


@pytest.mark.parametrize("remask", RULES)
@pytest.mark.parametrize("rounds", [1, 2, 5, 12])
def test_everything_is_committed_within_the_rounds(remask, rounds):
    decoded = decode(contextual_logits(), *fresh(6), MASK, DecodeConfig(rounds=rounds, remask=remask, threshold=0.95))
    assert (decoded.tokens < VOCAB).all() and (decoded.tokens >= 0).all()
    assert (decoded.rounds >= 1).all() and (decoded.rounds <= rounds).all()


@pytest.mark.parametrize("remask", RULES)
def test_a_batch_decodes_as_its_rows_do_alone(remask):
    config = DecodeConfig(rounds=6, remask=remask, token_temperature=0.7, order_temperature=1.0, threshold=0.8, confidence_radius=1)
    known, is_known = fresh(6)
    is_known[2, :5] = True
    is_known[4, ::2] = True
    logits_of, seeds = contextual_logits(), [3, 1, 4, 1, 5, 9]
    together = decode(logits_of, known, is_known, MASK, config, seeds)
    for row in range(6):
        alone = decode(
            lambda tokens, rows: logits_of(tokens, rows + row), known[row : row + 1], is_known[row : row + 1], MASK,
            config, seeds[row : row + 1],
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.rounds[0] == together.rounds[row]
        torch.testing.assert_close(alone.probs[0], together.probs[row])


@pytest.mark.parametrize("remask", RULES)
def test_known_tokens_are_never_changed(remask):
    known = torch.randint(0, VOCAB, (6, NUM_SLOTS), generator=torch.Generator().manual_seed(1))
    is_known = torch.rand(6, NUM_SLOTS, generator=torch.Generator().manual_seed(2)) < 0.5
    is_known[0], is_known[1] = True, False
    seen = []
    logits_of = contextual_logits()

    def spy(tokens, rows):
        seen.append(torch.equal(tokens[is_known[rows]], known[rows][is_known[rows]]))
        return logits_of(tokens, rows)

    decoded = decode(spy, known, is_known, MASK, DecodeConfig(rounds=8, remask=remask, threshold=0.7))
    assert torch.equal(decoded.tokens[is_known], known[is_known]) and all(seen)
    assert (decoded.confidence[is_known] == 1).all() and decoded.rounds[0] == 0


def test_one_round_is_the_argmax_of_the_blank_chunk():
    logits_of, (known, is_known) = contextual_logits(), fresh(4)
    decoded = decode(logits_of, known, is_known, MASK, DecodeConfig(rounds=1))
    blank = torch.full((4, NUM_SLOTS), MASK)
    assert torch.equal(decoded.tokens, logits_of(blank, torch.arange(4)).argmax(-1))


def test_confident_chunks_stop_early_and_unconfident_ones_take_every_round():
    sure = decode(contextual_logits(sharpness=1000.0), *fresh(3), MASK, DecodeConfig(rounds=12, threshold=0.5))
    unsure = decode(contextual_logits(sharpness=0.01), *fresh(3), MASK, DecodeConfig(rounds=12, threshold=0.9))
    assert (sure.rounds == 1).all() and (unsure.rounds == 12).all()


def test_without_a_threshold_the_quota_is_committed_exactly():
    counts, logits_of = [], contextual_logits()

    def count(tokens, rows):
        counts.append(int((tokens == MASK).sum()))
        return logits_of(tokens, rows)

    decode(count, *fresh(1), MASK, DecodeConfig(rounds=4, threshold=2.0))
    assert counts == [14, 12, 9, 5]  # floor(14 cos(pi/2 r/4))


def test_confidence_is_the_mass_of_the_neighbourhood():
    probs = torch.softmax(torch.randn(3, 4, VOCAB, generator=torch.Generator().manual_seed(0)), dim=-1)
    tokens = torch.randint(0, VOCAB, (3, 4), generator=torch.Generator().manual_seed(1))
    radius = torch.tensor([0, 1, 2, VOCAB])
    mass = confidence_of(probs, tokens, radius)
    for row in range(3):
        for slot in range(4):
            low, high = int(tokens[row, slot] - radius[slot]), int(tokens[row, slot] + radius[slot])
            expected = probs[row, slot, max(low, 0) : high + 1].sum()
            torch.testing.assert_close(mass[row, slot], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(mass[:, 0], probs[:, 0].gather(1, tokens[:, :1])[:, 0], atol=1e-6, rtol=0)


def test_seeds_decide_samples_and_greedy_ignores_them():
    logits_of = contextual_logits(sharpness=0.3)
    sampled = DecodeConfig(rounds=4, token_temperature=1.0)
    draw = [decode(logits_of, *fresh(4), MASK, sampled, [seed] * 4).tokens for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    greedy = [decode(logits_of, *fresh(4), MASK, DecodeConfig(rounds=4), [seed] * 4).tokens for seed in (0, 1)]
    assert torch.equal(*greedy)


def test_an_unknown_rule_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="remdm"):
        DecodeConfig(remask="sometimes")
