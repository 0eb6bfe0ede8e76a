"""Objectives that know the order of action bins: HL-Gauss targets, earth mover, Plackett-Luce.

Columns of the weight are bins; `values` [...] is the continuous target in column coordinates (bin k is centred on k and one
wide). A row is ordinal if its value is not NaN and its vocab_range has more than two columns; every other row (a gripper, a
word) gets plain cross-entropy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.reduction import LossOutput, reduce_tokens, split_options
from multimodal.kernels.statistics import VocabShard

# log-probabilities [n, V], columns [V], continuous target [n], number of columns in range [n] -> losses [n]
RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HLGauss:
    """Histogram loss with Gaussian targets (arXiv 2403.03950): q_k = [Phi((k+1/2-x)/sigma) - Phi((k-1/2-x)/sigma)] / Z.

    sigma in bins. The target's mean is x itself inside the range, so an expectation decodes below the bin width."""

    sigma: float = 0.75

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"objective.sigma is {self.sigma} for HLGauss; expected a positive number of bins.")

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        low, high = column_range(targets, weight, options.get("vocab_range"), options.get("vocab_shard"))
        ignored = targets == options.get("ignore_index", -100)
        ids, probs = gaussian_targets(targets, values, low, high, sigma=self.sigma)
        ids = ids.masked_fill(ignored[..., None], options.get("ignore_index", -100))
        return linear_cross_entropy(hidden, weight, ids, target_probs=probs, **options)


def gaussian_targets(targets: Tensor, values: Tensor | None, low: Tensor, high: Tensor, *, sigma: float) -> tuple[Tensor, Tensor]:
    """Ids and probabilities [..., K] of the bins within about 4.5 sigma of the values, within low <= k < high [...]."""
    ordinal, centre = _ordinal(targets, values, low, high)
    radius = math.ceil(4.5 * sigma + 0.5)
    ids = centre.round().long()[..., None] + torch.arange(-radius, radius + 1, device=targets.device)
    inside = (ids >= low[..., None]) & (ids < high[..., None]) & ordinal[..., None]
    offset = (ids - centre[..., None]) / (sigma * math.sqrt(2))
    half = 0.5 / (sigma * math.sqrt(2))
    mass = (torch.erf(offset + half) - torch.erf(offset - half)).masked_fill(~inside, 0)
    probs = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    one_hot = torch.arange(2 * radius + 1, device=targets.device) == 0
    probs = torch.where(ordinal[..., None], probs, one_hot.to(probs.dtype))
    return torch.where(inside, ids, targets[..., None]), probs


@dataclass(frozen=True)
class EarthMover:
    """Wasserstein-1 distance in bins to the continuous target, sum_v p_v |v - x|, over the largest distance R - 1 = 1 unit.

    For a point target this closed form equals sum |CDF_p - CDF_q|. The gradient p_v (|v - x| - mean) vanishes with p, so a wrong
    and sure row learns slowly: cross_entropy_weight adds that much cross-entropy."""

    cross_entropy_weight: float = 0.0

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        def row_loss(log_probs: Tensor, columns: Tensor, value: Tensor, span: Tensor) -> Tensor:
            return (log_probs.exp() * (columns - value[:, None]).abs()).sum(1) / (span - 1)

        return _dense(row_loss, self.cross_entropy_weight, hidden, weight, targets, values, options)


@dataclass(frozen=True)
class PlackettLuce:
    """Plackett-Luce over the order of bins (arXiv 2506.12542) with the distance to the target as teacher.

    Teacher logits -(v - x)^2 / (2 sigma^2) give the order and the weights alpha of
    -sum_k alpha_k (z_k - log sum_{l >= k} e^{z_l}); see `plackett_luce` for a learned teacher."""

    sigma: float = 2.0
    cross_entropy_weight: float = 0.0

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        def row_loss(log_probs: Tensor, columns: Tensor, value: Tensor, span: Tensor) -> Tensor:
            teacher = -(columns - value[:, None]).square() / (2 * self.sigma**2)
            return plackett_luce(log_probs, teacher.masked_fill(log_probs == -torch.inf, -torch.inf))

        return _dense(row_loss, self.cross_entropy_weight, hidden, weight, targets, values, options)


