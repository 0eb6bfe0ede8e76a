"""EagleVLM: one decoder layer that continues the target's own features, and so guesses its next tokens.

After EAGLE (arXiv 2401.15077) with the input norms of EagleVLM (arXiv 2509.11815). Token j of a sequence enters as
fuse(norm(embedding of token j), norm(feature of position j - 1)), where the feature is the target's hidden state in front of
its head; the layer's output estimates the feature of position j, and the target's own frozen head turns it into the law of
token j + 1. So the pair of a token and the feature that led to it stands at the token's position, here as in the target.

An image enters as its tokens after the compressor, without fusion, at the last positions of its span: text features carry what
the target saw already, so few are enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.compressor import Compressed, CompressorConfig, VisualCompressor
from multimodal.config import DecoderConfig
from multimodal.decoder import Decoder, initialise
from multimodal.layers import build_norm
from multimodal.vlm import IMAGE, VLM


@dataclass(frozen=True)
class DraftModelConfig:
    """Shapes of the draft; width, heads and positions are the target's."""

    num_layers: int = 1
    mlp_size: int | None = None  # None: the target's
    head_size: int | None = None  # ids that the draft can say, the most frequent ones; None: all of them
    compressor: CompressorConfig = field(default_factory=CompressorConfig)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DraftModelConfig":
        return cls(**{**values, "compressor": CompressorConfig(**values["compressor"])})

    def decoder(self, target: DecoderConfig) -> DecoderConfig:
        """The decoder that target, policy and draft all build, with fewer layers."""
        positions = "rotary" if target.positions == "mrotary" else target.positions
        mlp_size = self.mlp_size or target.mlp_size
        return replace(
            target, num_layers=self.num_layers, mlp_size=mlp_size, positions=positions, rotary_sections=(), embedding_scale=1.0
        )


class DraftModel(nn.Module):
    """The trained part of a draft. Embeddings and head stay the target's and are handed in."""

    head_ids: Tensor

    def __init__(self, config: DraftModelConfig, target: VLM, head_ids: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config = config
        decoder, vocab_size = config.decoder(target.config.decoder), target.config.vocab_size
        width = decoder.hidden_size
        self.embedding_norm, self.feature_norm = build_norm(decoder, width), build_norm(decoder, width)
        self.fuse = nn.Linear(2 * width, width)
        initialise(self.fuse)
        self.decoder = Decoder(decoder)
        self.decoder.norm.load_state_dict(target.decoder.norm.state_dict())  # estimates begin at the features' own scale
        self.compressor = VisualCompressor(config.compressor, width, target.tokens_per_image)
        ids = range(config.head_size or vocab_size) if head_ids is None else sorted(head_ids)
        size = config.head_size or vocab_size
        if len(ids) != size or ids[-1] >= vocab_size:
            raise ValueError(f"{len(ids)} head ids up to {ids[-1]}; expected head_size {size} ids below {vocab_size}.")
        self.register_buffer("head_ids", torch.tensor(ids))

    @property
    def has_full_head(self) -> bool:
        return self.config.head_size is None

    def head_weight(self, target: VLM) -> Tensor:
        """The target's head rows that the draft can say: [head_size or vocab_size, width]."""
        weight = target.head_weight
        return weight if self.has_full_head else weight.index_select(0, self.head_ids)

    def enter(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Token embeddings and the features before them, each [..., width] -> decoder inputs [..., width]."""
        return self.fuse(torch.cat([self.embedding_norm(embeddings), self.feature_norm(features)], dim=-1))

    def compress(
        self, images: Tensor, question: Tensor, seeds: Sequence[int], *, branch: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Compressed:  # fmt: skip
        """Image tokens [N, P, width] and the feature [N, width] at the end of the question -> the tokens that enter.

        Guided pruning keeps what the draft's own first layer attends to from the question.
        """
        config = self.config.compressor
        scores = None
        if config.prune == "guided" and config.mode in ("prune", "select", "weighted", "concat"):
            with torch.no_grad():
                scores = self._attention_to(images, question)
        return self.compressor(images, question, seeds=seeds, scores=scores, branch=branch, generator=generator)

    def _attention_to(self, images: Tensor, question: Tensor) -> Tensor:
        """Attention of the first layer from the question to each image token, without positions, mean over heads: [N, P]."""
        block = self.decoder.blocks[0]
        asker = self.enter(torch.zeros_like(question), question)[:, None]
        query = block.attention._heads(block.attention.query(block.attention_norm(asker)), block.attention.num_heads)
        keys, _ = block.attention.keys_values(block.attention_norm(images), None, None)
        keys = keys.repeat_interleave(block.attention.num_heads // block.attention.kv_heads, dim=1)
        return (query @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0]


@dataclass(frozen=True)
class PromptEntries:
    """What a prompt puts into the draft, in order: its text tokens from the second position on, its images compressed."""

    inputs: Tensor  # [T', width]
    positions: Tensor  # int64 [T']
    is_text: Tensor  # bool [T']: the output estimates the target's feature at that position


def prompt_entries(
    model: DraftModel, ids: Sequence[int], embeddings: Tensor, features: Tensor, images: Sequence[Tensor] | None
) -> PromptEntries:
    """ids: expanded, T of them; embeddings and features [T, width] of the target.

    images: compressed tokens [m, width] of each image in order, or None: the draft goes on text alone.
    """
    inputs, positions, is_text = [], [], []
    for start, stop, image in spans(ids, _tokens_per_image(model)):
        if image is None:
            first = max(start, 1)  # no feature leads to the very first token
            if first < stop:
                inputs.append(model.enter(embeddings[first:stop], features[first - 1 : stop - 1]))
                positions.append(torch.arange(first, stop))
                is_text.append(torch.ones(stop - first, dtype=torch.bool))
        elif images is not None and len(images[image]):
            inputs.append(images[image].to(embeddings.dtype))
            positions.append(torch.arange(stop - len(images[image]), stop).clamp(min=start))
            is_text.append(torch.zeros(len(images[image]), dtype=torch.bool))
    if not inputs:
        return PromptEntries(embeddings[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    device = embeddings.device
    return PromptEntries(torch.cat(inputs), torch.cat(positions).to(device), torch.cat(is_text).to(device))


def spans(ids: Sequence[int], tokens_per_image: int) -> list[tuple[int, int, int | None]]:
    """Runs (start, stop, number of the image or None for text) of expanded ids."""
    runs: list[tuple[int, int, int | None]] = []
    place, image = 0, 0
    while place < len(ids):
        start = place
        if ids[place] == IMAGE:
            place += tokens_per_image
            runs.append((start, place, image))
            image += 1
        else:
            while place < len(ids) and ids[place] != IMAGE:
                place += 1
            runs.append((start, place, None))
    return runs


def _tokens_per_image(model: DraftModel) -> int:
    return model.compressor.tokens_per_image
