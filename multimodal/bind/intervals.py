"""Exact intervals of a share (Clopper and Pearson 1934), without a statistics library, and the normal quantile they go with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Share:
    """k of n, with its exact interval."""

    count: int
    total: int
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total or self.total == 0:
            raise ValueError(f"A share of {self.count} in {self.total} is none; needed: 0 <= count <= total, total > 0.")

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        alpha = (1 - self.confidence) / 2
        return lower_bound(self.count, self.total, alpha), 1 - lower_bound(self.total - self.count, self.total, alpha)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def to_dict(self) -> dict[str, float]:
        low, high = self.interval
        return {"count": self.count, "total": self.total, "share": self.value, "low": low, "high": high}


def lower_bound(count: int, total: int, alpha: float) -> float:
    """The p under which `count` or more successes of `total` have probability alpha; one-sided, 0 for count 0."""
    return 0.0 if count == 0 else _root(lambda p: upper_tail(count, total, p) - alpha)


def upper_tail(count: int, total: int, p: float) -> float:
    """P(X >= count) for X binomial(total, p), summed from logarithms."""
    if p <= 0 or p >= 1:
        return float(p >= 1 or count == 0)
    log_p, log_q = math.log(p), math.log1p(-p)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_p + (total - k) * log_q
        for k in range(count, total + 1)
    ]
    return math.fsum(math.exp(value) for value in logs)


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of [0, 1] crosses zero, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low


def normal_quantile(p: float) -> float:
    """Phi^-1(p)."""
    return NormalDist().inv_cdf(p)
