"""Laws of the fused linear distillation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.distillation import distill_top_k, linear_distillation, linear_distillation_reference
from tests.test_linear_cross_entropy import relative_error

DIVERGENCES = ("forward_kl", "reverse_kl", "soft_cross_entropy")


def heads(dtype: torch.dtype = torch.float64, rows: int = 6, vocab: int = 13, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (vocab, width), (rows, width + 2), (vocab, width + 2))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("logits_bytes", [None, 200])
def test_value_and_gradients_equal_the_reference(divergence: str, logits_bytes: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logit_rows, "BLOCK_BYTES", 60)
    hidden, weight, *teacher = heads()
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    kind = {"divergence": divergence, "temperature": 1.7}
    ours = linear_distillation(*inputs, *teacher, **kind, logits_bytes=logits_bytes)
    truth = linear_distillation_reference(*inputs, *teacher, **kind).mean()
    torch.testing.assert_close(ours, truth)
    for got, want in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * truth, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_the_value(divergence: str):
    hidden, weight, *_ = heads()
    teacher = (torch.randn_like(hidden), torch.randn_like(weight))
    valid, token_weight = torch.tensor([True, False, True, True, True, False]), torch.rand(6)
    options = {"divergence": divergence, "temperature": 2.0, "feature_weight": 0.5, "divergence_weight": 0.1}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distillation(hidden, weight, *teacher, valid=valid, token_weight=token_weight, **options)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()), nondet_tol=1e-10, fast_mode=True)


def test_a_teacher_who_is_the_student_has_nothing_to_say():
    hidden, weight, *_ = heads()
    inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    for divergence in ("forward_kl", "reverse_kl"):
        loss = linear_distillation(*inputs, hidden, weight, divergence=divergence, feature_weight=1.0)
        assert abs(loss) < 1e-12
        assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(loss, inputs))


def test_feature_term_is_smooth_l1():
    hidden, weight, *_ = heads()
    teacher = torch.randn_like(hidden)
    loss = linear_distillation(hidden, weight, teacher, weight, divergence_weight=0.0, feature_weight=2.0)
    torch.testing.assert_close(loss, 2 * F.smooth_l1_loss(hidden, teacher))


def test_rows_count_by_mask_weight_and_normalizer():
    hidden, weight, *teacher = heads()
    per_row = linear_distillation_reference(hidden, weight, *teacher, divergence="forward_kl", temperature=1.0)
    valid, token_weight = torch.arange(6) % 2 == 0, torch.rand(6).double()
    kept = per_row[valid] * token_weight[valid]
    options: dict[str, Any] = {"valid": valid, "token_weight": token_weight}
    torch.testing.assert_close(linear_distillation(hidden, weight, *teacher, **options, reduction="sum"), kept.sum())
    torch.testing.assert_close(linear_distillation(hidden, weight, *teacher, **options), kept.sum() / token_weight[valid].sum())
    torch.testing.assert_close(linear_distillation(hidden, weight, *teacher, **options, normalizer=9.0), kept.sum() / 9)


def test_no_row_kept_gives_zero_and_a_frozen_head_no_gradient():
    hidden, weight, *teacher = heads()
    hidden.requires_grad_()
    loss = linear_distillation(hidden, weight, *teacher, valid=torch.zeros(6, dtype=torch.bool), feature_weight=0.0)
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden)) and weight.grad is None


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
def test_half_types_are_no_worse_than_eager(dtype: torch.dtype, factor: float):
    """factor: of the loss, by a GradScaler; float16 rounds gradients formed without it to its smallest numbers."""
    half = [0.3 * each for each in heads(dtype, rows=64, vocab=3000, width=48)]
    wide = [each.double() for each in half]

    def value_and_gradients(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        inputs = [each.detach().requires_grad_() for each in tensors[:2]]
        value = loss(*inputs, *tensors[2:], divergence="forward_kl", temperature=1.0).mean()
        return [value.detach(), *torch.autograd.grad(factor * value, inputs)]

    truth, eager = (value_and_gradients(linear_distillation_reference, tensors) for tensors in (wide, half))
    ours = value_and_gradients(linear_distillation, half)
    assert ours[0].dtype == torch.float32
    for got, same_dtype, want in zip(ours, eager, truth, strict=True):
        assert relative_error(got, want) <= 1.05 * relative_error(same_dtype, want) + 1e-6


def test_top_k_teacher_is_soft_cross_entropy_over_its_columns():
    hidden, weight, teacher_hidden, teacher_weight = heads()
    logits, ids = (teacher_hidden @ teacher_weight.T).topk(4, dim=1)
    q = torch.zeros(6, 13, dtype=torch.float64).scatter(1, ids, logits.softmax(1))
    truth = -(q * (hidden @ weight.T).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(distill_top_k(hidden, weight, ids, logits), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_hidden": torch.randn(5, 7).double()}, ["teacher", "[5, 7]", "same rows"]),
        ({"teacher_weight": torch.randn(9, 7).double()}, ["13", "9", "teacher_weight[ids]"]),
        ({"weight": torch.randn(13, 4).double()}, ["hidden", "weight", "[13, 4]"]),
        ({"teacher_weight": torch.randn(13, 7).double().requires_grad_()}, ["teacher_weight", "detach"]),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ["valid", "[3]", "[6]"]),
        ({"divergence": "kl"}, ["divergence", "kl", "'forward_kl'"]),
        ({"temperature": 0}, ["temperature", "0", "positive"]),
        ({"reduction": "none"}, ["reduction", "none", "'sum'"]),
        ({"reduction": "sum", "normalizer": 100.0}, ["normalizer", "'sum'", "'mean'"]),
        ({"normalizer": -3.0}, ["normalizer", "-3.0", "positive"]),
        ({"feature_weight": 1.0}, ["feature_weight", "5", "7"]),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(changes: dict[str, Any], words: list[str]):
    arguments = dict(zip(("hidden", "weight", "teacher_hidden", "teacher_weight"), heads(), strict=True)) | changes
    with pytest.raises(ValueError) as refusal:
        linear_distillation(**arguments)
    assert all(word in str(refusal.value) for word in words), refusal.value
