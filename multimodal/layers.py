"""Norms, gated MLP and rotary embedding: the parts of a decoder block that see one position at a time."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.config import DecoderConfig


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already: what is summed or rotated is rounded only once."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), computed in at least float32 (Zhang and Sennrich 2019; offset as in Gemma)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        weight = widened(self.weight)
        return (wide * (self.offset + weight if self.offset else weight)).to(x.dtype)


def build_norm(config: DecoderConfig, size: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm_offset)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) for swiglu and geglu; down(gelu(up(x))) for gelu."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        width, inner, bias = config.hidden_size, config.mlp_size, config.mlp_bias
        self.gate = None if config.activation == "gelu" else nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Rotary(nn.Module):
    """Rotary position embedding, half-split layout (Su et al. 2021; layout of Llama and Qwen checkpoints).

    With `sections` (M-RoPE of Qwen2-VL) positions are [A, B, T], one row per axis, and each section of the rotated
    pairs reads its own axis.
    """

    inverse_frequency: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self.sections = config, config.rotary_sections
        self.register_buffer("inverse_frequency", rotary_frequencies(config), persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, T] (or [A, B, T] with sections) -> cos, sin, each [B, 1, T, head_dim / 2] in at least float32."""
        phase = positions[..., None].float() * widened(self.inverse_frequency)  # [.., B, T, head_dim / 2]
        if self.sections:
            axes = phase.split(self.sections, dim=-1)
            phase = torch.cat([part[axis] for axis, part in enumerate(axes)], dim=-1)
        return phase.cos()[:, None], phase.sin()[:, None]


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    base ** (-2 i / head_dim), slowed for contexts longer than the model was trained on first:
    linear (Chen et al. 2023): all of them by rotary_factor. llama3 (Llama 3.1's released code, `apply_scaling`): wavelengths
    up to length / high_factor are kept, those from length / low_factor on are slowed by rotary_factor, and in between the two
    are mixed in proportion to length / wavelength.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = config.rotary_base**-exponent
    if config.rotary_scaling == "linear":
        return frequency / config.rotary_factor
    if config.rotary_scaling == "llama3":
        turns = config.rotary_length * frequency / (2 * math.pi)  # over the original context
        low, high = config.rotary_low_factor, config.rotary_high_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / config.rotary_factor)
    return frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, T, head_dim] by the angles of its positions."""
    first, second = widened(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
