"""Which token comes next: penalties, temperature, nucleus, and noise that belongs to a position, not to a stream.

A sampled token is  argmax_i (adjusted logit_i + g_i)  with Gumbel noise g (Gumbel 1954; Yellott 1977), whose law is exactly the
softmax. g is a function of (seed, absolute position) through the counter-based generator Philox (Salmon et al. 2011), so the
token at a position depends on the target's logits there and on nothing else: not on how many random numbers were used before,
on batch mates, or on what a drafter guessed. Speculation is then lossless sample by sample, not only in distribution.

Everything here is numpy in float64: the naive decoder and the engine share it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral

import numpy as np

_STREAM = 0x52454D41534B  # second word of the generator's key: apart from any other use of the same seed


class SamplingError(ValueError):
    """A setting of SamplingConfig, `field`, is out of range."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are picked. Raises SamplingError naming the field that is out of range."""

    temperature: float = 0.0  # 0: the most likely token, lowest id among equals
    top_p: float = 1.0  # smallest set of most likely tokens with at least this mass, (0, 1]
    top_k: int = 0  # only the k most likely tokens; 0: all
    seed: int = 0  # 0 .. 2**64 - 1
    repetition_penalty: float = 1.0  # of tokens in prompt or answer: logit / r if positive, logit * r if not (CTRL, 2019)
    presence_penalty: float = 0.0  # subtracted from the logit of a token that the answer holds
    frequency_penalty: float = 0.0  # subtracted once for each time that the answer holds the token
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logit of a token
    allowed_ids: tuple[int, ...] | None = None  # None: all

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "a finite number, 0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (isinstance(self.top_k, Integral) and self.top_k >= 0, "a whole number, 0 (all) or more"),
            "seed": (isinstance(self.seed, Integral) and 0 <= self.seed < 2**64, "a whole number in 0 .. 2**64 - 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a positive number"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "logit_bias": (all(math.isfinite(bias) for bias in self.logit_bias.values()), "finite numbers by token id"),
            "allowed_ids": (self.allowed_ids is None or len(self.allowed_ids) > 0, "at least one token id, or None for all"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise SamplingError(name, f"SamplingConfig.{name} is {getattr(self, name)!r}; allowed: {allowed}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits."""
        return self.is_greedy and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Penalties, biases or an allow list act on the logits."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not neutral or bool(self.logit_bias) or self.allowed_ids is not None


def adjusted_logits(
    logits: np.ndarray, config: SamplingConfig, prompt: Sequence[int], answer: Sequence[int]
) -> np.ndarray:
    """Logits [V] of the position after `prompt + answer`, penalties, biases and allow list applied; float64 [V].

    Negative ids (image positions) count as no token.
    """
    result = logits.astype(np.float64, copy=True)
    if not config.changes_logits:
        return result
    said = np.asarray(answer, dtype=np.int64)
    if config.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([np.asarray(prompt, dtype=np.int64), said]))
        seen = seen[seen >= 0]
        values = result[seen]
        result[seen] = np.where(values > 0, values / config.repetition_penalty, values * config.repetition_penalty)
    if config.presence_penalty or config.frequency_penalty:
        ids, counts = np.unique(said, return_counts=True)
        result[ids] -= config.presence_penalty + config.frequency_penalty * counts
    for token, bias in config.logit_bias.items():
        result[token] += bias
    if config.allowed_ids is not None:
        allowed = np.asarray(config.allowed_ids)
        kept = np.full_like(result, -np.inf)
        kept[allowed] = result[allowed]
        result = kept
    return result


def truncated_logits(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Adjusted logits [V] / temperature, with -inf outside the top k and then outside the nucleus; lowest ids win ties.

    Raises ValueError at temperature 0, where there is no distribution.
    """
    if config.is_greedy:
        raise ValueError("temperature is 0: the token is the argmax, there is nothing to truncate.")
    scaled = logits / config.temperature
    if (config.top_k == 0 or config.top_k >= len(scaled)) and config.top_p == 1.0:
        return scaled
    mass = np.exp(scaled - scaled.max())
    # Only what can be kept is sorted: the k-th largest bounds the top k, and tokens below (1 - top_p) / V of the mass are
    # together less than what the nucleus leaves out (half of it, to be clear of rounding).
    least = (1 - config.top_p) * 0.5 / len(scaled) * mass.sum() if config.top_p < 1.0 else 0.0
    if 0 < config.top_k < len(scaled):
        kth = np.partition(mass, -config.top_k)[-config.top_k]
        total = None
        candidates = np.flatnonzero(mass >= kth)
    else:
        total = mass.sum()
        candidates = np.flatnonzero(mass >= least)
    order = candidates[np.argsort(-scaled[candidates], kind="stable")]
    order = order[: config.top_k] if config.top_k else order
    if config.top_p < 1.0:
        sums = np.cumsum(mass[order])
        bound = config.top_p * (sums[-1] if total is None else total)
        order = order[: int((sums - mass[order] < bound).sum())]
    result = np.full_like(scaled, -np.inf)
    result[order] = scaled[order]
    return result


def truncated_logits_reference(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The definition of `truncated_logits`: sort everything."""
    scaled = logits / config.temperature
    order = np.argsort(-scaled, kind="stable")[: config.top_k or None]
    mass = np.exp(scaled[order] - scaled[order[0]])
    kept = order[np.cumsum(mass) - mass < config.top_p * mass.sum()] if config.top_p < 1.0 else order
    result = np.full_like(scaled, -np.inf)
    result[kept] = scaled[kept]
    return result


def probabilities(
    logits: np.ndarray, config: SamplingConfig, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> np.ndarray:
    """The law of `choose` over positions: float64 [V], summing to 1; one-hot at temperature 0."""
    adjusted = adjusted_logits(logits, config, prompt, answer)
    if config.is_greedy:
        return (np.arange(len(adjusted)) == adjusted.argmax()).astype(np.float64)
    truncated = truncated_logits(adjusted, config)
    mass = np.exp(truncated - truncated.max())
    return mass / mass.sum()


@lru_cache(maxsize=128)  # a drafter and the verification ask for the same positions
def gumbel_noise(seed: int, position: int, size: int) -> np.ndarray:
    """Standard Gumbel noise float64 [size] of a position, read-only: a pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, position, 0]))
    with np.errstate(divide="ignore"):  # a uniform 0 is noise -inf: never chosen
        noise = -np.log(-np.log(generator.random(size)))
    noise.flags.writeable = False
    return noise


def choose(
    logits: np.ndarray, config: SamplingConfig, position: int, prompt: Sequence[int] = (), answer: Sequence[int] = ()
) -> int:
    """The token of sequence position `position`, whose logits [V] the target computed from `prompt + answer`."""
    adjusted = adjusted_logits(logits, config, prompt, answer)
    if config.is_greedy:
        return int(adjusted.argmax())
    return int((truncated_logits(adjusted, config) + gumbel_noise(config.seed, position, len(adjusted))).argmax())
