"""Each primitive gives what its name says, the gate sees the question and is trained by what it picks, seeds make it
repeatable.
"""

import pytest
import torch

from multimodal.compressor import ALIKE, BRANCHES, MODES, CompressorConfig, VisualCompressor

TOKENS = torch.randn(3, 36, 8, generator=torch.Generator().manual_seed(0))
QUESTION = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def build(seed: int = 0, **changes) -> VisualCompressor:
    torch.manual_seed(seed)
    return VisualCompressor(CompressorConfig(**{"prune_ratio": 5, "pool_ratio": 9, "conv_ratio": 5, **changes}), 8, 36)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", ["1d", "2d"])
def test_the_number_of_tokens_is_what_the_ratio_says(mode, pool):
    compressor = build(mode=mode, pool=pool)
    out = compressor(TOKENS, QUESTION, seeds=[1, 2, 3])
    expected = [compressor.num_tokens(name) for name in out.chosen]
    assert [len(tokens) for tokens in out.tokens] == expected
    sizes = {"none": 36, "prune": 8, "pool": 4, "conv": 8, "resample": 2, "text_only": 0, "weighted": 12, "concat": 22}
    assert all(compressor.num_tokens(name) == sizes[name] for name in out.chosen)


def test_primitives_equal_their_definitions():
    out = build(mode="none")(TOKENS).tokens
    assert torch.equal(torch.stack(out), TOKENS)
    pooled = torch.stack(build(mode="pool")(TOKENS).tokens)
    grid = TOKENS.view(3, 6, 6, 8)
    torch.testing.assert_close(pooled[:, 1], grid[:, :3, 3:].mean((1, 2)))
    flat = torch.stack(build(mode="pool", pool="1d", pool_ratio=4)(TOKENS).tokens)
    torch.testing.assert_close(flat[:, 2], TOKENS[:, 8:12].mean(1))
    convolved = torch.stack(build(mode="conv", conv_ratio=4)(TOKENS).tokens)  # starts as a mean
    torch.testing.assert_close(convolved, flat)
    ragged = torch.stack(build(mode="conv")(TOKENS).tokens)
    torch.testing.assert_close(ragged[:, 7], TOKENS[:, 35])  # 36 = 7 * 5 + 1: the last token fills the last window


def test_uniform_pruning_is_evenly_spaced_and_repeats_with_its_seed():
    compressor = build(mode="prune", prune_ratio=6)
    index = torch.arange(36.0).view(1, 36, 1).expand(2, 36, 8)
    first = [row[:, 0].tolist() for row in compressor(index, seeds=[5, 77]).tokens]
    assert first == [row[:, 0].tolist() for row in compressor(index, seeds=[5, 77]).tokens] and first[0] != first[1]
    assert all({b - a for a, b in zip(row, row[1:])} == {6.0} and 0 <= row[0] < 6 for row in first)


@pytest.mark.parametrize("mode", ALIKE)
def test_all_images_alike_is_each_image_with_the_same_seed(mode):
    compressor = build(mode=mode)
    each = torch.stack(compressor(TOKENS, seeds=[7, 7, 7]).tokens)
    assert torch.equal(compressor.alike(TOKENS, seed=7), each) and each.shape[1] == compressor.num_tokens(mode) > 0


def test_guided_pruning_keeps_what_is_attended_to_in_order():
    compressor = build(mode="prune", prune="guided", prune_ratio=12)
    scores = torch.zeros(3, 36)
    scores[:, [30, 4, 17]] = torch.tensor([3.0, 2.0, 1.0])
    kept = torch.stack(compressor(TOKENS, scores=scores).tokens)
    assert torch.equal(kept, TOKENS[:, [4, 17, 30]])
    with pytest.raises(ValueError, match="attention scores"):
        compressor(TOKENS)


def test_a_resampler_ignores_the_order_of_tokens():
    compressor = build(mode="resample", queries=3)
    shuffled = TOKENS[:, torch.randperm(36, generator=torch.Generator().manual_seed(2))]
    torch.testing.assert_close(torch.stack(compressor(TOKENS).tokens), torch.stack(compressor(shuffled).tokens))


