"""What an action head is: it owns its training loss and its decoding; tokens, data, trainer and backbone are shared.

So a comparison of heads compares nothing else. The heads themselves: vla/token_heads.py, vla/continuous_heads.py; the table of
them: vla/heads.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multimodal.config import check_choice
from vla.decision import Decision, KnownActions
from vla.model import VLA, Prefix
from vla.unmasking import DecodeConfig

HEAD_TYPES = ("discrete_diffusion", "parallel", "autoregressive", "l1", "flow")


@dataclass(frozen=True)
class HeadConfig:
    """Which head, and what its training sees."""

    type: str = "discrete_diffusion"  # discrete_diffusion | parallel | autoregressive | l1 | flow
    mask_draws: int = 4  # discrete diffusion, flow: corruptions trained per encoded prefix
    replace_visible: float = 0.1  # discrete diffusion: share of visible tokens replaced; all visible ones are supervised then
    known_prefix: float = 0.25  # probability that a chunk's first steps are given, as when continuing a running chunk
    max_known_steps: int = 4

    def __post_init__(self) -> None:
        check_choice("HeadConfig", "type", self.type, HEAD_TYPES)
        if self.mask_draws < 1:
            raise ValueError(f"HeadConfig.mask_draws is {self.mask_draws}; at least one corruption per prefix is needed.")
        for name in ("replace_visible", "known_prefix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"HeadConfig.{name} is {getattr(self, name)}; it is a share, 0 to 1.")
        if self.max_known_steps < 0:
            raise ValueError(f"HeadConfig.max_known_steps is {self.max_known_steps}; it must be at least 0.")


class ActionBatch(NamedTuple):
    """Targets of a training batch."""

    tokens: Tensor  # int64 [B, H, D]
    values: Tensor  # float32 [B, H, D], unrounded ids (ActionTokenizer.coordinates)
    unit: Tensor  # float32 [B, H, D] in [-1, 1] (ActionTokenizer.to_unit)
    is_pad: Tensor  # bool [B, H], steps after the episode's end


@dataclass(frozen=True)
class HeadLoss:
    """A loss to be divided by the global sum of `normalizer`."""

    loss_sum: Tensor
    normalizer: int


class ActionHead(Protocol):
    slots: str  # which slots the model must have, see VLAConfig.slots

    def loss(self, model: VLA, prefix: Prefix, batch: ActionBatch, generator: torch.Generator) -> HeadLoss: ...

    def act(
        self, model: VLA, prefix: Prefix, known: KnownActions, config: DecodeConfig, seeds: Sequence[int]
    ) -> Decision:
        """Decode whole chunks that continue the known actions; a row depends on its own inputs and seed only."""
        ...


def draw_known_steps(is_pad: Tensor, config: HeadConfig, generator: torch.Generator) -> Tensor:
    """Some rows of is_pad, bool [R, H], start with one to max_known_steps given steps; one real step at least is to predict."""
    rows, action_horizon = is_pad.shape
    most = min(config.max_known_steps, action_horizon - 1)
    device = generator.device
    if most < 1:
        return torch.zeros(rows, action_horizon, dtype=torch.bool, device=device)
    chosen = torch.rand(rows, generator=generator, device=device) < config.known_prefix
    steps = torch.randint(1, most + 1, (rows,), generator=generator, device=device) * chosen
    steps = torch.minimum(steps, (~is_pad).sum(1) - 1)  # else a row near an episode's end would teach nothing, alone: 0 / 0
    return torch.arange(action_horizon, device=device) < steps[:, None]
