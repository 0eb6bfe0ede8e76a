"""Power laws with a floor, fitted to few points, with bootstrap intervals: y = floor + scale * x ** -exponent. numpy only.

For a given exponent floor and scale are a linear problem, so the exponent is searched on a grid and refined by a parabola
(variable projection, Golub and Pereyra 1973). Errors are taken as relative: residuals are weighted by 1 / y. Intervals come
from resampled residuals (Efron 1979): fitted values times resampled errors are fitted again; they are stretched by
Student's quantile over the normal one, since points are few.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.linspace(0.005, 3.0, 600)
FEWEST = 4  # points of different x
RESAMPLES = 2000
NORMAL = 1.959964  # 97.5 % quantile


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x ** -exponent. Intervals are 95 %."""

    exponent: float  # positive: y falls as x grows
    scale: float
    floor: float  # 0 where none was fitted
    exponent_interval_95: tuple[float, float]
    floor_interval_95: tuple[float, float]
    r_squared: float  # of log y

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.floor + self.scale * np.asarray(x, float) ** -self.exponent


def fit_power_law(
    x: Sequence[float], y: Sequence[float], *, floor: bool = True, resamples: int = RESAMPLES, seed: int = 0
) -> PowerLaw:
    """Raises ValueError unless x and y are positive and x has at least FEWEST values (with a floor) or one fewer, and, with a
    floor, if the best exponent is the least or the greatest that is searched: then the points tell none.
    """
    x_values, y_values = np.asarray(x, float), np.asarray(y, float)
    needed, distinct = FEWEST if floor else FEWEST - 1, len(np.unique(x_values))
    if distinct < needed or x_values.shape != y_values.shape:
        raise ValueError(f"A power law {'with' if floor else 'without'} a floor needs {needed} values of x, got {distinct}.")
    if not (np.isfinite(x_values).all() and np.isfinite(y_values).all() and (x_values > 0).all() and (y_values > 0).all()):
        raise ValueError("A power law is fitted to positive finite numbers.")
    middle = np.exp(np.log(x_values).mean())  # x is measured in it, so that scale and exponent are told apart
    scaled = x_values / middle
    exponent, scale, lowest = _fit(scaled, y_values[None], floor)
    if floor and not EXPONENTS[0] < exponent[0] < EXPONENTS[-1]:
        raise ValueError(
            f"No exponent between {EXPONENTS[0]:g} and {EXPONENTS[-1]:g} fits better than the border {exponent[0]:g}: these points "
            "tell no power law with a floor."
        )
    fitted = lowest[:, None] + scale[:, None] * scaled ** -exponent[:, None]
    residuals = np.log(y_values / fitted[0])
    freedom = max(len(residuals) - (3 if floor else 2), 1)
    residuals = (residuals - residuals.mean()) * np.sqrt(len(residuals) / freedom)
    stretch = student_quantile(freedom) / NORMAL
    draws = np.random.default_rng(seed).choice(residuals, (resamples, len(residuals)))
    other_exponents, _, other_floors = _fit(scaled, fitted * np.exp(draws), floor)
    spread = np.log(y_values) - np.log(y_values).mean()
    explained = 1.0 - np.square(np.log(y_values / fitted[0])).sum() / max(np.square(spread).sum(), 1e-300)
    return PowerLaw(
        exponent=float(exponent[0]),
        scale=float(scale[0] * middle ** exponent[0]),
        floor=float(lowest[0]),
        exponent_interval_95=_interval(other_exponents, exponent[0], stretch),
        floor_interval_95=_interval(other_floors, lowest[0], stretch),
        r_squared=float(explained),
    )


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by its expansion about the normal one (Abramowitz and Stegun 26.7.5).

    0.1 % short at 3 degrees of freedom, 0.8 % at 2, 11 % at 1.
    """
    z = NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _interval(values: np.ndarray, centre: float, stretch: float) -> tuple[float, float]:
    low, high = centre + stretch * (np.quantile(values, [0.025, 0.975]) - centre)
    return float(low), float(high)


def _fit(x: np.ndarray, y: np.ndarray, floor: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponent, scale, floor [B] of B curves y [B, N] over the same x [N]."""
    if not floor:
        log_x = np.log(x) - np.log(x).mean()
        slope = np.log(y) @ log_x / (log_x @ log_x)
        return -slope, np.exp(np.log(y).mean(axis=1) - slope * np.log(x).mean()), np.zeros(len(y))
    errors, _, _ = _least_squares(x ** -EXPONENTS[:, None], y)
    best = errors.argmin(axis=1)
    inner = best.clip(1, len(EXPONENTS) - 2)
    rows = np.arange(len(y))
    left, here, right = (errors[rows, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * here + right
    step = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0).clip(-1, 1)
    exponents = np.where(best == inner, EXPONENTS[inner] + step * (EXPONENTS[1] - EXPONENTS[0]), EXPONENTS[best])
    _, scale, lowest = _least_squares(x ** -exponents[:, None, None], y)
    return exponents, scale[:, 0], lowest[:, 0]


def _least_squares(basis: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted fit of y [B, N] by floor + scale * basis: error, scale, floor [B, G]; neither of the latter is negative.

    basis: [G, N], shared by the curves, or [B, 1, N], one for each.
    """
    weight, inverse = 1.0 / y**2, 1.0 / y  # [B, N]
    shared = basis.ndim == 2
    product = (lambda a, b: a @ b.T) if shared else (lambda a, b: (a[:, None] * b).sum(axis=2))  # [B, G]
    w, wy = weight.sum(axis=1)[:, None], inverse.sum(axis=1)[:, None]
    wb, wbb, wby = product(weight, basis), product(weight, basis**2), product(inverse, basis)
    determinant = w * wbb - wb**2
    safe = np.where(determinant > 1e-12 * w * wbb, determinant, np.inf)
    floor, scale = (wbb * wy - wb * wby) / safe, (w * wby - wb * wy) / safe
    without = ~((floor >= 0) & (scale >= 0))
    floor, scale = np.where(without, 0.0, floor), np.where(without, wby / wbb, scale)
    error = y.shape[1] - 2 * (floor * wy + scale * wby) + floor**2 * w + 2 * floor * scale * wb + scale**2 * wbb
    return error, scale, floor
