"""Parity with other implementations of the same loss: cut_cross_entropy's torch_compile path and Liger's torch code (extra `parity`).

Both packages bring Triton kernels that need CUDA; what is compared here is the torch code beside them, which runs anywhere."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.kernels.distillation import linear_distillation
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from tests.test_linear_cross_entropy import problem, relative_error

BACKENDS = ("chunked", "vocab_blocks")
SHAPE = {"rows": 33, "vocab": 130, "width": 40}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight with gradients on, targets of which every fifth is ignored."""
    hidden, weight, targets, _ = problem({}, dtype=dtype, **SHAPE)
    targets[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def with_gradients(loss: Tensor, *of: Tensor, again: bool = False) -> list[Tensor]:
    """The loss and its gradients; `again`: the graph is used once more (a compiled one refuses)."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
    return [loss.detach(), *torch.autograd.grad(loss, of, upstream, retain_graph=again)]


def check(ours: list[Tensor], theirs: list[Tensor], allowed: float = 2e-6) -> None:
    errors = [relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    assert max(errors) <= allowed, errors


@pytest.fixture(scope="module")
def cut_cross_entropy() -> ModuleType:
    return pytest.importorskip("cut_cross_entropy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_cut_cross_entropy(cut_cross_entropy: ModuleType, options: dict[str, Any], backend: str):
    hidden, weight, targets = inputs()
    theirs = cut_cross_entropy.linear_cross_entropy(hidden, weight, targets, impl="torch_compile", **options)
    ours = linear_cross_entropy(hidden, weight, targets, backend=backend, **options)
    check(with_gradients(ours, hidden, weight), with_gradients(theirs, hidden, weight))


def test_cut_cross_entropy_in_bfloat16(cut_cross_entropy: ModuleType):
    """Both round the logits and the gradients, and reduce in float32: two roundings apart."""
    hidden, weight, targets = inputs(torch.bfloat16)
    theirs = cut_cross_entropy.linear_cross_entropy(hidden, weight, targets, impl="torch_compile")
    ours = linear_cross_entropy(hidden, weight, targets)
    check(with_gradients(ours, hidden, weight), with_gradients(theirs, hidden, weight), allowed=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_liger_scaled_cross_entropy(temperature: float, backend: str):
    """nll and entropy of every row, both with a gradient of their own."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    hidden, weight, targets = inputs()
    nll, entropy = liger.LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, temperature, -100, 1, True
    )  # fmt: skip
    ours = linear_cross_entropy(hidden, weight, targets, temperature=temperature, return_stats=True, backend=backend)
    kept = targets != -100
    for mine, theirs in ((ours.nll, nll), (ours.entropy * kept, entropy), (ours.nll * ours.entropy, nll * entropy)):
        both = (with_gradients(each, hidden, weight, again=True) for each in (mine, theirs))
        check(*both, allowed=5e-6)


@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_liger_distillation(divergence: str, beta: float):
    """Liger's chunked JSD at its two ends, without its torch.compile; it leaves out the factor T^2."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    hidden, weight, targets = inputs()
    teacher, teacher_weight = (each.detach() for each in problem({}, dtype=torch.float32, seed=1, **SHAPE)[:2])
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.6, compiled=False, chunk_size=8
    )  # fmt: skip
    theirs = loss(hidden, weight, teacher, teacher_weight, targets)
    ours = linear_distillation(
        hidden, weight, teacher, teacher_weight, divergence=divergence, temperature=1.6, valid=targets != -100
    ) / 1.6**2  # fmt: skip
    check(with_gradients(ours, hidden, weight), with_gradients(theirs, hidden, weight), allowed=1e-5)


def test_liger_hard_loss():
    """The cross-entropy inside Liger's distillation: full logits in float32, torch's own nll_loss."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    hidden, weight, targets = inputs()
    loss = liger.LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=0.0, compiled=False, chunk_size=8)
    theirs = loss(hidden, weight, hidden.detach(), weight.detach(), targets)
    check(with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight), with_gradients(theirs, hidden, weight))
