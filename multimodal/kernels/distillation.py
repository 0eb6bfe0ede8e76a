"""Fused linear distillation: a student's head learns the distribution of a teacher's head, with neither's logits kept.

For the online teacher of a speculative draft: both give hidden states, chunks of rows meet at the logits and part again. Top-k teachers
need no teacher head: see `distill_top_k`."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels.autograd import first_order
from multimodal.kernels.chunked import Chunked, Gradients, GradientSum, Needs
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.logit_rows import row_blocks
from multimodal.kernels.reduction import row_scale
from multimodal.kernels.statistics import accumulation_dtype

Divergence = Literal["forward_kl", "reverse_kl", "soft_cross_entropy"]


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    feature_weight: float = 0.0,
    valid: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    normalizer: float | Tensor | None = None,
    logits_bytes: int | None = None,
) -> Tensor:
    """divergence_weight * T^2 * D(teacher, student) + feature_weight * SmoothL1(hidden, teacher_hidden), a float32 scalar.

    hidden: [..., D] and weight: [V, D] of the student; teacher_hidden: [..., E] and teacher_weight: [V, E], without gradient.
    With p = softmax(z_student / T), q = softmax(z_teacher / T):
        forward_kl          sum q (log q - log p)     dz = (p - q) / T
        soft_cross_entropy  -sum q log p              dz = (p - q) / T
        reverse_kl          sum p (log p - log q)     dz = p (log p - log q - KL) / T
    and T^2 keeps gradients of one size across temperatures (arXiv 1503.02531). SmoothL1 is the mean over D of each row; EAGLE trains
    with feature_weight 1 and divergence_weight 0.1 on a frozen head (arXiv 2401.15077).
    valid: bool [...], rows to keep (all if None). token_weight, reduction, normalizer: as in `linear_cross_entropy`.
    No row kept: loss 0. Gradients are formed during the forward pass (float16: backward, see `linear_cross_entropy`'s `_one_sweep`);
    double backward raises RuntimeError.
    Raises ValueError naming the argument that does not fit.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, valid, token_weight, divergence, temperature, reduction, feature_weight)
    keep = slice(None) if valid is None else valid.reshape(-1).nonzero()[:, 0]
    rows, teacher_rows = (each.reshape(-1, each.shape[-1])[keep] for each in (hidden, teacher_hidden))
    acc = accumulation_dtype(hidden.dtype)
    kept_weight = None if token_weight is None else token_weight.reshape(-1)[keep].to(acc)
    scale = row_scale(kept_weight, len(rows), reduction, normalizer)
    scale = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=acc, device=hidden.device)
    scale = scale.to(acc).expand(len(rows))
    if len(rows) == 0:
        return rows.sum().to(acc) + weight[:0].sum().to(acc)
    loss = torch.zeros((), dtype=acc, device=hidden.device)
    if divergence_weight:
        plan = _Plan(divergence, temperature, Chunked(logits_bytes=logits_bytes))
        with torch.autocast(hidden.device.type, enabled=False):
            factor = (scale * divergence_weight * temperature**2).detach()
            loss = loss + _Distillation.apply(rows, weight, teacher_rows, teacher_weight, factor, plan)
    if feature_weight:
        distance = F.smooth_l1_loss(rows.to(acc), teacher_rows.to(acc), reduction="none").mean(1)
        loss = loss + feature_weight * (distance * scale).sum()
    return loss


def linear_distillation_reference(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, divergence: Divergence, temperature: float
) -> Tensor:
    """T^2 * D of each row [n] by plain autograd on full logits."""
    acc = accumulation_dtype(hidden.dtype)
    log_p = ((hidden @ weight.T).to(acc) / temperature).log_softmax(1)
    log_q = ((teacher_hidden @ teacher_weight.T).to(acc) / temperature).log_softmax(1)
    return temperature**2 * _divergence(log_p, log_q, divergence)


