"""Heads without tokens on the same backbone: L1 regression and flow matching, one slot a step.

The rivals of the field: openvla-oft regresses whole chunks with an L1 loss in one pass (arXiv 2502.19645), pi0 integrates a
learnt velocity field (arXiv 2410.24164). Here they get the prefix, the cache, the data and the trainer of the token heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from multimodal.losses import CrossEntropy, Objective
from vla.action_head import ActionBatch, HeadConfig, HeadLoss, draw_known_steps
from vla.action_tokenizer import ActionTokenizer
from vla.decision import Decision, KnownActions
from vla.model import VLA, Prefix
from vla.unmasking import DecodeConfig, RowNoise


def step_loss(error: Tensor, is_supervised: Tensor) -> HeadLoss:
    """Errors [R, H, D] averaged over dimensions and a row's supervised steps [R, H], summed over rows."""
    per_row = is_supervised.sum(1)
    weight = is_supervised / per_row.clamp_min(1)[:, None]
    return HeadLoss((error.mean(-1) * weight).sum(), int((per_row > 0).sum()))


class ContinuousHead:
    """What both share: known actions enter as clean values, predictions leave in robot units."""

    slots = "steps"

    def __init__(self, config: HeadConfig, tokenizer: ActionTokenizer, objective: Objective = CrossEntropy()) -> None:
        self.config, self.tokenizer = config, tokenizer

    def predict(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        """Unit values [B, H, D] given the known ones [B, H, D] at the steps is_known [B, H]; and the passes it took."""
        raise NotImplementedError

    def act(
        self, model: VLA, prefix: Prefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decision:
        """See `ActionHead.act`."""
        device = prefix.is_real.device
        values, is_known = torch.as_tensor(self.tokenizer.to_unit(known.actions)), torch.as_tensor(known.is_known)
        unit, rounds = self.predict(model, prefix, values.to(device), is_known.to(device), config, seeds)
        actions = self.tokenizer.from_unit(unit.cpu().numpy())
        return Decision(actions, torch.full((len(actions),), rounds).numpy())


class L1Head(ContinuousHead):
    """All steps regressed in one pass; unknown steps enter as zeros at time 0."""

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        is_known = draw_known_steps(batch.is_pad, self.config, generator)
        predicted = self._pass(model, prefix, batch.unit, is_known)
        return step_loss((predicted - batch.unit).abs(), ~batch.is_pad & ~is_known)

    def predict(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        return torch.where(is_known[..., None], known, self._pass(model, prefix, known, is_known)), 1

    def _pass(self, model: VLA, prefix: Prefix, values: Tensor, is_known: Tensor) -> Tensor:
        return model.predict_steps(values * is_known[..., None], is_known.to(values.dtype), prefix)


class FlowHead(ContinuousHead):
    """Flow matching on the straight path from noise (t = 0) to the actions (t = 1), integrated by Euler's steps.

    Lipman et al. 2022 (arXiv 2210.02747): x_t = t a + (1 - t) e, the target velocity is a - e. Times are drawn from pi0's
    Beta(1.5, 1) on the noise level, which favours noisy steps. `DecodeConfig.euler_steps` of them are taken.
    """

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss:
        draws = self.config.mask_draws
        clean = batch.unit.repeat_interleave(draws, dim=0)
        is_pad = batch.is_pad.repeat_interleave(draws, dim=0)
        is_known = draw_known_steps(is_pad, self.config, generator)
        time = draw_times(clean.shape[0], generator)[:, None]
        times = torch.where(is_known, torch.ones_like(time), time)
        times = times.masked_fill(is_pad, 0.0)  # padding repeats an action, which it must not give away: it enters as noise
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        noisy = torch.lerp(noise, clean, times[..., None])
        velocity = model.predict_steps(noisy, times, prefix.repeat(draws) if draws > 1 else prefix)
        return step_loss((velocity - (clean - noise)).square(), ~is_pad & ~is_known)

    def predict(
        self, model: VLA, prefix: Prefix, known: Tensor, is_known: Tensor, config: DecodeConfig, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        noise = torch.from_numpy(RowNoise(seeds).normal(range(len(seeds)), *known.shape[1:]))
        values = torch.where(is_known[..., None], known, noise.to(known))
        for step in range(config.euler_steps):
            now = torch.full_like(values[..., 0], step / config.euler_steps)
            velocity = model.predict_steps(values, torch.where(is_known, torch.ones_like(now), now), prefix)
            values = torch.where(is_known[..., None], known, values + velocity / config.euler_steps)
        return values, config.euler_steps


def draw_times(rows: int, generator: torch.Generator) -> Tensor:
    """Times in [0, 1), 1 - t distributed as Beta(1.5, 1) (pi0, appendix B): float32 [rows].

    The distribution function of Beta(a, 1) is x ** a, so its inverse draws it.
    """
    return 1.0 - torch.rand(rows, generator=generator, device=generator.device) ** (1 / 1.5)
