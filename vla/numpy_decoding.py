"""`vla.decoding.decode` in numpy alone: the same tokens from the same logits, seeds and settings, without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vla.unmasking import REMASK_RULES, ROUNDING, DecodeConfig, RoundState, RowNoise, masked_share


@dataclass(frozen=True)
class Decoded:
    """A decoded batch of tokens, see `vla.decoding.Decoded`."""

    tokens: np.ndarray  # int64 [B, L]
    probs: np.ndarray  # float32 [B, L, V]
    confidence: np.ndarray  # float32 [B, L]
    rounds: np.ndarray  # int64 [B]


# noisy tokens [R, L], rows of the batch they belong to [R] -> float32 logits [R, L, V], -inf at ids a slot may not hold
LogitsFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def decode(
    logits_of: LogitsFunction,
    known_tokens: np.ndarray,
    is_known: np.ndarray,
    mask_id: int,
    config: DecodeConfig,
    seeds: Sequence[int] | None = None,
    is_ordinal: np.ndarray | None = None,
) -> Decoded:
    """Unmask every slot that is not known: see `vla.decoding.decode`, of which this is the twin line by line."""
    tokens = np.where(is_known, known_tokens, mask_id)
    batch = len(tokens)
    num_free = (~is_known).sum(1)
    radius = np.full(tokens.shape[1], config.confidence_radius)
    if is_ordinal is not None:
        radius = radius * is_ordinal
    row_noise = RowNoise(seeds or [0] * batch)
    confidence = is_known.astype(np.float32)
    probs: np.ndarray | None = None
    rounds_used = np.zeros(batch, dtype=np.int64)

    for index in range(config.rounds):
        rows = np.flatnonzero((tokens == mask_id).any(1))
        if len(rows) == 0:
            break
        row_probs = softmax(logits_of(tokens[rows], rows))
        if probs is None:
            probs = one_hot(np.where(is_known, known_tokens, 0), row_probs.shape[-1]) * is_known[..., None]
        rounds_used[rows] += 1
        noise = _Noise(row_noise, rows.tolist())
        now = tokens[rows]
        masked = now == mask_id
        proposal = _propose(row_probs, config.token_temperature, noise)
        score = confidence_of(row_probs, proposal, radius)
        chosen = _commit(score, masked, num_free[rows], index, config, noise)

        now = np.where(chosen, proposal, now)
        confidence[rows] = np.where(chosen, score, confidence[rows])
        probs[rows] = np.where(chosen[..., None], row_probs, probs[rows])
        if config.remask != "none" and index + 1 < config.rounds:
            free = ~is_known[rows] & ~masked  # committed in earlier rounds
            standing = confidence_of(row_probs, np.minimum(now, row_probs.shape[-1] - 1), radius)
            doubted = _doubt(standing, confidence[rows], free, chosen.sum(1) - 1, index, config, noise)
            now = np.where(doubted, mask_id, now)
        tokens[rows] = now

    if probs is None:  # nothing was masked: every slot was known, and holds one of the ids below the mask's
        probs = one_hot(known_tokens, mask_id)
    return Decoded(tokens, probs, confidence, rounds_used)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in the dtype given."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def one_hot(tokens: np.ndarray, size: int) -> np.ndarray:
    """float32 [..., size] of ids [...]."""
    return (tokens[..., None] == np.arange(size)).astype(np.float32)


def confidence_of(probs: np.ndarray, tokens: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Probability within radius [L] ids of the tokens [R, L]: float32 [R, L]. See `vla.decoding.confidence_of`."""
    if not radius.any():
        return _at(probs, tokens)
    sums = np.zeros((*probs.shape[:-1], probs.shape[-1] + 1), dtype=np.float32)
    sums[..., 1:] = np.cumsum(probs, axis=-1, dtype=np.float64)  # torch too sums in float64 and rounds at the end
    above = _at(sums, np.minimum(tokens + radius + 1, probs.shape[-1]))
    below = _at(sums, np.maximum(tokens - radius, 0))
    return (above - below).clip(0.0, 1.0)


class _Noise:
    """The draws of some rows."""

    def __init__(self, source: RowNoise, rows: list[int]) -> None:
        self.source, self.rows = source, rows

    def uniform(self, *shape: int) -> np.ndarray:
        return self.source.uniform(self.rows, *shape)

    def gumbel(self, *shape: int) -> np.ndarray:
        return self.source.gumbel(self.rows, *shape)


def _propose(probs: np.ndarray, temperature: float, noise: _Noise) -> np.ndarray:
    """A token for every slot: int64 [R, L]."""
    if temperature == 0.0:
        return probs.argmax(-1)
    return (_log(probs) / temperature + noise.gumbel(*probs.shape[1:])).argmax(-1)


def _commit(
    score: np.ndarray, masked: np.ndarray, num_free: np.ndarray, index: int, config: DecodeConfig, noise: _Noise
) -> np.ndarray:
    """Which masked slots become tokens in this round: bool [R, L]."""
    order = np.log(np.maximum(score, np.finfo(score.dtype).tiny).astype(np.float64))
    if config.order_temperature > 0.0:
        progress = (index + 1) / config.rounds
        order = order + config.order_temperature * (1.0 - progress) * noise.gumbel(score.shape[1])
    order = np.where(masked, order, -np.inf)
    left = np.floor(num_free * masked_share(index, config.rounds) + ROUNDING).astype(np.int64)
    quota = np.maximum(masked.sum(1) - left, 1)
    return masked & ((_descending_rank(order) < quota[:, None]) | (score >= np.float32(config.threshold)))


def _doubt(
    standing: np.ndarray,
    committed: np.ndarray,
    free: np.ndarray,
    budget: np.ndarray,
    index: int,
    config: DecodeConfig,
    noise: _Noise,
) -> np.ndarray:
    """Which earlier committed slots are masked again, at most `budget` [R] of a row: bool [R, L]."""
    state = RoundState(
        confidence=standing,
        committed_confidence=committed,
        relative_doubt=softmax(np.where(free, -committed, np.float32(-1e9))) * free.sum(1, keepdims=True),
        progress=(index + 1) / config.rounds,
        next_progress=(index + 2) / config.rounds,
        noise=noise.uniform(standing.shape[1]).astype(np.float32),
    )
    doubt = np.where(free, REMASK_RULES[config.remask](state), -np.inf)
    return (doubt > 0) & (_descending_rank(doubt) < budget[:, None])


def _descending_rank(values: np.ndarray) -> np.ndarray:
    """Place of each value in its row, largest first, ties by index: int64 [R, L]."""
    return np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """values [R, L, V] at index [R, L]."""
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _log(values: np.ndarray) -> np.ndarray:
    """Natural logarithm in float64, -inf at zero."""
    with np.errstate(divide="ignore"):
        return np.log(values.astype(np.float64))
