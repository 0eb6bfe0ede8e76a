"""THE transformer: embeddings, mask, positions and cache in, hidden states out.

The language model, the action policy, draft layers and every modality trunk build this module; they differ only in
the arguments of `forward`.
"""

import math

import torch
from torch import Tensor, nn

from multimodal.attention import Attention, KVCache, Mask
from multimodal.config import DecoderConfig
from multimodal.layers import MLP, Rotary, build_norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = Attention(config, layer)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Mask, angles, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, angles, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A stack of blocks over embeddings that somebody else made."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.rotary = Rotary(config) if config.positions in ("rotary", "mrotary") else None
        self.learned_positions = (
            nn.Embedding(config.max_positions, config.hidden_size) if config.positions == "learned" else None
        )
        self.apply(initialise)
        # The residual stream grows with depth: its writers start smaller (GPT-2, section 2.3).
        for block in self.blocks:
            for writer in (block.attention.output, block.mlp.down):
                writer.weight.data.div_(math.sqrt(2 * config.num_layers))

    def new_cache(self) -> KVCache:
        return KVCache(self.config.num_layers)

    def _enter(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x = embeddings * self.config.embedding_scale if self.config.embedding_scale != 1.0 else embeddings
        if self.learned_positions is not None:
            x = x + self.learned_positions(positions)
        return x, None if self.rotary is None else self.rotary.angles(positions)

    def forward(
        self, embeddings: Tensor, mask: Mask, positions: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states after the final norm.

        embeddings: [B, T, hidden_size]. mask: boolean, broadcasts to [B, heads, T, cached + T], True = may look; None =
        all; or sparse. positions: int64 [B, T] ([A, B, T] for mrotary). cache: keys and values of earlier positions; the
        new ones are appended to it. Returns [B, T, hidden_size].
        """
        x, angles = self._enter(embeddings, positions)
        for block in self.blocks:
            x = block(x, mask, angles, cache)
        return self.norm(x)

    def fill(self, embeddings: Tensor, mask: Tensor | None, positions: Tensor, cache: KVCache) -> None:
        """Like forward, for a prefix whose hidden states nobody reads: the last block only fills the cache."""
        x, angles = self._enter(embeddings, positions)
        for block in self.blocks[:-1]:
            x = block(x, mask, angles, cache)
        last = self.blocks[-1]
        last.attention.keys_values(last.attention_norm(x), angles, cache)


EMBEDDING_STD = 0.5  # tokens, places and steps are summed, beside image features of order one


def initialise(module: nn.Module) -> None:
    """Normal matrices of variance 1 / inputs, zero biases, embeddings of `EMBEDDING_STD`; meant for `nn.Module.apply`.

    Independent of the width, unlike the customary 0.02; at width 128 the two learnt alike (docs/log.md, 2026-11-23).
    """
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def arange_positions(batch: int, start: int, length: int, device: torch.device) -> Tensor:
    """Positions start .. start + length - 1 for every row: int64 [batch, length]."""
    return torch.arange(start, start + length, device=device).expand(batch, length)
