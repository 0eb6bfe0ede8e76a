"""Action slots of continuous heads: one slot a step, holding a whole action vector instead of one token per dimension."""

import math

import torch
from torch import Tensor, nn

from multimodal.decoder import EMBEDDING_STD, initialise

TIME_FREQUENCIES = 32  # sine and cosine each, geometric from one to a thousand radians over t in [0, 1]


class StepSlots(nn.Module):
    """Embeds H noisy, known or unknown actions and reads predictions off their hidden states.

    A step's input is its value, its own time and its place. Times differ between the steps of one chunk: 1 means clean, so a
    known step is simply one whose time is 1 (training-time action conditioning, Black et al. 2025, arXiv 2512.05964).
    """

    frequencies: Tensor

    def __init__(self, action_horizon: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(action_dim, width)
        self.time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.place = nn.Parameter(torch.empty(action_horizon, width))
        self.predict = nn.Linear(width, action_dim)
        self.apply(initialise)
        nn.init.normal_(self.place, std=EMBEDDING_STD)
        exponents = torch.linspace(0.0, math.log(1000.0), TIME_FREQUENCIES)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, values: Tensor, times: Tensor) -> Tensor:
        """values [B, H, D] in unit range, times [B, H] in [0, 1] -> embeddings [B, H, width]."""
        phase = times[..., None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1)
        return self.value(values.to(self.place.dtype)) + self.time(waves.to(self.place.dtype)) + self.place
