"""Absorbing-state diffusion over action slots: schedule, corruption, unmask counts, remasking rules. Pure functions.

Time t is in [0, 1]; at t = 1 every slot is masked. After "Discrete Diffusion VLA" (arXiv 2508.20072, section 3.2)
and MaskGIT (arXiv 2202.04200). Slots are the L = horizon * dimensions tokens of a chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mask_rate(t: Tensor) -> Tensor:
    """Expected share of masked slots: cos(pi/2 * (1 - t)); 0 at t = 0, 1 at t = 1, mean 2/pi."""
    return torch.cos(0.5 * math.pi * (1.0 - t))


def num_masked(t: Tensor, num_slots: Tensor | int) -> Tensor:
    """Exact number of slots to mask at t [B], at least one: int64 [B]."""
    count = torch.round(mask_rate(t) * num_slots).long()
    return torch.minimum(count.clamp_min(1), torch.as_tensor(num_slots, device=t.device).long())


def uniform(shape: tuple[int, ...] | torch.Size, generator: torch.Generator | None) -> Tensor:
    """Uniform [0, 1) on the generator's device."""
    return torch.rand(shape, generator=generator, device="cpu" if generator is None else generator.device)


def stratified_times(batch: int, draws: int, generator: torch.Generator | None) -> Tensor:
    """t in [0, 1) for `draws` corruptions of each sample, one in each of `draws` equal strata. [batch, draws]"""
    offset = uniform((batch, draws), generator)
    return (torch.arange(draws, device=offset.device) + offset) / draws


@dataclass(frozen=True)
class Corruption:
    """What the model sees and what it must answer for, each [B, L]."""

    noisy_tokens: Tensor  # int64
    is_masked: Tensor  # bool; these are predicted from nothing
    is_replaced: Tensor  # bool; visible but wrong


def corrupt(
    clean_tokens: Tensor,
    t: Tensor,
    mask_id: int,
    *,
    generator: torch.Generator | None = None,
    is_known: Tensor | None = None,
) -> Corruption:
    """Mask exactly `num_masked(t, free slots)` of the slots that are not known, chosen uniformly.

    clean_tokens: int64 [B, L]. t: [B]. is_known: bool [B, L], slots that stay visible (a committed beginning).
    """
    known = torch.zeros_like(clean_tokens, dtype=torch.bool) if is_known is None else is_known
    count = num_masked(t, (~known).sum(1))
    order = uniform(clean_tokens.shape, generator)
    rank = order.masked_fill(known, 2.0).argsort(dim=1).argsort(dim=1)  # known slots rank last
    is_masked = rank < count[:, None]
    noisy = clean_tokens.masked_fill(is_masked, mask_id)
    return Corruption(noisy, is_masked, torch.zeros_like(is_masked))


def replace_visible(
    corruption: Corruption,
    clean_tokens: Tensor,
    share: float,
    first_id: Tensor,
    last_id: Tensor,
    *,
    jitter: int = 8,
    generator: torch.Generator | None = None,
    is_known: Tensor | None = None,
) -> Corruption:
    """Replace a share of the visible slots by wrong tokens, half near the truth (within `jitter` ids), half anywhere.

    Training on them makes the confidence at committed slots mean something, which remasking rules rely on.
    first_id, last_id: int64 [L], the inclusive range of ids each slot may hold.
    """
    shape = clean_tokens.shape
    visible = ~corruption.is_masked if is_known is None else ~corruption.is_masked & ~is_known
    chosen = visible & (uniform(shape, generator) < share)
    near = clean_tokens + torch.round((2 * uniform(shape, generator) - 1) * jitter).long()
    anywhere = first_id + (uniform(shape, generator) * (last_id - first_id + 1)).long()
    wrong = torch.where(uniform(shape, generator) < 0.5, near, anywhere)
    wrong = torch.minimum(torch.maximum(wrong, first_id.expand(shape)), last_id.expand(shape))
    chosen &= wrong != clean_tokens
    return Corruption(torch.where(chosen, wrong, corruption.noisy_tokens), corruption.is_masked, chosen)


def masked_after(round_index: int, rounds: int, num_slots: Tensor) -> Tensor:
    """How many of num_slots [B] may still be masked after a round (0-based): floor(L cos(pi/2 (r+1)/T)), 0 at the end."""
    if round_index + 1 >= rounds:
        return torch.zeros_like(num_slots)
    share = math.cos(0.5 * math.pi * (round_index + 1) / rounds)
    return torch.floor(num_slots.double() * share + 1e-9).long()


def unmask_counts(num_slots: int, rounds: int) -> list[int]:
    """Slots the cosine quota commits in each round; they sum to num_slots."""
    slots = torch.tensor([num_slots])
    left = [num_slots] + [int(masked_after(index, rounds, slots)) for index in range(rounds)]
    return [before - after for before, after in zip(left, left[1:])]


# Remasking: which committed slots to doubt. Each rule maps confidences to a doubt [B, L], > 0 where the slot should be
# masked again; the largest doubts go first if the round's budget does not cover all.


@dataclass(frozen=True)
class RoundState:
    """What a rule may look at; tensors [B, L]."""

    confidence: Tensor  # now, probability of the token that stands there
    committed_confidence: Tensor  # when it was committed
    progress: float  # (round + 1) / rounds, in (0, 1]
    next_progress: float  # the same after the coming round
    noise: Tensor  # uniform [0, 1), seeded per row


def remask_none(state: RoundState) -> Tensor:
    return torch.zeros_like(state.confidence)


def remask_threshold(state: RoundState) -> Tensor:
    """Doubt what has confidence below 0.5 * progress (the paper's eta_abs, v4 eq. 9)."""
    return 0.5 * state.progress - state.confidence


def remask_residual_drop(state: RoundState, drop: float = 0.3) -> Tensor:
    """Doubt what lost more than `drop` of confidence since it was committed (the paper's v1-v3 check)."""
    return state.committed_confidence - state.confidence - drop


def remask_remdm(state: RoundState, eta: float = 0.2) -> Tensor:
    """ReMDM-conf (arXiv 2503.00307): remask with probability eta * sigma_max, more for the less confident.

    sigma_max = min(1, (1 - alpha_next) / alpha_now) with alpha = 1 - mask rate. The share is spread over slots by
    softmax(-confidence at commit) and drawn with the row's noise.
    """
    alpha_now = 1.0 - math.cos(0.5 * math.pi * state.progress)
    alpha_next = 1.0 - math.cos(0.5 * math.pi * state.next_progress)
    sigma = eta * min(1.0, (1.0 - alpha_next) / max(alpha_now, 1e-6))
    weight = torch.softmax(-state.committed_confidence, dim=1) * state.confidence.shape[1]
    return sigma * weight - state.noise


REMASK_RULES = {
    "none": remask_none,
    "threshold": remask_threshold,
    "residual_drop": remask_residual_drop,
    "remdm": remask_remdm,
}
