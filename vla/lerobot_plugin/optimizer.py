"""AdamW whose state LeRobot can write: lerobot 0.4.4 hands it to safetensors, which takes contiguous tensors only."""

from dataclasses import dataclass
from typing import Any

import torch
from lerobot.optim.optimizers import AdamWConfig, OptimizerConfig, OptimizerParams


@OptimizerConfig.register_subclass("remask_adamw")
@dataclass
class ContiguousAdamWConfig(AdamWConfig):
    """torch's AdamW. The image tower keeps its weights channels-last, where convolutions run fast, and moments follow."""

    def build(self, params: OptimizerParams) -> torch.optim.Optimizer:
        optimizer = super().build(params)
        optimizer.register_state_dict_post_hook(_contiguous)
        return optimizer


def _contiguous(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state with copies where a tensor is not contiguous; the optimiser's own tensors stay as they are."""
    states = {
        index: {name: value.contiguous() if torch.is_tensor(value) else value for name, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}
