"""Ways to turn an encoded prefix into action tokens on one backbone: discrete diffusion, parallel, autoregressive.

A head owns its training loss and its decoding; tokens, data, trainer and backbone are shared, so a comparison of heads
compares nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from multimodal.config import check_choice
from multimodal.losses import CrossEntropy, Objective
from vla.action_tokenizer import ActionTokenizer
from vla.decoding import Decoded, DecodeConfig, decode
from vla.masked_diffusion import Corruption, corrupt, replace_visible, stratified_times
from vla.model import VLA, Prefix


@dataclass(frozen=True)
class HeadConfig:
    """Which head, and what its training sees."""

    type: str = "discrete_diffusion"  # discrete_diffusion | parallel | autoregressive
    mask_draws: int = 4  # discrete diffusion: corruptions trained per encoded prefix
    replace_visible: float = 0.1  # discrete diffusion: share of visible tokens made wrong, and supervised
    known_prefix: float = 0.25  # probability that a chunk's first steps are given, as when continuing a running chunk
    max_known_steps: int = 4

    def __post_init__(self) -> None:
        check_choice("HeadConfig", "type", self.type, tuple(HEADS))
        if self.mask_draws < 1:
            raise ValueError(f"HeadConfig.mask_draws is {self.mask_draws}; at least one corruption per prefix is needed.")


@dataclass(frozen=True)
class ActionBatch:
    """Targets of a training batch."""

    tokens: Tensor  # int64 [B, H, D]
    values: Tensor  # float32 [B, H, D], unrounded ids (ActionTokenizer.coordinates)
    is_pad: Tensor  # bool [B, H], steps after the episode's end


@dataclass(frozen=True)
class HeadLoss:
    """A loss to be divided by the global sum of `normalizer`."""

    loss_sum: Tensor
    normalizer: int


class ActionHead(Protocol):
    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss: ...

    def decode(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decoded:
        """Decode all slots [B, L]; slots where is_known keep the tokens `known`."""
        ...


class SlotLayout:
    """What each of the L slots may hold, as tensors on one device."""

    def __init__(self, tokenizer: ActionTokenizer, horizon: int, device: torch.device) -> None:
        ranges = torch.tensor([tokenizer.valid_range(dim) for dim in range(tokenizer.action_dim)], device=device)
        self.ranges = ranges.repeat(horizon, 1)  # [L, 2], end excluded
        self.is_ordinal = (ranges[:, 1] - ranges[:, 0] > 2).repeat(horizon)  # [L]
        self.allowed = torch.as_tensor(tokenizer.allowed, device=device).repeat(horizon, 1)  # [L, V]


def supervised_loss(
    model: VLA,
    objective: Objective,
    hidden: Tensor,
    targets: Tensor,
    values: Tensor,
    is_supervised: Tensor,
    layout: SlotLayout,
) -> HeadLoss:
    """The objective over each slot's own ids, averaged within a row, summed over rows.

    hidden [R, L, width]; targets, values, is_supervised [R, L]. Every row weighs the same however many slots it
    supervises.
    """
    per_row = is_supervised.sum(1)
    row, slot = is_supervised.nonzero(as_tuple=True)
    loss_sum = objective(
        hidden[row, slot],
        model.action_head.weight,
        targets[row, slot],
        values=values[row, slot],
        token_weight=1.0 / per_row[row],
        vocab_range=layout.ranges[slot],
        reduction="sum",
    )
    return HeadLoss(loss_sum, int((per_row > 0).sum()))


class DiscreteDiffusionHead:
    """Masked tokens predicted from visible ones; decoded by iterative unmasking."""

    def __init__(self, config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> None:
        self.config, self.tokenizer, self.objective = config, tokenizer, objective

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        draws = self._draws()
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, batch.tokens.device)
        clean = batch.tokens.flatten(1).repeat_interleave(draws, dim=0)  # [B * K, L]
        is_pad = batch.is_pad.repeat_interleave(model.config.action_dim, dim=1).repeat_interleave(draws, dim=0)
        is_known = self._draw_known(clean.shape[0], model, generator)
        corruption = self._corrupt(clean, is_known, layout, generator)
        hidden = model.action_hidden(corruption.noisy_tokens, prefix.repeat(draws) if draws > 1 else prefix)
        is_supervised = (corruption.is_masked | corruption.is_replaced) & ~is_pad
        values = batch.values.flatten(1).repeat_interleave(draws, dim=0)
        return supervised_loss(model, self.objective, hidden, clean, values, is_supervised, layout)

    def decode(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decoded:
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, known.device)

        def logits_of(tokens: Tensor, rows: Tensor) -> Tensor:
            return model.action_logits(model.action_hidden(tokens, prefix.select(rows)), layout.allowed)

        return decode(logits_of, known, is_known, model.config.mask_id, self._rounds(config), seeds, layout.is_ordinal)

    def _draws(self) -> int:
        return self.config.mask_draws

    def _rounds(self, config: DecodeConfig) -> DecodeConfig:
        return config

    def _corrupt(
        self, clean: Tensor, is_known: Tensor, layout: SlotLayout, generator: torch.Generator
    ) -> Corruption:
        draws, mask_id = self.config.mask_draws, self.tokenizer.mask_id
        t = stratified_times(clean.shape[0] // draws, draws, generator).flatten()
        corruption = corrupt(clean, t, mask_id, generator=generator, is_known=is_known)
        if self.config.replace_visible == 0.0:
            return corruption
        first, last = layout.ranges[:, 0], layout.ranges[:, 1] - 1
        share = self.config.replace_visible
        return replace_visible(corruption, clean, share, first, last, generator=generator, is_known=is_known)

    def _draw_known(self, rows: int, model: VLA, generator: torch.Generator) -> Tensor:
        """Some rows start with one to max_known_steps given steps: bool [rows, L]."""
        most = min(self.config.max_known_steps, model.config.action_horizon - 1)
        device = generator.device
        chosen = torch.rand(rows, generator=generator, device=device) < self.config.known_prefix
        steps = torch.randint(1, most + 1, (rows,), generator=generator, device=device) * chosen
        return torch.arange(model.config.num_slots, device=device) < (steps * model.config.action_dim)[:, None]


class ParallelHead(DiscreteDiffusionHead):
    """Every free slot masked, always; decoded in one round (the parallel decoding of OpenVLA-OFT, as tokens)."""

    def _draws(self) -> int:
        return 1

    def _rounds(self, config: DecodeConfig) -> DecodeConfig:
        return replace(config, rounds=1)

    def _corrupt(
        self, clean: Tensor, is_known: Tensor, layout: SlotLayout, generator: torch.Generator
    ) -> Corruption:
        return corrupt(clean, torch.ones(clean.shape[0], device=clean.device), self.tokenizer.mask_id, generator=generator, is_known=is_known)


class AutoregressiveHead:
    """Tokens left to right with a causal mask and a key/value cache, greedily (OpenVLA's decoding, per chunk)."""

    def __init__(self, config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> None:
        self.config, self.tokenizer, self.objective = config, tokenizer, objective

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, batch.tokens.device)
        clean = batch.tokens.flatten(1)
        previous = torch.cat([torch.full_like(clean[:, :1], model.config.mask_id), clean[:, :-1]], dim=1)
        hidden = model.causal_hidden(previous, prefix, prefix.cache.view())
        is_supervised = ~batch.is_pad.repeat_interleave(model.config.action_dim, dim=1)
        return supervised_loss(model, self.objective, hidden, clean, batch.values.flatten(1), is_supervised, layout)

    def decode(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decoded:
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, known.device)
        cache = prefix.cache.view()
        previous = torch.full_like(known[:, :1], model.config.mask_id)
        tokens, probs = [], []
        for slot in range(model.config.num_slots):
            hidden = model.causal_hidden(previous, prefix, cache, slot)
            slot_probs = torch.softmax(model.action_logits(hidden, layout.allowed[slot])[:, 0], dim=-1)
            given = is_known[:, slot]
            token = torch.where(given, known[:, slot], slot_probs.argmax(-1))
            one_hot = torch.nn.functional.one_hot(token, slot_probs.shape[-1]).float()
            probs.append(torch.where(given[:, None], one_hot, slot_probs))
            tokens.append(token)
            previous = token[:, None]
        chosen, all_probs = torch.stack(tokens, dim=1), torch.stack(probs, dim=1)
        confidence = all_probs.gather(2, chosen[..., None])[..., 0]
        rounds = torch.full((known.shape[0],), model.config.num_slots, device=known.device)
        return Decoded(chosen, all_probs, confidence, rounds)


HEADS: dict[str, Callable[[HeadConfig, ActionTokenizer, Objective], ActionHead]] = {
    "discrete_diffusion": DiscreteDiffusionHead,
    "parallel": ParallelHead,
    "autoregressive": AutoregressiveHead,
}


def build_head(config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> ActionHead:
    """The head of that type; the objective is read in training only."""
    return HEADS[config.type](config, tokenizer, objective)
