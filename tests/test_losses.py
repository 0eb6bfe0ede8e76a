"""Laws of the objectives: gradients, limits where one becomes another, and what a config may say."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.bin_losses import gaussian_targets, plackett_luce
from multimodal.embedding_losses import (
    barlow_twins,
    data_quality,
    data_quality_weight,
    mann_whitney,
    mi_alpha,
    symmetric_cross_entropy,
)
from multimodal.losses import OBJECTIVES, build_objective, edit_invariant

BINS = 17  # columns 0..16 are bins, 17 and 18 a gripper


def rows(*, ignored: bool = True) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """hidden [3, 5, D], weight [V, D], targets [3, 5] with the gripper in the last column, and the options."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 6, generator=generator, dtype=torch.float64) for shape in ((3, 5), (BINS + 2,)))
    values = torch.rand(3, 5, generator=generator) * (BINS - 1)
    targets = values.round().long()
    values[:, 4], targets[:, 4] = torch.nan, torch.tensor([17, 18, 17])
    vocab_range = torch.tensor([0, BINS]).repeat(3, 5, 1)
    vocab_range[:, 4] = torch.tensor([BINS, BINS + 2])
    if ignored:
        targets[0, 0] = -100
    return hidden, weight, targets, {"values": values, "vocab_range": vocab_range}


SETTINGS = [
    {"type": "cross_entropy", "label_smoothing": 0.1, "z_loss": 0.01},
    {"type": "hl_gauss", "sigma": 0.75},
    *({"type": "comp_sum", "tau": tau} for tau in (0, 1, 1.5, 2)),
    {"type": "dice"},
    {"type": "direct_coverage", "num_samples": 8},
    {"type": "distributionally_robust", "lam": 0.7, "margin": 0.5},
    {"type": "plackett_luce"},
    {"type": "earth_mover", "cross_entropy_weight": 0.3},
    {"type": "edit_invariant", "ngrams": [1, 3]},
    {"type": "symmetric_cross_entropy"},
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: f"{config['type']}{config.get('tau', '')}")
def test_objective_gradients_are_those_of_the_value(config: dict[str, Any]):
    sequence = config["type"] == "edit_invariant"
    hidden, weight, targets, options = rows(ignored=not sequence)
    options["token_weight"] = torch.rand(3) if sequence else torch.rand(3, 5)
    objective = build_objective(config)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return objective(hidden, weight, targets, **options)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()), nondet_tol=1e-10, fast_mode=True)
    with_stats = objective(hidden, weight, targets, **options, return_stats=True)
    torch.testing.assert_close(with_stats.loss, loss(hidden, weight))
    assert with_stats.nll.shape == targets.shape and with_stats.entropy[targets != -100].gt(0).all()


def test_every_objective_is_tested_and_scales_with_the_normalizer():
    assert {config["type"] for config in SETTINGS} == set(OBJECTIVES)
    for config in SETTINGS:
        hidden, weight, targets, options = rows(ignored=False)
        objective = build_objective(config)
        total = objective(hidden, weight, targets, **options, reduction="sum")
        per_row = objective(hidden, weight, targets, **options, reduction="none")
        torch.testing.assert_close(per_row.sum(), total)
        torch.testing.assert_close(objective(hidden, weight, targets, **options, normalizer=5.0), total / 5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("reduction", {"reduction": "avg"}), ("normalizer", {"reduction": "sum", "normalizer": 2.0}), ("normalizer", {"normalizer": -3.0})],
)
def test_every_objective_refuses_the_same_reductions(name: str, wrong: dict[str, Any]):
    for config in SETTINGS:
        hidden, weight, targets, options = rows(ignored=False)
        with pytest.raises(ValueError, match=f"^{name} is.*'mean'"):
            build_objective(config)(hidden, weight, targets, **options, **wrong)


def test_an_objective_ignores_ignored_rows():
    for config in SETTINGS:
        if config["type"] == "edit_invariant":
            continue
        hidden, weight, targets, options = rows()
        loss = build_objective(config)(hidden, weight, targets, **options)
        options["values"][0, 0] = 3.0
        torch.testing.assert_close(build_objective(config)(hidden * (targets != -100)[..., None], weight, targets, **options), loss)
        none = build_objective(config)(hidden, weight, torch.full_like(targets, -100), **options)
        assert none == 0


