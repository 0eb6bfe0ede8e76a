"""Laws of token choice: the sample's law is the softmax, noise belongs to a position, truncation and penalties do what they
say.
"""

import numpy as np
import pytest

from multimodal.sampling import (
    SamplingConfig,
    adjusted_logits,
    choose,
    gumbel_noise,
    probabilities,
    truncated_logits,
    truncated_logits_reference,
)

LOGITS = np.random.default_rng(0).normal(size=40) * 2
LAWS = [{"temperature": 1.0}, {"temperature": 0.5, "top_k": 12}, {"temperature": 1.3, "top_p": 0.8}]


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """(statistic - degrees of freedom) / its standard deviation: about standard normal if `probs` is the law."""
    expected = probs * counts.sum()
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("config", LAWS)
def test_samples_follow_the_softmax(config):
    law = SamplingConfig(seed=5, **config)
    probs = probabilities(LOGITS, law)
    counts = np.bincount([choose(LOGITS, law, position) for position in range(20_000)], minlength=40)
    assert chi_square(counts, probs) < 4
    assert counts[probs == 0].sum() == 0
    hotter = probabilities(LOGITS, SamplingConfig(temperature=config["temperature"] * 1.2))
    assert chi_square(counts, hotter) > 20  # it can fail


def test_seeds_are_independent_at_one_position():
    probs = probabilities(LOGITS, SamplingConfig(temperature=1.0))
    counts = np.bincount([choose(LOGITS, SamplingConfig(1.0, seed=seed), 17) for seed in range(20_000)], minlength=40)
    assert chi_square(counts, probs) < 4


def test_noise_is_a_function_of_seed_and_position():
    assert np.array_equal(gumbel_noise(3, 9, 16), gumbel_noise(3, 9, 16))
    assert np.array_equal(gumbel_noise(3, 9, 8), gumbel_noise(3, 9, 16)[:8])
    others = [gumbel_noise(seed, position, 4) for seed in range(6) for position in range(6)]
    assert len({tuple(noise) for noise in others}) == 36


def test_truncation_keeps_the_smallest_sufficient_set_and_the_lowest_ids_of_equals():
    logits = np.log([0.1, 0.4, 0.1, 0.4])

    def kept(**config) -> list[int]:
        return np.flatnonzero(np.isfinite(truncated_logits(logits, SamplingConfig(1.0, **config)))).tolist()

    assert kept(top_k=1) == [1] and kept(top_k=3) == [0, 1, 3] and kept(top_k=99) == [0, 1, 2, 3]
    assert kept(top_p=0.39) == [1] and kept(top_p=0.41) == [1, 3] and kept(top_p=0.85) == [0, 1, 3]
    assert kept(top_k=2, top_p=0.6) == [1, 3]  # mass counts among the k that are left


@pytest.mark.parametrize("decimals", [0, 1, 9])  # few decimals: many ties
def test_fast_truncation_equals_sorting_everything(decimals):
    random = np.random.default_rng(decimals)
    for _ in range(300):
        logits = np.round(random.normal(size=random.integers(1, 90)) * random.choice([0.1, 1, 4]), decimals)
        top_p, top_k = float(random.choice([0.1, 0.5, 0.9, 1.0])), int(random.choice([0, 1, 3, 99]))
        config = SamplingConfig(random.uniform(0.3, 2), top_p, top_k)
        assert np.array_equal(truncated_logits(logits, config), truncated_logits_reference(logits, config))


def test_greedy_takes_the_lowest_id_of_equals():
    assert choose(np.array([1.0, 3.0, 3.0]), SamplingConfig(), 0) == 1


def test_penalties_act_on_what_was_said():
    logits = np.array([2.0, -2.0, 2.0, 0.5])
    repeated = adjusted_logits(logits, SamplingConfig(repetition_penalty=2.0), [0, -1], [1])
    assert repeated.tolist() == [1.0, -4.0, 2.0, 0.5]
    counted = adjusted_logits(logits, SamplingConfig(presence_penalty=0.5, frequency_penalty=0.25), [0], [2, 2, 3])
    assert counted.tolist() == [2.0, -2.0, 1.0, -0.25]
    bound = SamplingConfig(logit_bias={3: 9.0, 2: 20.0}, allowed_ids=(1, 3))
    assert choose(logits, bound, 0) == 3
    assert probabilities(logits, SamplingConfig(1.0, allowed_ids=(1, 3)))[[0, 2]].sum() == 0


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("seed", -1),
     ("repetition_penalty", 0.0), ("allowed_ids", ())],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingConfig(**{field: value})
