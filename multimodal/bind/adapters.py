"""Small changes inside a frozen trunk: low-rank matrices and tuned norms, as parametrizations of its own weights.

A parametrization computes the weight that a layer reads (torch.nn.utils.parametrize), so any library's layer takes one, packed
attention weights included; and a merged trunk only stores what was computed, so merged equals unmerged bit for bit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class AdapterConfig:
    """Which weights of a trunk get an adapter."""

    lora_rank: int = 4  # 0: none
    lora_alpha: float = 8.0  # the low-rank product is multiplied by alpha / rank
    lora_targets: tuple[str, ...] = ()  # only weights whose name holds one of these; none given: every matrix and convolution
    tune_norms: bool = False  # scales and offsets of norm layers

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"AdapterConfig.lora_rank is {self.lora_rank}; give 0 (none) or more.")


NO_ADAPTERS = AdapterConfig(lora_rank=0)


class LowRank(nn.Module):
    """weight [out, ...] + alpha / rank * up @ down, reshaped (Hu et al. 2021, arXiv 2106.09685). `up` starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        fan_in = weight[0].numel()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.randn(rank, fan_in, device=weight.device) / math.sqrt(fan_in))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.scale * (self.up @ self.down).reshape(weight.shape)).to(weight.dtype)


class Offset(nn.Module):
    """weight + offset, which starts at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.offset


def install(trunk: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze the trunk, put the adapters in, in place; the names of the weights that got one.

    Nothing changes yet, as every adapter starts at zero. Raises ValueError if the config asks for adapters and none fits.
    """
    trunk.requires_grad_(False)
    changed: list[str] = []
    for name, module in list(trunk.named_modules()):
        is_norm = "Norm" in type(module).__name__
        for part, weight in list(module.named_parameters(recurse=False)):
            full = f"{name}.{part}" if name else part
            if is_norm and config.tune_norms:
                parametrize.register_parametrization(module, part, Offset(weight))
                changed.append(full)
            elif config.lora_rank and is_matrix(module, weight) and is_wanted(full, config.lora_targets):
                parametrize.register_parametrization(module, part, LowRank(weight, config.lora_rank, config.lora_alpha))
                changed.append(full)
    if not changed and (config.lora_rank or config.tune_norms):
        raise ValueError(
            f"No weight of the trunk fits {config}; it has matrices "
            f"{[name for name, value in trunk.named_parameters() if value.ndim >= 2][:8]}. Change lora_targets, or use a head."
        )
    return changed


def is_matrix(module: nn.Module, weight: Tensor) -> bool:
    """Weights that multiply: linear, attention's packed ones, convolutions; not tables of embeddings."""
    return weight.ndim >= 2 and isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.modules.conv._ConvNd))


def is_wanted(name: str, targets: tuple[str, ...]) -> bool:
    return not targets or any(target in name for target in targets)


def merged_state(trunk: nn.Module) -> dict[str, Tensor]:
    """The trunk's state under its own names, with the weights that its layers read: what a trunk without adapters loads.

    Not parametrize.remove_parametrizations: that edits the layer's class, which copies of the layer share.
    """
    state = {name: value for name, value in trunk.state_dict().items() if "parametrizations." not in name}
    for name, module in trunk.named_modules():
        if parametrize.is_parametrized(module):
            for part in module.parametrizations:
                state[f"{name}.{part}" if name else part] = getattr(module, part).detach().clone()
    return state
