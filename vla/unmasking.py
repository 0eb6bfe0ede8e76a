"""What the two decoding loops share (vla/decoding.py on torch, vla/numpy_decoding.py): settings, quota, rules, noise.

numpy only. Formulas that decide a token stand here once; where they take arrays, those of either library will do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from multimodal.config import check_choice, check_settings

ROUNDING = 1e-9  # added before the quota is floored: 56 * cos(pi / 3) is 28, not 27.999...


@dataclass(frozen=True)
class DecodeConfig:
    """How a chunk is decoded. The defaults are greedy and deterministic."""

    rounds: int = 2  # at most this many passes over the action slots; more cost time and won nothing (docs/results.md)
    threshold: float = 0.9  # commit every slot at least this confident, beyond the round's quota; > 1 turns it off
    token_temperature: float = 0.0  # 0: the likeliest token; else sample
    order_temperature: float = 0.0  # Gumbel noise on the order, falling to 0 over the rounds; 0: by confidence
    remask: str = "none"  # none | threshold | residual_drop | remdm
    confidence_radius: int = 0  # a motion token's confidence is the probability within this many bins of it
    euler_steps: int = 6  # of the flow head, which has no rounds

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), field.type
            fits = isinstance(value, int | float if wanted is float else wanted) and not isinstance(value, bool)
            if not fits:
                raise ValueError(f"DecodeConfig.{field.name} is {value!r}; it must be of type {wanted.__name__}.")
        check_choice("DecodeConfig", "remask", self.remask, tuple(REMASK_RULES))
        for name in ("rounds", "euler_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecodeConfig.{name} is {getattr(self, name)}; at least one is needed.")

    def changed(self, settings: Mapping[str, Any]) -> "DecodeConfig":
        """With some settings changed. Raises ValueError for one that there is not."""
        check_settings("decode", settings, DecodeConfig)
        return replace(self, **settings)


def masked_share(round_index: int, rounds: int) -> float:
    """Share of the free slots that may stay masked after a round (0-based): cos(pi/2 (r+1)/T), 0 at the end."""
    return 0.0 if round_index + 1 >= rounds else math.cos(0.5 * math.pi * (round_index + 1) / rounds)


# Remasking: which committed slots to doubt. Each rule maps confidences to a doubt [B, L], > 0 where the slot should be
# masked again; the largest doubts go first if the round's budget does not cover all.

Array = Any  # float32 [B, L] of numpy or torch


@dataclass(frozen=True)
class RoundState:
    """What a rule may look at."""

    confidence: Array  # now, probability of the token that stands there
    committed_confidence: Array  # when it was committed
    relative_doubt: Array  # softmax of -committed_confidence over the slots that may be doubted, times their number: mean 1
    progress: float  # (round + 1) / rounds, in (0, 1]
    next_progress: float  # the same after the coming round
    noise: Array  # uniform [0, 1), seeded per row


def remask_none(state: RoundState) -> Array:
    return 0.0 * state.confidence


def remask_threshold(state: RoundState) -> Array:
    """Doubt what has confidence below 0.5 * progress: the paper's eta_abs (v4 eq. 9) of the round that comes next."""
    return 0.5 * state.progress - state.confidence


def remask_residual_drop(state: RoundState, drop: float = 0.3) -> Array:
    """Doubt what lost more than `drop` of confidence since it was committed (the paper's v1-v3 check)."""
    return state.committed_confidence - state.confidence - drop


def remask_remdm(state: RoundState, eta: float = 0.2) -> Array:
    """ReMDM-conf (arXiv 2503.00307): remask with probability eta * sigma_max, more for the less confident.

    sigma_max = min(1, (1 - alpha_next) / alpha_now) with alpha = 1 - mask rate. The probability is spread over the slots by
    softmax(-confidence at commit) and drawn with the row's noise. As published, softmax * sigma_max, it sums to sigma over all
    slots, so that a long chunk is hardly ever remasked; here sigma is its mean over the slots that may be doubted.
    """
    alpha_now = 1.0 - math.cos(0.5 * math.pi * state.progress)
    alpha_next = 1.0 - math.cos(0.5 * math.pi * state.next_progress)
    sigma = eta * min(1.0, (1.0 - alpha_next) / max(alpha_now, 1e-6))
    return sigma * state.relative_doubt - state.noise


REMASK_RULES: dict[str, Callable[[RoundState], Array]] = {
    "none": remask_none,
    "threshold": remask_threshold,
    "residual_drop": remask_residual_drop,
    "remdm": remask_remdm,
}


class RowNoise:
    """Random numbers drawn row by row, each row from its own Philox generator, which counts from 0 under the row's seed.

    Philox (Salmon et al. 2011) is a function of key and counter, so torch and numpy decoders that draw in the same order
    draw the same numbers. A generator is made when its row is first drawn for: greedy decoding makes none.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = list(seeds)
        self._generators: dict[int, np.random.Generator] = {}

    def uniform(self, rows: Sequence[int], *shape: int) -> np.ndarray:
        """float64 [R, *shape] in [0, 1)."""
        return np.stack([self._generator(row).random(shape) for row in rows])

    def gumbel(self, rows: Sequence[int], *shape: int) -> np.ndarray:
        """float64 [R, *shape]: float32 Gumbel noise is truncated and sharpens sampling (ReMDM, appendix)."""
        return -np.log(-np.log(self.uniform(rows, *shape).clip(1e-300, 1 - 1e-16)))

    def normal(self, rows: Sequence[int], *shape: int) -> np.ndarray:
        """float32 [R, *shape]."""
        return np.stack([self._generator(row).standard_normal(shape) for row in rows]).astype(np.float32)

    def _generator(self, row: int) -> np.random.Generator:
        if row not in self._generators:
            self._generators[row] = np.random.Generator(np.random.Philox(key=self._seeds[row] % 2**64))
        return self._generators[row]