def test_a_gripper_row_is_plain_cross_entropy_under_ordinal_objectives():
    hidden, weight, targets, options = rows()
    truth = build_objective({"type": "cross_entropy"})(hidden, weight, targets, **options, reduction="none")[:, 4]
    for name in ("hl_gauss", "earth_mover", "plackett_luce"):
        for values in (options["values"], None):
            got = build_objective({"type": name})(hidden, weight, targets, **{**options, "values": values}, reduction="none")
            torch.testing.assert_close(got[:, 4], truth)


def objective_of_nll(config: dict[str, Any], nll: Tensor) -> Tensor:
    """The objective of a binary row whose target has probability exp(-nll)."""
    logits = torch.stack([-nll, torch.log(-torch.expm1(-nll))], 1)
    targets = torch.zeros(len(nll), dtype=torch.long)
    return build_objective(config)(logits, torch.eye(2, dtype=nll.dtype), targets, reduction="none")


P = torch.tensor([1e-12, 1e-5, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)


def test_comp_sum_passes_through_its_named_members():
    for tau, formula in ((0, 1 / P - 1), (1, -P.log()), (1.7, (1 - P**0.7) / 0.7), (2, 1 - P)):
        torch.testing.assert_close(objective_of_nll({"type": "comp_sum", "tau": tau}, -P.log()), formula)


def test_row_objectives_are_their_formulas():
    nll = -P.log()
    coverage = objective_of_nll({"type": "direct_coverage", "num_samples": 5}, nll)
    torch.testing.assert_close(coverage, -torch.log(-torch.expm1(5 * torch.log1p(-P))))
    torch.testing.assert_close(objective_of_nll({"type": "direct_coverage", "num_samples": 1}, nll), nll)
    torch.testing.assert_close(objective_of_nll({"type": "symmetric_cross_entropy"}, nll), 0.1 * nll + 4 * (1 - P))
    mass = (1 - P) ** 2 * P
    torch.testing.assert_close(objective_of_nll({"type": "dice", "alpha": 2}, nll), 1 - (2 * mass + 1) / (mass + 2))


def test_coverage_stays_finite_at_both_ends_in_float32():
    nll = torch.tensor([0.0, 1e-9, 1e-3, 20.0, 60.0, 200.0], requires_grad=True)
    from multimodal.kernels.statistics import TokenStatistics
    from multimodal.losses import DirectCoverage

    loss = DirectCoverage(4).token_loss(TokenStatistics(torch.zeros(6), nll, torch.zeros(6), torch.zeros(6)))
    loss.sum().backward()
    assert loss.isfinite().all() and nll.grad.isfinite().all()
    torch.testing.assert_close(loss[-3:], nll[-3:] - math.log(4))


def test_distributionally_robust_is_its_definition():
    hidden, weight, targets, _ = rows(ignored=False)
    z = (hidden @ weight.T).flatten(0, 1)
    y = targets.flatten()
    for lam, margin in ((1.0, 0.0), (0.5, 0.0), (2.0, 1.5)):
        gap = z - z.gather(1, y[:, None]) + margin * (1 - F.one_hot(y, BINS + 2))
        truth = lam * ((gap / lam).exp().mean(1)).log()
        got = build_objective({"type": "distributionally_robust", "lam": lam, "margin": margin})(hidden, weight, targets, reduction="none")
        torch.testing.assert_close(got.flatten(), truth, rtol=1e-5, atol=1e-6)


def test_distributionally_robust_stays_finite_where_the_margin_is_many_temperatures():
    hidden = torch.tensor([[0.0, 0.05, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)  # unsure, right, wrong
    objective = build_objective({"type": "distributionally_robust", "lam": 0.01, "margin": 1.0})
    got = objective(hidden, torch.eye(3), torch.zeros(3, dtype=torch.long), reduction="none")
    gap = hidden.detach() - hidden.detach()[:, :1] + torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(got.detach(), 0.01 * ((gap / 0.01).logsumexp(1) - math.log(3)), rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert hidden.grad.isfinite().all()


def test_one_allowed_column_is_no_certainty():
    hidden, weight, targets, _ = rows(ignored=False)
    objective = build_objective({"type": "distributionally_robust", "adapt": 1.0})
    assert objective(hidden, weight, torch.full_like(targets, 3), vocab_range=(3, 4)) == 0


def test_adapted_temperature_falls_with_certainty():
    hidden, weight = torch.stack([torch.zeros(BINS), 9 * F.one_hot(torch.tensor(3), BINS).float()]), torch.eye(BINS)
    targets = torch.tensor([3, 5])
    lam = [1.0, 0.1]  # uniform row: lam; sure row: near the floor
    adapted = build_objective({"type": "distributionally_robust", "adapt": 1.0})(hidden, weight, targets, reduction="none")
    fixed = [build_objective({"type": "distributionally_robust", "lam": each})(hidden, weight, targets, reduction="none") for each in lam]
    torch.testing.assert_close(adapted[0], fixed[0][0])
    assert abs(adapted[1] - fixed[1][1]) < abs(adapted[1] - fixed[0][1])


@pytest.mark.parametrize("sigma", [0.4, 0.75, 2.0])
def test_hl_gauss_targets_are_distributions_centred_on_the_value(sigma: float):
    values = torch.linspace(0, 254, 801, dtype=torch.float64)
    low, high = torch.zeros(801, dtype=torch.long), torch.full((801,), 255)
    ids, probs = gaussian_targets(values.round().long(), values, low, high, sigma=sigma)
    torch.testing.assert_close(probs.sum(1), torch.ones(801))
    assert (ids >= 0).all() and (ids < 255).all()
    mean = (ids * probs).sum(1)
    interior = (values > 5 * sigma + 1) & (values < 253 - 5 * sigma)
    assert (mean - values)[interior].abs().max() < (0.05 if sigma < 0.5 else 2e-3)  # a narrow one sees the bins' grid


def test_hl_gauss_becomes_hard_as_sigma_vanishes():
    hidden, weight, targets, options = rows()
    options["values"] = targets.float()
    torch.testing.assert_close(
        build_objective({"type": "hl_gauss", "sigma": 0.05})(hidden, weight, targets, **options),
        build_objective({"type": "cross_entropy"})(hidden, weight, targets, **options),
    )


def test_earth_mover_is_the_area_between_cumulative_distributions():
    hidden, weight, targets, options = rows()
    options["values"] = None  # the targets themselves: a point mass
    got = build_objective({"type": "earth_mover"})(hidden, weight, targets, **options, reduction="none")[:, :4].flatten()
    p = (hidden @ weight[:BINS].T).softmax(-1)[:, :4].flatten(0, 1)
    q = F.one_hot(targets[:, :4].flatten().clamp(min=0), BINS)
    truth = (p.cumsum(1) - q.cumsum(1)).abs().sum(1) / (BINS - 1)
    torch.testing.assert_close(got[1:], truth[1:])


def test_plackett_luce_of_one_sure_choice_is_cross_entropy():
    logits, targets = torch.randn(4, 6), torch.tensor([0, 3, 5, 1])
    sure = torch.zeros(4, 6).scatter(1, targets[:, None], 200.0)
    torch.testing.assert_close(plackett_luce(logits, sure), F.cross_entropy(logits, targets, reduction="none"))
    teacher = torch.randn(4, 6)
    order = teacher.argsort(1, descending=True)
    ranked = logits.gather(1, order)
    terms = [teacher.softmax(1).gather(1, order)[:, k] * (ranked[:, k] - ranked[:, k:].logsumexp(1)) for k in range(6)]
    torch.testing.assert_close(plackett_luce(logits, teacher), -sum(terms))
    moved = plackett_luce(logits, teacher, targets=order[:, 0])
    torch.testing.assert_close(moved, plackett_luce(logits, teacher))


def test_edit_invariant_forgives_a_shift_that_cross_entropy_punishes():
    tokens = torch.arange(8)
    logits = 12 * F.one_hot(tokens.roll(1), 10).float()  # the right sequence, one step late
    log_probs = logits.log_softmax(1)
    shifted = edit_invariant(log_probs[:, tokens], (2,))
    assert shifted < 2.0 < F.cross_entropy(logits, tokens)


def test_edit_invariant_gives_no_probability_outside_the_range_of_an_offset():
    hidden, weight, targets, options = rows(ignored=False)
    column, (low, high) = torch.arange(BINS + 2), options["vocab_range"].unbind(-1)
    inside = (column >= low[..., None]) & (column < high[..., None])
    log_probs = (hidden @ weight.T).masked_fill(~inside, -torch.inf).log_softmax(-1)
    truth = edit_invariant(log_probs.gather(2, targets[:, None].expand(3, 5, 5)), (2,))
    objective = build_objective({"type": "edit_invariant", "ngrams": [2], "cross_entropy_weight": 0})
    torch.testing.assert_close(objective(hidden, weight, targets, **options, reduction="none"), truth)


@pytest.mark.parametrize("name", ["earth_mover", "edit_invariant", "plackett_luce"])
@pytest.mark.parametrize("option", [{"bias": torch.zeros(BINS + 2)}, {"softcap": 5.0}, {"temperature": 2.0}], ids=lambda option: min(option))
def test_an_objective_that_forms_logits_refuses_options_that_shape_them(name: str, option: dict[str, Any]):
    hidden, weight, targets, options = rows(ignored=False)
    with pytest.raises(ValueError, match=f"{min(option)}.*{name}"):
        build_objective({"type": name})(hidden, weight, targets, **options, **option)


def test_edit_invariant_refuses_ignored_entries():
    hidden, weight, targets, options = rows(ignored=False)
    targets[0, 0] = -2  # a column of weight[targets], counted from the end
    with pytest.raises(ValueError, match="edit_invariant.*14 of 15"):
        build_objective({"type": "edit_invariant"})(hidden, weight, targets, **options, ignore_index=-2)


EMBEDDING_LOSSES = {
    "symmetric": lambda a, b: symmetric_cross_entropy(a, b).sum(),
    "mann_whitney": lambda a, b: mann_whitney(a, b, temperature=0.5),
    "barlow_twins": lambda a, b: barlow_twins(a, b, redundancy_weight=0.1),
    "mi_alpha": lambda a, b: mi_alpha(a @ b.T, alpha=0.4),
    "info_nce": lambda a, b: mi_alpha(a @ b.T, alpha=1.0),
    "data_quality": lambda a, b: data_quality(a, torch.ones_like(a)).sum() + b.sum(),
}


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_embedding_loss_gradients_are_those_of_the_value(name: str):
    torch.manual_seed(0)
    first, second = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(EMBEDDING_LOSSES[name], (first, second))


def test_embedding_losses_are_their_definitions():
    torch.manual_seed(0)
    positive, negative = torch.randn(30) + 1, torch.randn(40)
    sharp = mann_whitney(positive, negative, temperature=1e-3) * 1e-3
    hinge = (negative[None] - positive[:, None]).clamp(min=0).mean()
    torch.testing.assert_close(sharp, hinge, rtol=1e-3, atol=1e-4)
    scores = torch.randn(9, 9)
    info_nce = F.cross_entropy(scores, torch.arange(9)) - math.log(9)
    torch.testing.assert_close(mi_alpha(scores, alpha=1.0), info_nce)
    view = torch.randn(200, 5)
    assert barlow_twins(view, view) < 0.1 < barlow_twins(view, torch.randn(200, 5))
    logits = torch.randn(3, 4)
    torch.testing.assert_close(symmetric_cross_entropy(logits, logits), torch.distributions.Categorical(logits=logits).entropy())
    nll = torch.tensor([1.0, 3.0], requires_grad=True)
    data_quality(nll, torch.tensor([2.0, 2.0])).sum().backward()
    torch.testing.assert_close(nll.grad, data_quality_weight(nll, torch.tensor([2.0, 2.0])))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "hlgauss"}, ["hlgauss", "hl_gauss", "comp_sum"]),
        ({}, ["None", "hl_gauss"]),
        ({"type": "hl_gauss", "tau": 1}, ["hl_gauss", "tau", "sigma"]),
        ({"type": "hl_gauss", "sigma": "wide"}, ["sigma", "wide", "number"]),
        ({"type": "hl_gauss", "sigma": 0}, ["sigma", "0", "positive"]),
        ({"type": "comp_sum", "tau": 3}, ["tau", "3", "[0, 2]"]),
        ({"type": "direct_coverage", "num_samples": 0.5}, ["num_samples", "0.5", ">= 1"]),
        ({"type": "distributionally_robust", "lam": 0}, ["lam", "positive"]),
    ],
)
def test_a_wrong_config_names_what_is_allowed(config: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as refusal:
        build_objective(config)
    assert all(word in str(refusal.value) for word in words), refusal.value
