"""Objectives chosen by name: `objective: {type: hl_gauss, sigma: 0.75}` in a config becomes a callable that ends in one loss.

Every objective is called as `objective(hidden, weight, targets, values=None, **options)` with the options of
`linear_cross_entropy` and returns what that returns. `values` [...] is the continuous target in column coordinates (column k of
the weight is the bin centred on k; NaN: the row is not ordinal); objectives without an order among columns do not look at it.

p = exp(-nll) below is the probability of the target.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from multimodal.bin_losses import EarthMover, HLGauss, PlackettLuce, column_range, require_plain_logits
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.reduction import LossOutput, reduce_tokens, split_options
from multimodal.kernels.statistics import TokenStatistics


class Objective(Protocol):
    """See the module docstring."""

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput: ...


class _TokenObjective:
    """An objective that is a function of one row's statistics."""

    def token_loss(self, statistics: TokenStatistics) -> Tensor:
        """Statistics of rows [n] -> losses [n]."""
        raise NotImplementedError

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        return linear_cross_entropy(hidden, weight, targets, token_loss=self.token_loss, **options)


@dataclass(frozen=True)
class CrossEntropy:
    """-log p, with label smoothing and z-loss."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        return linear_cross_entropy(hidden, weight, targets, label_smoothing=self.label_smoothing, z_loss=self.z_loss, **options)


@dataclass(frozen=True)
class CompSum(_TokenObjective):
    """Comp-sum losses (arXiv 2304.07288): (1 - p^(tau-1)) / (tau - 1).

    tau 0: 1/p - 1 (sum-exponential); 1: cross-entropy; 1 < tau < 2: generalised cross-entropy; 2: 1 - p (mean absolute error).
    A larger tau trusts confident mistakes of the labels less."""

    tau: float = 1.5

    def __post_init__(self) -> None:
        _require(0 <= self.tau <= 2, self, "tau", "a number in [0, 2]")

    def token_loss(self, statistics: TokenStatistics) -> Tensor:
        nll, order = statistics.nll, self.tau - 1
        return nll if order == 0 else -torch.expm1(-order * nll) / order


@dataclass(frozen=True)
class Dice(_TokenObjective):
    """Self-adjusting Dice (arXiv 1911.02855, eq. 9 for a one-hot target): 1 - (2 m + gamma) / (m + 1 + gamma), m = (1-p)^alpha p.

    Not a proper score: p stays below one half, where m peaks. For imbalanced tags, beside a cross-entropy."""

    alpha: float = 1.0
    gamma: float = 1.0

    def token_loss(self, statistics: TokenStatistics) -> Tensor:
        p = torch.exp(-statistics.nll)
        mass = (1 - p).clamp(min=torch.finfo(p.dtype).tiny).pow(self.alpha) * p
        return 1 - (2 * mass + self.gamma) / (mass + 1 + self.gamma)


@dataclass(frozen=True)
class DirectCoverage(_TokenObjective):
    """Limited confidence (arXiv 2502.07154): -log(1 - (1-p)^N), the loss of being right once in N samples.

    N = 1 is cross-entropy; for p << 1/N it is nll - log N, for p >> 1/N the gradient vanishes."""

    num_samples: float = 4.0

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, self, "num_samples", "a number >= 1")

    def token_loss(self, statistics: TokenStatistics) -> Tensor:
        nll = statistics.nll
        rare = nll > 30  # where exp(-nll) leaves float32 and the limit is exact
        usual = nll.masked_fill(rare, 1.0).clamp(min=1e-7)
        log_miss = torch.where(usual < math.log(2), torch.log(-torch.expm1(-usual)), torch.log1p(-torch.exp(-usual)))
        return torch.where(rare, nll - math.log(self.num_samples), -torch.log(-torch.expm1(self.num_samples * log_miss)))


@dataclass(frozen=True)
class SymmetricCrossEntropy(_TokenObjective):
    """alpha CE(q, p) + beta CE(p, q) with log 0 := log_zero (arXiv 1908.06112): alpha nll - beta log_zero (1 - p)."""

    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = -4.0

    def token_loss(self, statistics: TokenStatistics) -> Tensor:
        return self.alpha * statistics.nll + self.beta * self.log_zero * torch.expm1(-statistics.nll)


@dataclass(frozen=True)
class DistributionallyRobust:
    """Label-distributionally robust loss (arXiv 2112.14869): lam log(1/R sum_v exp((margin [v != y] + z_v - z_y) / lam)).

    lam -> 0 is the hinge of the worst label, lam = 1 and margin 0 cross-entropy less log R. With `adapt` = alpha > 0 each row takes
    lam (1 - KL(p || uniform) / (alpha log R)), no gradient, at least `floor` lam: rows that are sure of themselves become harder.
    Where p rounds to 1 the margin counts as met: float32 asks for a gap of about 10 lam, however large the margin."""

    lam: float = 1.0
    margin: float = 0.0
    adapt: float = 0.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _require(self.lam > 0, self, "lam", "a positive number")
        _require(self.adapt == 0 or self.adapt >= 1, self, "adapt", "0 (off) or a number >= 1")

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        asked, options = split_options(options)
        low, high = column_range(targets, weight, options.get("vocab_range"), options.get("vocab_shard"))
        num_columns = (high - low).float()
        lam = torch.full(targets.shape, self.lam, device=hidden.device)
        if self.adapt:
            with torch.no_grad():
                entropy = linear_cross_entropy(hidden, weight, targets, reduction="none", return_stats=True, **options).entropy
            certainty = torch.where(num_columns > 1, 1 - entropy / num_columns.log(), 0)  # KL(p || uniform) / log R
            lam = lam * (1 - certainty / self.adapt).clamp(min=self.floor)
        stats = linear_cross_entropy(hidden, weight, targets, temperature=lam, reduction="none", return_stats=True, **options)
        # the margin moves every other logit up: lse' = lse + log(e^a (1 - p) + p) with a = margin / lam, and e^a may overflow
        sure = stats.nll <= 0
        log_rest = torch.log(-torch.expm1(-stats.nll.masked_fill(sure, 1))).masked_fill(sure, -torch.inf)  # log(1 - p)
        loss = lam * (stats.nll + torch.logaddexp(self.margin / lam + log_rest, -stats.nll) - num_columns.log())
        valid = targets != options.get("ignore_index", -100)
        return reduce_tokens(loss.to(stats.nll.dtype), valid, stats, **asked)


@dataclass(frozen=True)
class EditInvariant:
    """Edit-invariant sequence loss (arXiv 2106.15078) over chunks [..., T]: each n-gram of the target may be met at any offset.

    For a target n-gram s and an output offset t, g(t, s) = mean_j log p_{t+j}(y_{s+j}); the loss is -mean_s sum_t softmax_t(g) g,
    averaged over `ngrams`, mixed with cross-entropy. The attention over offsets replaces the paper's Gumbel samples by their mean.
    Every entry is supervised, else ValueError; one loss per chunk, so reductions count chunks and token_weight is [...]."""

    ngrams: tuple[int, ...] = (2, 3)
    cross_entropy_weight: float = 1.0

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, values: Tensor | None = None, **options: Any
    ) -> Tensor | LossOutput:
        if targets.dim() < 2 or targets.shape[-1] < max(self.ngrams):
            raise ValueError(f"edit_invariant needs targets [..., T] with T >= {max(self.ngrams)} (ngrams); got {list(targets.shape)}.")
        require_plain_logits(options)
        asked, options = split_options(options)
        stats = linear_cross_entropy(hidden, weight, targets, reduction="none", return_stats=True, **options)
        if stats.count < targets.numel():
            raise ValueError(f"edit_invariant needs every entry of targets; only {stats.count} of {targets.numel()} are not ignored.")
        at_targets = torch.einsum("...td,...sd->...ts", hidden, weight[targets]).to(stats.lse.dtype)
        low, high = (bound[..., None] for bound in column_range(targets, weight, options.get("vocab_range")))
        outside = (targets[..., None, :] < low) | (targets[..., None, :] >= high)  # of the range of the offset it is met at
        log_probs = (at_targets - stats.lse[..., None]).masked_fill(outside, -torch.inf)
        loss = self.cross_entropy_weight * stats.nll.mean(-1) + edit_invariant(log_probs, self.ngrams)
        valid = torch.ones_like(loss, dtype=torch.bool)
        return reduce_tokens(loss, valid, stats, **asked)


def edit_invariant(log_probs: Tensor, ngrams: tuple[int, ...]) -> Tensor:
    """log_probs [..., T_out, T_target] of each target token at each output position -> loss [...]."""
    log_probs, losses = log_probs.clamp(min=-20), []
    for n in ngrams:
        rows, columns = log_probs.shape[-2] - n + 1, log_probs.shape[-1] - n + 1
        score = sum(log_probs[..., j : j + rows, j : j + columns] for j in range(n)) / n
        losses.append(-(score.softmax(-2) * score).sum(-2).mean(-1))
    return torch.stack(losses).mean(0)


def _require(condition: bool, objective: object, field: str, allowed: str) -> None:
    if not condition:
        raise ValueError(f"objective.{field} is {getattr(objective, field)} for {type(objective).__name__}; expected {allowed}.")


OBJECTIVES: dict[str, type] = {
    "cross_entropy": CrossEntropy,
    "hl_gauss": HLGauss,
    "comp_sum": CompSum,
    "dice": Dice,
    "direct_coverage": DirectCoverage,
    "distributionally_robust": DistributionallyRobust,
    "plackett_luce": PlackettLuce,
    "earth_mover": EarthMover,
    "edit_invariant": EditInvariant,
    "symmetric_cross_entropy": SymmetricCrossEntropy,
}


def build_objective(config: Mapping[str, Any]) -> Objective:
    """{"type": name, **settings} -> objective. Raises ValueError listing the names, or the settings of that name."""
    settings = dict(config)
    name = settings.pop("type", None)
    if name not in OBJECTIVES:
        raise ValueError(f"objective.type is {name!r}; allowed: {sorted(OBJECTIVES)}. Example: {{type: hl_gauss, sigma: 0.75}}.")
    allowed = {field.name: field for field in fields(OBJECTIVES[name])}
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        listed = {key: None if field.default is MISSING else field.default for key, field in allowed.items()}
        raise ValueError(f"objective {name!r} has no setting {unknown[0]!r}; allowed, with defaults: {listed}.")
    for key, value in settings.items():
        default = allowed[key].default
        if isinstance(default, tuple):
            settings[key] = tuple(value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"objective.{key} is {value!r} for {name!r}; expected a number like {default}.")
    return OBJECTIVES[name](**settings)