def plackett_luce(logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Plackett-Luce distillation (arXiv 2506.12542, eq. 7): logits, teacher_logits [n, K] -> loss [n].

    The order is the teacher's, best first, with targets [n] moved to the front; weights are the teacher's probabilities. Columns with
    teacher logit -inf take no part."""
    rank = teacher_logits if targets is None else teacher_logits.scatter(1, targets[:, None], torch.inf)
    order = rank.argsort(dim=1, descending=True, stable=True)
    alpha = teacher_logits.softmax(1).gather(1, order)
    excluded = teacher_logits.gather(1, order) == -torch.inf
    score = logits.gather(1, order).masked_fill(excluded, torch.finfo(logits.dtype).min / 4)
    rest = score.flip(1).logcumsumexp(1).flip(1)  # log sum_{l >= k}
    return -(alpha * (score - rest)).masked_fill(excluded, 0).sum(1)


def column_range(
    targets: Tensor, weight: Tensor, vocab_range: tuple[int, int] | Tensor | None, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    """First and last + 1 column of each row [...], counted over all shards as targets are."""
    if isinstance(vocab_range, Tensor):
        return vocab_range[..., 0], vocab_range[..., 1]
    low, high = vocab_range or (0, weight.shape[0] if shard is None else shard.vocab_size)
    return torch.full_like(targets, low), torch.full_like(targets, high)


def _ordinal(targets: Tensor, values: Tensor | None, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are ordinal, and their continuous target inside the range (anything finite elsewhere)."""
    values = targets.float() if values is None else values.float()
    ordinal = (high - low > 2) & ~values.isnan()
    return ordinal, torch.where(ordinal, values, 0).clamp(min=low.float(), max=(high - 1).float())


def require_plain_logits(options: dict[str, Any]) -> None:
    """Refuse what the logits `hidden @ weight.T`, which an objective forms beside the fused loss, would not heed."""
    unsupported = sorted(set(options) & {"target_probs", "vocab_shard", "softcap", "label_smoothing", "z_loss", "temperature", "bias"})
    if unsupported:
        raise ValueError(
            f"{unsupported[0]} is not supported by objectives that form logits of their own (earth_mover, edit_invariant, plackett_luce); "
            "leave it out."
        )


def _dense(
    row_loss: RowLoss,
    cross_entropy_weight: float,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    values: Tensor | None,
    options: dict[str, Any],
) -> Tensor | LossOutput:
    """Losses that need every probability of a row: log-probabilities [n, R] of the ordinal rows are held. For bins, not words."""
    require_plain_logits(options)
    low, high = column_range(targets, weight, options.get("vocab_range"))
    ordinal, centre = _ordinal(targets, values, low, high)
    ordinal = ordinal & (targets != options.get("ignore_index", -100))
    asked, options = split_options(options)
    stats = linear_cross_entropy(hidden, weight, targets, reduction="none", return_stats=True, **options)
    index = ordinal.reshape(-1).nonzero()[:, 0]
    low, high, centre = (tensor.reshape(-1)[index] for tensor in (low, high, centre))
    loss = stats.nll.reshape(-1)
    if len(index):
        columns = torch.arange(weight.shape[0], device=weight.device)
        inside = (columns >= low[:, None]) & (columns < high[:, None])
        logits = (hidden.reshape(-1, hidden.shape[-1])[index] @ weight.T).to(stats.nll.dtype)
        log_probs = logits.masked_fill(~inside, -torch.inf).log_softmax(1)
        rows = row_loss(log_probs, columns, centre, high - low)
        loss = loss.index_put((index,), rows + cross_entropy_weight * loss[index])
    return reduce_tokens(loss.reshape(targets.shape), targets != options.get("ignore_index", -100), stats, **asked)
