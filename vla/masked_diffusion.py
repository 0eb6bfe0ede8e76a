"""Absorbing-state diffusion over action slots: schedule, corruption, unmask counts. Pure functions.

Time t is in [0, 1]; at t = 1 every slot is masked. After "Discrete Diffusion VLA" (arXiv 2508.20072, section 3.2)
and MaskGIT (arXiv 2202.04200). Slots are the L = horizon * dimensions tokens of a chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vla.unmasking import ROUNDING, masked_share


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
    is_suspect: Tensor  # bool; visible, and wrong in some share: to be predicted too, whether right or wrong


def corrupt(
    clean_tokens: Tensor,
    t: Tensor,
    mask_id: int,
    *,
    generator: torch.Generator | None = None,
    is_known: Tensor | None = None,
    is_pad: Tensor | None = None,
) -> Corruption:
    """Mask exactly `num_masked(t, free slots)` of the slots that are neither known nor padding, chosen uniformly.

    clean_tokens: int64 [B, L]. t: [B]. is_known: bool [B, L], slots that stay visible (a committed beginning). is_pad: bool
    [B, L], slots that hold no action but a copy of the last one: always masked, since shown they would give that away.
    """
    fixed = torch.zeros_like(clean_tokens, dtype=torch.bool) if is_known is None else is_known
    fixed = fixed if is_pad is None else fixed | is_pad
    count = num_masked(t, (~fixed).sum(1))
    order = uniform(clean_tokens.shape, generator)
    rank = order.masked_fill(fixed, 2.0).argsort(dim=1).argsort(dim=1)  # the others rank last
    is_masked = rank < count[:, None]
    is_masked = is_masked if is_pad is None else is_masked | is_pad
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
    """Replace a share of the visible slots by other tokens, half near the truth (within `jitter` ids), half anywhere.

    All visible slots that are not known become suspect, the right ones too: trained on both in their true proportion, the
    probability of a shown token is that of its being right, which remasking rules read. Trained on the wrong ones alone it
    would be 0 at every visible slot. A draw that meets the token which is there leaves it.
    first_id, last_id: int64 [L], the inclusive range of ids each slot may hold.
    """
    shape = clean_tokens.shape
    visible = ~corruption.is_masked if is_known is None else ~corruption.is_masked & ~is_known
    chosen = visible & (uniform(shape, generator) < share)
    near = clean_tokens + torch.round((2 * uniform(shape, generator) - 1) * jitter).long()
    anywhere = first_id + (uniform(shape, generator) * (last_id - first_id + 1)).long()
    other = torch.where(uniform(shape, generator) < 0.5, near, anywhere)
    other = torch.minimum(torch.maximum(other, first_id.expand(shape)), last_id.expand(shape))
    return Corruption(torch.where(chosen, other, corruption.noisy_tokens), corruption.is_masked, visible)


def masked_after(round_index: int, rounds: int, num_slots: Tensor) -> Tensor:
    """How many of num_slots [B] may still be masked after a round (0-based): floor(L cos(pi/2 (r+1)/T)), 0 at the end."""
    return torch.floor(num_slots.double() * masked_share(round_index, rounds) + ROUNDING).long()


def unmask_counts(num_slots: int, rounds: int) -> list[int]:
    """Slots the cosine quota commits in each round; they sum to num_slots."""
    slots = torch.tensor([num_slots])
    left = [num_slots] + [int(masked_after(index, rounds, slots)) for index in range(rounds)]
    return [before - after for before, after in zip(left, left[1:])]
