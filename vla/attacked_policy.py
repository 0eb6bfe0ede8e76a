"""A Policy whose cameras an attacker holds: every observation is changed by a few grey levels before the policy sees it.

argmax has no gradient, so the attack goes through the logits of the first round, with every slot masked: it moves the actions
that they expect. Whether it worked is judged by what the policy then does, which is the full decode.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.bind.attacks import apgd
from multimodal.bind.ball import Ball
from multimodal.bind.interface import Box
from multimodal.config import check_choice, check_settings
from multimodal.images import prepare_pixels
from vla.continuous_heads import ContinuousHead
from vla.decision import Decision, action_chunks, known_actions
from vla.interface import ActionChunk, Observation
from vla.policy import TorchPolicy
from vla.token_heads import AutoregressiveHead, SlotLayout
from vla.transforms import clean_instruction

KINDS = ("untargeted", "targeted", "noise")
GREY = Box(0.0, 255.0, "grey levels", 1.0)  # a camera's frame, uint8 values


@dataclass(frozen=True)
class PolicyAttackConfig:
    """What the attacker does to each observation."""

    kind: str = "untargeted"  # untargeted: away from the clean actions; targeted: towards another instruction's; noise: random signs
    epsilon: int = 4  # grey levels (255ths) by which any value of any camera may change
    steps: int = 10  # gradients per observation (Auto-PGD)
    instruction: str = ""  # targeted: the instruction whose actions are wanted

    def __post_init__(self) -> None:
        check_choice("attack", "kind", self.kind, KINDS)
        if not isinstance(self.epsilon, int) or self.epsilon < 0 or self.steps < 1:
            raise ValueError(
                f"attack has epsilon {self.epsilon!r} and {self.steps} steps; epsilon is a whole number of grey levels >= 0 (frames are "
                "uint8), steps >= 1."
            )
        if (self.kind == "targeted") != bool(self.instruction):
            raise ValueError("attack.instruction goes with kind 'targeted': the instruction of the wrong object.")

    @property
    def name(self) -> str:
        """Of attacked policies and of folders: what another attack has not."""
        towards = re.sub(r"\W+", "-", clean_instruction(self.instruction))
        return f"{self.kind}-{self.epsilon}-{self.steps}" + (f"-{towards}" if towards else "")


def check_attack(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if all of them exist; else ValueError listing those there are."""
    check_settings("attack", values, PolicyAttackConfig)
    return dict(values)


