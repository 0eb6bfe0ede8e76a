"""Heads over action tokens on one backbone: discrete diffusion, parallel, autoregressive."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multimodal.losses import OBJECTIVES, CrossEntropy, EditInvariant, Objective
from vla.action_head import ActionBatch, HeadConfig, HeadLoss, draw_known_steps
from vla.action_tokenizer import ActionTokenizer
from vla.decision import Decision, KnownActions
from vla.decoding import Decoded, decode
from vla.masked_diffusion import Corruption, corrupt, replace_visible, stratified_times
from vla.model import VLA, Prefix
from vla.unmasking import DecodeConfig


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
    is_unseen: Tensor,
    is_suspect: Tensor,
    layout: SlotLayout,
) -> HeadLoss:
    """The objective over each slot's own ids, averaged over a row's unseen slots, summed over rows; suspect ones added.

    hidden [R, L, width]; targets, values [R, L]; is_unseen, is_suspect [R, L], disjoint: slots whose token the model does not
    see, and slots whose token it sees and may not trust. Every row weighs the same however many slots it has unseen. Each
    suspect slot adds 1 / (unseen + suspect) of its loss, at most an unseen one's weight; it counts in no other weight and
    not in the normalizer, so the gradient of the unseen slots is what it would be without suspect ones.
    """
    is_supervised = is_unseen | is_suspect
    num_unseen, num_supervised = is_unseen.sum(1, keepdim=True), is_supervised.sum(1, keepdim=True)
    weight = torch.where(is_unseen, 1.0 / num_unseen, 1.0 / num_supervised)
    row, slot = is_supervised.nonzero(as_tuple=True)
    loss_sum = objective(
        hidden[row, slot],
        model.action_head.weight,
        targets[row, slot],
        values=values[row, slot],
        token_weight=weight[row, slot],
        vocab_range=layout.ranges[slot],
        reduction="sum",
    )
    return HeadLoss(loss_sum, int((num_unseen > 0).sum()))


class TokenHead:
    """What the token heads share: known actions become tokens, decoded tokens become actions."""

    slots = "tokens"

    def __init__(self, config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> None:
        if isinstance(objective, EditInvariant):
            raise ValueError(
                "objective.type is 'edit_invariant', which needs whole chunks, but a token head supervises slots one by one; allowed: "
                f"{sorted(set(OBJECTIVES) - {'edit_invariant'})}."
            )
        self.config, self.tokenizer, self.objective = config, tokenizer, objective

    def decode(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decoded:
        """Decode all slots [B, L]; slots where is_known keep the tokens `known`."""
        raise NotImplementedError

    def act(
        self, model: VLA, prefix: Prefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decision:
        """See `ActionHead.act`."""
        shape, device = known.actions.shape, prefix.is_real.device
        tokens = torch.as_tensor(self.tokenizer.encode(known.actions)).flatten(1).to(device)
        is_known = torch.as_tensor(known.is_known).repeat_interleave(shape[2], dim=1).to(device)
        decoded = self.decode(model, prefix, tokens, is_known, config, seeds)
        probs, ids = decoded.probs.view(*shape, -1).cpu().numpy(), decoded.tokens.view(shape).cpu().numpy()
        actions = self.tokenizer.decode_expectation(probs, ids)
        committed = None if decoded.committed is None else decoded.committed.view(shape).cpu().numpy()
        return Decision(actions, decoded.rounds.cpu().numpy(), decoded.confidence.view(shape).cpu().numpy(), ids, committed)


class DiscreteDiffusionHead(TokenHead):
    """Masked tokens predicted from visible ones; decoded by iterative unmasking."""

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        draws = self._draws()
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, batch.tokens.device)
        clean = batch.tokens.flatten(1).repeat_interleave(draws, dim=0)  # [B * K, L]
        step_pad = batch.is_pad.repeat_interleave(draws, dim=0)
        is_pad = step_pad.repeat_interleave(model.config.action_dim, dim=1)
        known_steps = draw_known_steps(step_pad, self.config, generator)
        is_known = known_steps.repeat_interleave(model.config.action_dim, dim=1)
        corruption = self._corrupt(clean, is_known, is_pad, layout, generator)
        hidden = model.action_hidden(corruption.noisy_tokens, prefix.repeat(draws) if draws > 1 else prefix)
        is_unseen, is_suspect = corruption.is_masked & ~is_pad, corruption.is_suspect & ~is_pad
        values = batch.values.flatten(1).repeat_interleave(draws, dim=0)
        return supervised_loss(model, self.objective, hidden, clean, values, is_unseen, is_suspect, layout)

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
        self, clean: Tensor, is_known: Tensor, is_pad: Tensor, layout: SlotLayout, generator: torch.Generator
    ) -> Corruption:
        draws, mask_id = self.config.mask_draws, self.tokenizer.mask_id
        t = stratified_times(clean.shape[0] // draws, draws, generator).flatten()
        corruption = corrupt(clean, t, mask_id, generator=generator, is_known=is_known, is_pad=is_pad)
        if self.config.replace_visible == 0.0:
            return corruption
        first, last = layout.ranges[:, 0], layout.ranges[:, 1] - 1
        share = self.config.replace_visible
        return replace_visible(corruption, clean, share, first, last, generator=generator, is_known=is_known)



class ParallelHead(DiscreteDiffusionHead):
    """Every free slot masked, always; decoded in one round (the parallel decoding of OpenVLA-OFT, as tokens)."""

    def _draws(self) -> int:
        return 1

    def _rounds(self, config: DecodeConfig) -> DecodeConfig:
        return replace(config, rounds=1)

    def _corrupt(
        self, clean: Tensor, is_known: Tensor, is_pad: Tensor, layout: SlotLayout, generator: torch.Generator
    ) -> Corruption:
        everything = torch.ones(clean.shape[0], device=clean.device)
        return corrupt(clean, everything, self.tokenizer.mask_id, generator=generator, is_known=is_known, is_pad=is_pad)


class AutoregressiveHead(TokenHead):
    """Tokens left to right with a causal mask and a key/value cache, greedily (OpenVLA's decoding, per chunk)."""

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        layout = SlotLayout(self.tokenizer, model.config.action_horizon, batch.tokens.device)
        clean = batch.tokens.flatten(1)
        previous = torch.cat([torch.full_like(clean[:, :1], model.config.mask_id), clean[:, :-1]], dim=1)
        hidden = model.causal_hidden(previous, prefix, prefix.cache.view())
        is_unseen = ~batch.is_pad.repeat_interleave(model.config.action_dim, dim=1)
        none = torch.zeros_like(is_unseen)
        return supervised_loss(model, self.objective, hidden, clean, batch.values.flatten(1), is_unseen, none, layout)

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