def test_selection_is_the_argmax_at_inference_and_varies_in_training():
    compressor = build()
    with torch.no_grad():
        compressor.gate[2].weight.normal_(std=3.0)
    quiet = compressor(TOKENS, QUESTION)
    assert quiet.chosen == tuple(BRANCHES[index] for index in quiet.gate.argmax(1).tolist())
    assert quiet.chosen != compressor(TOKENS, -QUESTION).chosen  # it reads the question
    generator = torch.Generator().manual_seed(0)
    drawn = {name for _ in range(40) for name in build()(TOKENS, QUESTION, generator=generator).chosen}
    assert drawn == set(BRANCHES)
    with pytest.raises(ValueError, match="question"):
        compressor(TOKENS)


def test_the_choice_is_hard_and_its_gradient_soft():
    compressor, generator = build(), torch.Generator().manual_seed(3)
    out = compressor(TOKENS, QUESTION, generator=generator)
    for row, name in enumerate(out.chosen):
        expected = compressor(TOKENS[row : row + 1], branch=name).tokens[0]
        torch.testing.assert_close(out.tokens[row], expected)
    sum(tokens.square().sum() for tokens in out.tokens).backward()
    assert compressor.gate[2].weight.grad.abs().sum() > 0


def test_a_gate_that_is_certain_still_has_gradients():
    compressor = build()
    with torch.no_grad():
        compressor.gate[2].bias.copy_(torch.tensor([0.0, -500.0, 0.0, 500.0, 0.0]))
    out = compressor(TOKENS, QUESTION, generator=torch.Generator().manual_seed(0))
    (sum(tokens.square().sum() for tokens in out.tokens) + compressor.gate_loss(out.gate)).backward()
    assert set(out.chosen) == {"resample"} and out.gate.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert all(bool(weight.grad.isfinite().all()) for weight in compressor.gate.parameters())


def test_draws_under_bfloat16_are_finite():
    compressor, generator = build(), torch.Generator().manual_seed(0)
    tokens, question = TOKENS.repeat(100, 1, 1), QUESTION.repeat(100, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            assert all(part.isfinite().all() for part in compressor(tokens, question, generator=generator).tokens)


def test_the_gate_pays_for_tokens_and_for_imbalance():
    compressor = build(cost_weight=1.0, balance_weight=0.0)
    one_hot = torch.eye(5)
    costs = [float(compressor.gate_loss(one_hot[index : index + 1])) for index in range(5)]
    assert costs == pytest.approx([compressor.num_tokens(name) / 36 for name in BRANCHES])
    balance = build(cost_weight=0.0, balance_weight=1.0)
    assert float(balance.gate_loss(one_hot)) == pytest.approx(0, abs=1e-6)
    assert float(balance.gate_loss(one_hot[:1])) == pytest.approx(4)
    weights = torch.zeros(1, 5, requires_grad=True)
    for _ in range(200):  # left alone, the cost makes the gate choose no tokens at all
        compressor.gate_loss(weights.softmax(-1)).backward()
        with torch.no_grad():
            weights -= weights.grad
        weights.grad = None
    assert BRANCHES[int(weights.argmax())] == "text_only"


def test_a_weighted_sum_weighs_by_the_gate():
    compressor = build(mode="weighted", weighted_ratio=6)
    with torch.no_grad():
        compressor.gate[2].bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))
    pooled = build(mode="pool", pool="1d", pool_ratio=6)(TOKENS).tokens
    torch.testing.assert_close(compressor(TOKENS, QUESTION).tokens, pooled)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "moe"}, {"prune": "best"}, {"pool": "3d"}, {"queries": 0}, {"prune_ratio": 0}, {"prune_ratio": 0.5},
        {"pool_ratio": float("inf")}, {"pool_ratio": float("nan")}, {"conv_ratio": 2.5}, {"weighted_ratio": 0.9},
        {"gate_size": 0}, {"gate_temperature": 0.0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build(**wrong)


def test_a_square_is_needed_for_two_dimensions():
    with pytest.raises(ValueError, match="square"):
        VisualCompressor(CompressorConfig(mode="pool"), 8, 35)
