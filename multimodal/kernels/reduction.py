"""From losses of rows to what the caller asked for: mean, sum or none, weights, the normalizer, and the record of statistics."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


class LossOutput(NamedTuple):
    """A loss with the differentiable statistics it was made of; zeros at ignored rows, leading shape of the targets."""

    loss: Tensor  # scalar, or [...] for reduction "none"
    nll: Tensor  # [...] lse - sum_k q_k z_k; exp(-nll) is the probability of a hard target
    lse: Tensor  # [...]
    entropy: Tensor  # [...] nats
    count: int  # rows that were not ignored


def row_scale(weight: Tensor | None, count: int, reduction: Reduction, normalizer: float | Tensor | None) -> Tensor | float:
    """The factor of each row's loss, [n] or one number, given the weights [n] of the `count` kept rows.

    Raises ValueError on a reduction or normalizer that no loss takes; looks at no tensor's values."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; allowed: {', '.join(map(repr, get_args(Reduction)))}.")
    if normalizer is not None and (reduction != "mean" or (not isinstance(normalizer, Tensor) and not normalizer > 0)):
        raise ValueError(f"normalizer is {normalizer} with reduction {reduction!r}; expected a positive number with reduction 'mean'.")
    weight = 1.0 if weight is None else weight
    if reduction != "mean":
        return weight
    if normalizer is None:
        normalizer = weight.sum() if isinstance(weight, Tensor) else max(count, 1)
    if isinstance(normalizer, Tensor):
        normalizer = torch.where(normalizer == 0, 1, normalizer)  # nothing to average: the sum is 0 too
    return weight / normalizer


def reduce_tokens(
    loss: Tensor,
    valid: Tensor,
    stats: LossOutput,
    *,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | LossOutput:
    """Losses [...] of rows, counted where `valid`, reduced as `linear_cross_entropy` reduces."""
    weight = valid.to(loss.dtype) if token_weight is None else token_weight.to(loss.dtype) * valid
    loss = loss.masked_fill(~valid, 0) * row_scale(weight, 0, reduction, normalizer)
    loss = loss if reduction == "none" else loss.sum()
    return stats._replace(loss=loss) if return_stats else loss


def split_options(options: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Options of `linear_cross_entropy` -> (those of `reduce_tokens`, the rest)."""
    mine = ("token_weight", "reduction", "normalizer", "return_stats")
    rest = {name: value for name, value in options.items() if name not in mine}
    return {name: value for name, value in options.items() if name in mine}, rest
