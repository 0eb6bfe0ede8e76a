"""Iterative unmasking: one loop for fresh chunks, chunks that continue known actions, and one-round decoding.

Where there is no torch, the same tokens come from its twin, `vla.numpy_decoding`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.masked_diffusion import masked_after
from vla.unmasking import REMASK_RULES, DecodeConfig, RoundState, RowNoise


@dataclass(frozen=True)
class Decoded:
    """A decoded batch of tokens. Probabilities are those a slot's token was committed with; one-hot at known slots."""

    tokens: Tensor  # int64 [B, L]
    probs: Tensor  # float32 [B, L, V]
    confidence: Tensor  # float32 [B, L], see `confidence_of`, when the token was committed; 1 at known slots
    rounds: Tensor  # int64 [B], passes each row took
    committed: Tensor | None = None  # int64 [B, L], the round, from 1, whose token each slot kept; 0 at known slots


# noisy tokens [R, L], rows of the batch they belong to [R] -> logits [R, L, V], -inf at ids a slot may not hold
LogitsFunction = Callable[[Tensor, Tensor], Tensor]


def decode(
    logits_of: LogitsFunction,
    known_tokens: Tensor,
    is_known: Tensor,
    mask_id: int,
    config: DecodeConfig,
    seeds: Sequence[int] | None = None,
    is_ordinal: Tensor | None = None,
) -> Decoded:
    """Unmask every slot that is not known. is_ordinal: bool [L], the slots that confidence_radius is for; default all.

    known_tokens: int64 [B, L], read where is_known [B, L]; those slots are never changed. Per round: predict all masked
    slots, commit the most confident until at most the cosine quota stays masked, and everything above the threshold;
    then the remasking rule may return doubtful slots, fewer than were just committed, so the last round ends the loop.
    A row whose slots are all committed takes no further part. A row depends on its own inputs and seed only.
    """
    tokens = torch.where(is_known, known_tokens, torch.full_like(known_tokens, mask_id))
    batch, device = tokens.shape[0], tokens.device
    num_free = (~is_known).sum(1)
    radius = torch.full_like(tokens[0], config.confidence_radius)
    if is_ordinal is not None:
        radius = radius * is_ordinal
    row_noise = RowNoise(seeds or [0] * batch)
    confidence = is_known.float()
    probs: Tensor | None = None
    rounds_used = torch.zeros(batch, dtype=torch.long, device=device)
    committed = torch.zeros_like(tokens)

    for index in range(config.rounds):
        rows = (tokens == mask_id).any(1).nonzero()[:, 0]
        if rows.numel() == 0:
            break
        row_probs = torch.softmax(logits_of(tokens[rows], rows).float(), dim=-1)
        if probs is None:
            probs = torch.zeros(batch, tokens.shape[1], row_probs.shape[-1], device=device)
            probs.scatter_(2, torch.where(is_known, known_tokens, 0)[..., None], is_known.float()[..., None])
        rounds_used[rows] += 1
        noise = _Noise(row_noise, rows)
        now = tokens[rows]
        masked = now == mask_id
        proposal = _propose(row_probs, config.token_temperature, noise)
        score = confidence_of(row_probs, proposal, radius)
        chosen = _commit(score, masked, num_free[rows], index, config, noise)

        now = torch.where(chosen, proposal, now)
        confidence[rows] = torch.where(chosen, score, confidence[rows])
        committed[rows] = torch.where(chosen, index + 1, committed[rows])
        probs[rows] = torch.where(chosen[..., None], row_probs, probs[rows])
        if config.remask != "none" and index + 1 < config.rounds:
            free = ~is_known[rows] & ~masked  # committed in earlier rounds
            standing = confidence_of(row_probs, now.clamp_max(row_probs.shape[-1] - 1), radius)
            doubted = _doubt(standing, confidence[rows], free, chosen.sum(1) - 1, index, config, noise)
            now = now.masked_fill(doubted, mask_id)
        tokens[rows] = now

    if probs is None:  # nothing was masked: every slot was known, and holds one of the ids below the mask's
        probs = torch.nn.functional.one_hot(known_tokens, mask_id).float()
    return Decoded(tokens, probs, confidence, rounds_used, committed)


def confidence_of(probs: Tensor, tokens: Tensor, radius: Tensor) -> Tensor:
    """Probability within radius [L] ids of the tokens [R, L]: float [R, L].

    Radius 0 is the token's own probability. Neighbouring bins mean nearly the same motion, so a model trained on
    ordinal targets spreads its certainty over them and no single bin says how sure it is.
    """
    if not radius.any():
        return probs.gather(2, tokens[..., None])[..., 0]
    sums = torch.nn.functional.pad(probs.cumsum(-1), (1, 0))
    above = sums.gather(2, (tokens + radius + 1).clamp_max(probs.shape[-1])[..., None])
    below = sums.gather(2, (tokens - radius).clamp_min(0)[..., None])
    return (above - below)[..., 0].clamp(0.0, 1.0)


class _Noise:
    """The draws of some rows, as tensors on their device."""

    def __init__(self, source: RowNoise, rows: Tensor) -> None:
        self.source, self.rows, self.device = source, rows.tolist(), rows.device

    def uniform(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.source.uniform(self.rows, *shape)).to(self.device)

    def gumbel(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.source.gumbel(self.rows, *shape)).to(self.device)


def _propose(probs: Tensor, temperature: float, noise: _Noise) -> Tensor:
    """A token for every slot: int64 [R, L]."""
    if temperature == 0.0:
        return probs.argmax(-1)
    return (probs.double().log() / temperature + noise.gumbel(*probs.shape[1:])).argmax(-1)


def _commit(score: Tensor, masked: Tensor, num_free: Tensor, index: int, config: DecodeConfig, noise: _Noise) -> Tensor:
    """Which masked slots become tokens in this round: bool [R, L]."""
    order = score.clamp_min(torch.finfo(score.dtype).tiny).double().log()  # a score of 0 still goes before what is not masked
    if config.order_temperature > 0.0:
        progress = (index + 1) / config.rounds
        order = order + config.order_temperature * (1.0 - progress) * noise.gumbel(score.shape[1])
    order = order.masked_fill(~masked, -torch.inf)
    quota = masked.sum(1) - masked_after(index, config.rounds, num_free)
    rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return masked & ((rank < quota.clamp_min(1)[:, None]) | (score >= config.threshold))


def _doubt(
    standing: Tensor, committed: Tensor, free: Tensor, budget: Tensor, index: int, config: DecodeConfig, noise: _Noise
) -> Tensor:
    """Which earlier committed slots are masked again, at most `budget` [R] of a row: bool [R, L]."""
    state = RoundState(
        confidence=standing,
        committed_confidence=committed,
        relative_doubt=torch.softmax((-committed).masked_fill(~free, -1e9), dim=1) * free.sum(1, keepdim=True),
        progress=(index + 1) / config.rounds,
        next_progress=(index + 2) / config.rounds,
        noise=noise.uniform(standing.shape[1]).float(),
    )
    doubt = REMASK_RULES[config.remask](state).masked_fill(~free, -torch.inf)
    rank = doubt.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (doubt > 0) & (rank < budget[:, None])