def distill_top_k(hidden: Tensor, weight: Tensor, teacher_ids: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
    """Soft cross-entropy towards a teacher known by its k largest logits, [..., k] with their column ids, renormalised over these."""
    return linear_cross_entropy(hidden, weight, teacher_ids, target_probs=teacher_logits.detach().float().softmax(-1), **options)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Log-probabilities [n, V] of student and teacher -> [n]."""
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(1)
    cross = -(log_q.exp() * log_p).sum(1)
    return cross if divergence == "soft_cross_entropy" else cross + (log_q.exp() * log_q).sum(1)


@dataclass(frozen=True)
class _Plan:
    divergence: Divergence
    temperature: float
    chunked: Chunked


class _Distillation(torch.autograd.Function):
    """sum_i factor_i D_i, its gradients formed chunk by chunk: at once, but in float16 only when a GradScaler's factor is known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, factor: Tensor, plan: _Plan
    ) -> Tensor:
        ctx.plan, ctx.needs = plan, Needs(*ctx.needs_input_grad[:2])
        at_once = hidden.dtype != torch.float16
        value, gradients = _sweep(hidden, weight, teacher_hidden, teacher_weight, factor, plan, ctx.needs if at_once else Needs())
        ctx.gradients = gradients if at_once else None
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, factor)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *saved, factor = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # handed out and scaled in place: a second backward sweeps again
        with torch.no_grad(), torch.autocast(saved[0].device.type, enabled=False):
            if gradients is None:
                _, gradients = _sweep(*saved, factor * upstream, ctx.plan, ctx.needs)
            else:
                for part in (gradients.hidden, gradients.weight):
                    if part is not None:
                        part.mul_(upstream)
        both = gradients.rounded(saved[1].dtype)[:2]
        return *first_order(both, (upstream, *saved[:2])), None, None, None, None


def _sweep(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, factor: Tensor, plan: _Plan, needs: Needs
) -> tuple[Tensor, Gradients]:
    """The weighted divergence and d loss / d (hidden, weight); both heads' logits of a chunk share the byte budget."""
    half = plan.chunked.halved(hidden)
    chunks = half.chunks(hidden, weight, weight_gradient=needs.weight)
    total, values = GradientSum(hidden, weight, needs, num_chunks=len(chunks)), []
    for chunk in chunks:
        student, teacher = hidden[chunk] @ weight.T, teacher_hidden[chunk] @ teacher_weight.T
        for block in row_blocks(*student.shape):
            mine = factor[chunk][block]
            log_p, log_q = (
                (logits[block].to(factor.dtype) / plan.temperature).log_softmax(1) for logits in (student, teacher)
            )
            divergence = _divergence(log_p, log_q, plan.divergence)
            values.append((divergence * mine).sum())
            if not needs:
                continue
            if plan.divergence == "reverse_kl":
                dz = log_p.exp() * (log_p - log_q - divergence[:, None])
            else:
                dz = log_p.exp_().sub_(log_q.exp_())
            student[block] = dz.mul_((mine / plan.temperature)[:, None])
        if needs:
            total.add(chunk, student, None)
    return torch.stack(values).sum(), total.gradients


def _check(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, valid: Tensor | None, token_weight: Tensor | None,
    divergence: str, temperature: float, reduction: str, feature_weight: float,
) -> None:  # fmt: skip
    for name, rows, head in (("", hidden, weight), ("teacher_", teacher_hidden, teacher_weight)):
        if head.dim() != 2 or rows.shape[-1] != head.shape[1] or rows.dtype != head.dtype:
            raise ValueError(
                f"{name}hidden is {rows.dtype} {list(rows.shape)} and {name}weight {head.dtype} {list(head.shape)}; expected [..., D] and "
                "[V, D] of one dtype."
            )
    if hidden.shape[:-1] != teacher_hidden.shape[:-1] or weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student and teacher differ: hidden {list(hidden.shape)} and {list(teacher_hidden.shape)}, vocabularies {weight.shape[0]} and "
            f"{teacher_weight.shape[0]}; expected the same rows and columns. For a draft vocabulary pass teacher_weight[ids]."
        )
    if teacher_hidden.requires_grad or teacher_weight.requires_grad:
        raise ValueError("teacher_hidden and teacher_weight take no gradient. Run the teacher under torch.no_grad(), or detach() them.")
    for name, tensor in (("valid", valid), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(hidden.shape[:-1])}.")
    if token_weight is not None and token_weight.requires_grad:
        raise ValueError("token_weight takes no gradient here. Pass token_weight.detach().")
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence is {divergence!r}; allowed: {', '.join(map(repr, get_args(Divergence)))}.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'mean', 'sum'.")
    if feature_weight and hidden.shape[-1] != teacher_hidden.shape[-1]:
        raise ValueError(f"feature_weight needs features of one size; got {hidden.shape[-1]} and {teacher_hidden.shape[-1]}.")
