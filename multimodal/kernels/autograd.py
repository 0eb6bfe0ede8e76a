"""How a backend joins autograd: statistics with any gradient towards them, or one scalar loss with its gradients at hand."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from multimodal.kernels.chunked import Gradients, Needs
from multimodal.kernels.row_loss import RowLoss
from multimodal.kernels.statistics import Rows, TokenStatistics, VocabShard
from multimodal.kernels.tensor_parallel import join_over_ranks, sum_over_ranks


@runtime_checkable
class Backend(Protocol):
    """Statistics forward, gradients backward; `Chunked`, `VocabBlocks` and the Triton backends."""

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, keep_logits: bool
    ) -> tuple[TokenStatistics, Tensor | None]: ...

    def gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        known: TokenStatistics,
        upstream: TokenStatistics,
        needs: Needs,
        logits: Tensor | None = None,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Plan:
    """The non-tensor side of one call."""

    backend: Backend
    rows: Rows
    shard: VocabShard | None = None


def token_statistics(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> TokenStatistics:
    """Differentiable statistics [n] of hidden [n, D] @ weight [V, D].T + bias [V]; double backward raises RuntimeError."""
    with torch.autocast(hidden.device.type, enabled=False):
        return TokenStatistics(*_Statistics.apply(hidden, weight, bias, plan))


def summed_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, loss: RowLoss) -> Tensor:
    """The loss summed over rows, a scalar; its gradients are computed at once, three GEMMs in all.

    `plan.backend` must be a `Chunked`; `loss` is differentiated towards the statistics only."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _SummedLoss.apply(hidden, weight, bias, plan, loss)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        ctx.plan, ctx.needs = plan, Needs(*ctx.needs_input_grad[:3])
        known, ctx.logits = plan.backend.statistics(hidden, weight, bias, plan.rows, keep_logits=bool(ctx.needs))
        if plan.shard is not None:
            known = join_over_ranks(known, plan.shard.group)
        ctx.save_for_backward(hidden, weight, bias, *known)
        return tuple(known)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *known = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None  # overwritten by the first backward; a second one recomputes them
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.plan.backend.gradients(
                hidden, weight, bias, ctx.plan.rows, TokenStatistics(*known), TokenStatistics(*upstream), ctx.needs, logits
            )
        if ctx.plan.shard is not None and gradients.hidden is not None:
            gradients.hidden = sum_over_ranks(gradients.hidden, ctx.plan.shard.group)
        return *first_order(gradients.rounded(weight.dtype), (*upstream, hidden, weight)), None


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, loss: RowLoss) -> Tensor:
        ctx.plan, ctx.needs = plan, Needs(*ctx.needs_input_grad[:3])
        if not ctx.needs:
            known, _ = plan.backend.statistics(hidden, weight, bias, plan.rows, keep_logits=False)
            return loss.values(known, slice(0, len(plan.rows))).sum()
        known, ctx.gradients = plan.backend.loss_and_gradients(hidden, weight, bias, plan.rows, loss, ctx.needs)
        value, upstream = loss.total()
        ctx.save_for_backward(hidden, weight, bias, *known, *upstream)
        return value

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if gradients is not None:
                for part in (gradients.hidden, gradients.weight, gradients.bias):
                    if part is not None and not _is_one(scale):
                        part.mul_(scale)
            else:  # consumed by an earlier backward: recompute
                known, upstream = TokenStatistics(*rest[:4]), TokenStatistics(*(part * scale for part in rest[4:]))
                gradients = ctx.plan.backend.gradients(hidden, weight, bias, ctx.plan.rows, known, upstream, ctx.needs)
        return *first_order(gradients.rounded(weight.dtype), (scale, hidden, weight)), None, None


def first_order(gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Under create_graph=True, gradients whose own backward raises rather than being silently missing."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(None if gradient is None else _FirstOrder.apply(gradient, *inputs) for gradient in gradients)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "linear_cross_entropy has no double backward in its fused backends: second derivatives need every logit. "
            "Use backend='reference' where gradients of gradients are wanted."
        )


def _is_one(scale: Tensor) -> bool:
    """Whether multiplying can be skipped; False on an accelerator, where asking would wait for it."""
    return not scale.is_cuda and scale.item() == 1