class AttackedPolicy:
    """A `vla.interface.Policy`: the given one, shown attacked observations. A row depends on its own observation and seed only."""

    def __init__(self, policy: TorchPolicy, config: PolicyAttackConfig) -> None:
        if not isinstance(policy, TorchPolicy):
            raise ValueError(
                f"An attack needs gradients, and a {type(policy).__name__} has none: give --policy.path of a checkpoint folder, not an "
                "export or a server."
            )
        self.policy, self.config = policy, config
        self.spec, self.action_horizon = policy.spec, policy.action_horizon
        self.content_hash = f"{policy.content_hash}-{config.name}"
        policy.model.requires_grad_(False)

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        """See `vla.interface.Policy.act`. info: also `deviation`, mean |attacked - clean| over the chunk, actions in [-1, 1]."""
        start = time.perf_counter()
        given = known_actions(known or [None] * len(observations), self.action_horizon, self.spec.action_dim)
        seeds = list(seeds or [0] * len(observations))
        clean = self.policy.decide(observations, given, seeds)
        shown = self.attack(observations, clean, seeds)
        decision = self.policy.decide(shown, given, seeds)
        chunks = action_chunks(decision, given, 1e3 * (time.perf_counter() - start))
        to_unit = self.policy.assets.action_tokenizer.to_unit
        deviation = np.abs(to_unit(decision.actions) - to_unit(clean.actions)).mean((1, 2))
        pairs = zip(chunks, deviation, strict=True)
        return [ActionChunk(chunk.actions, chunk.info | {"deviation": float(value)}) for chunk, value in pairs]

    def attack(self, observations: Sequence[Observation], clean: Decision, seeds: Sequence[int]) -> list[Observation]:
        """The observations as the attacker shows them: uint8, each value within epsilon of the camera's."""
        frames = torch.as_tensor(np.stack([self._frames(observation) for observation in observations])).to(self.policy.device).float()
        ball = Ball(frames, GREY, float(self.config.epsilon))
        start = torch.cat([
            Ball(frames[row : row + 1], GREY, ball.radius).random_point(torch.Generator().manual_seed(seed))
            for row, seed in enumerate(seeds)
        ])  # fmt: skip
        if self.config.kind == "noise":
            sign = [torch.rand(frames.shape[1:], generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in seeds]
            points = ball.project(frames + ball.radius * (2.0 * torch.stack(sign).to(frames) - 1))
        else:
            loss, steps = self._loss(observations, clean, seeds), self.config.steps
            points = apgd(loss, ball, steps=steps, generator=torch.Generator(), start=start).points
        shown = points.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return [
            Observation(observation.images | dict(zip(self.spec.cameras, row, strict=True)), observation.state, observation.instruction)
            for observation, row in zip(observations, shown, strict=True)
        ]

    def _frames(self, observation: Observation) -> np.ndarray:
        """uint8 [C, H, W, 3], checked, cameras in the policy's order."""
        return self.policy.assets.transforms.forward(observation).images

    def _loss(self, observations: Sequence[Observation], clean: Decision, seeds: Sequence[int]):
        """An attack loss (multimodal/bind/attack_losses.py) on frames [B, C, H, W, 3] in grey levels."""
        policy, assets = self.policy, self.policy.assets
        inputs = [assets.transforms.forward(observation) for observation in observations]
        state = torch.as_tensor(np.stack([item.state for item in inputs])).to(policy.device)
        ids, mask = (part.to(policy.device) for part in assets.encode_instructions([item.instruction for item in inputs]))
        wanted, sign = self._wanted(observations, clean, seeds)
        expected = self.expected_actions(wanted, seeds)
        goal = torch.as_tensor(assets.action_tokenizer.to_unit(wanted.actions)).to(policy.device)

        def loss(points: Tensor) -> tuple[Tensor, Tensor]:
            prefix = policy.model.prefill(*policy.model.embed_prefix(prepare_pixels(points, assets.images), state, ids, mask))
            value = sign * (expected(prefix) - goal).abs().mean((1, 2))
            return value, value

        return loss

    def _wanted(self, observations: Sequence[Observation], clean: Decision, seeds: Sequence[int]) -> tuple[Decision, float]:
        """The decision to leave (sign 1) or to reach (sign -1)."""
        if self.config.kind != "targeted":
            return clean, 1.0
        other = clean_instruction(self.config.instruction)
        own = [item.instruction for item in observations if clean_instruction(item.instruction) == other]
        if own:
            raise ValueError(f"attack.instruction is the episode's own, {own[0]!r}; choose another task's.")
        others = [Observation(item.images, item.state, self.config.instruction) for item in observations]
        nothing = known_actions([None] * len(others), self.action_horizon, self.spec.action_dim)
        return self.policy.decide(others, nothing, seeds), -1.0

    def expected_actions(self, wanted: Decision, seeds: Sequence[int]):
        """prefix -> what the head expects at first sight, in [-1, 1]: [B, H, D], differentiable."""
        model, head, tokenizer = self.policy.model, self.policy.head, self.policy.assets.action_tokenizer
        shape = (len(seeds), self.action_horizon, self.spec.action_dim)
        device = self.policy.device
        if isinstance(head, ContinuousHead):
            nothing = torch.zeros(shape, device=device), torch.zeros(shape[:2], dtype=torch.bool, device=device)
            return lambda prefix: head.predict(model, prefix, *nothing, self.policy.assets.decode, seeds)[0]
        layout = SlotLayout(tokenizer, self.action_horizon, device)
        centers = np.nan_to_num(tokenizer.centers).T  # [V, D], raw
        unit = torch.as_tensor(tokenizer.to_unit(centers)).to(device).T * torch.as_tensor(tokenizer.allowed, device=device)  # [D, V]
        if isinstance(head, AutoregressiveHead):
            tokens = torch.as_tensor(wanted.tokens).to(device).flatten(1)
            previous = torch.cat([torch.full_like(tokens[:, :1], model.config.mask_id), tokens[:, :-1]], dim=1)
            hidden = lambda prefix: model.causal_hidden(previous, prefix, prefix.cache.view())  # noqa: E731
        else:
            masked = torch.full((shape[0], shape[1] * shape[2]), model.config.mask_id, device=device)
            hidden = lambda prefix: model.action_hidden(masked, prefix)  # noqa: E731

        def expected(prefix) -> Tensor:
            probs = model.action_logits(hidden(prefix), layout.allowed).softmax(-1).view(*shape, -1)
            return (probs * unit).sum(-1)

        return expected
