"""Our own trunks: patches, the backbone's decoder with a full mask, mean, projection."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.attention import key_padding_mask
from multimodal.bind.modalities import TEXT, box_of, build_patches
from multimodal.config import DecoderConfig
from multimodal.decoder import Decoder, arange_positions
from multimodal.tokenizer import TextTokenizer

MAX_TEXT_LENGTH = 24  # ids of a sentence


@dataclass(frozen=True)
class TrunkConfig:
    """Shape of every trunk; its number of positions is the modality's number of tokens."""

    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    mlp_size: int = 256
    dimension: int = 64  # of the shared space
    logit_scale: float = 14.0  # about 1 / 0.07, CLIP's first temperature
    text_layers: int = 2

    def decoder(self, tokens: int, layers: int | None = None) -> DecoderConfig:
        return DecoderConfig(
            hidden_size=self.hidden_size, num_layers=layers or self.num_layers, num_heads=self.num_heads,
            mlp_size=self.mlp_size, positions="learned", max_positions=tokens,
        )  # fmt: skip


class TrunkEncoder(nn.Module):
    """A ModalityEncoder of one sensor."""

    def __init__(self, modality: str, shape: tuple[int, ...], config: TrunkConfig) -> None:
        super().__init__()
        self.modality, self.dimension, self.shape = modality, config.dimension, tuple(shape)
        self.box, self.logit_scale = box_of(modality), config.logit_scale
        self.patches = build_patches(modality, self.shape, config.hidden_size)
        self.decoder = Decoder(config.decoder(self.patches.num_tokens))
        self.projection = nn.Linear(config.hidden_size, config.dimension)

    def tokens(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> the trunk's last hidden states [B, T, hidden_size]."""
        if tuple(inputs.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{self.modality} inputs are {list(inputs.shape)}; this encoder takes [B, {wanted}].")
        patches = self.patches(inputs)
        return self.decoder(patches, None, arange_positions(len(patches), 0, patches.shape[1], patches.device))

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> unit vectors [B, dimension]."""
        return F.normalize(self.projection(self.tokens(inputs).mean(1)), dim=-1)

    forward = embed


class TextEncoder(nn.Module):
    """The text tower: ids [B, T], padded on the right, see each other whole; padding is seen by none."""

    def __init__(self, tokenizer: TextTokenizer, config: TrunkConfig) -> None:
        super().__init__()
        self.modality, self.dimension, self.tokenizer = TEXT, config.dimension, tokenizer
        self.box, self.logit_scale = box_of(TEXT, tokenizer.vocab_size), config.logit_scale
        self.embedding = nn.Embedding(tokenizer.vocab_size, config.hidden_size)
        self.decoder = Decoder(config.decoder(MAX_TEXT_LENGTH, config.text_layers))
        self.projection = nn.Linear(config.hidden_size, config.dimension)

    def embed(self, inputs: Tensor) -> Tensor:
        """Ids int64 [B, T] -> unit vectors [B, dimension]."""
        is_text = inputs != self.tokenizer.pad_id
        positions = arange_positions(len(inputs), 0, inputs.shape[1], inputs.device)
        hidden = self.decoder(self.embedding(inputs), key_padding_mask(is_text), positions)
        weight = is_text[..., None].to(hidden.dtype)
        return F.normalize(self.projection((hidden * weight).sum(1) / weight.sum(1)), dim=-1)

    forward = embed

    def embed_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Sentences -> unit vectors [n, dimension]. Raises ValueError for one longer than MAX_TEXT_LENGTH ids."""
        ids, _ = self.tokenizer.encode_batch(sentences, MAX_TEXT_LENGTH)
        return self.embed(ids.to(self.embedding.weight.device))


@dataclass(frozen=True)
class BindConfig:
    """What a bound model is built from."""

    shapes: dict[str, tuple[int, ...]]  # of one sample, per sensor
    trunk: TrunkConfig = field(default_factory=TrunkConfig)


class BoundModel(nn.Module):
    """A trunk for every sensor and the text tower, one shared space."""

    def __init__(self, config: BindConfig, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self.config = config
        self.trunks = nn.ModuleDict({name: TrunkEncoder(name, shape, config.trunk) for name, shape in config.shapes.items()})
        self.text = TextEncoder(tokenizer, config.trunk)

    def encoder(self, modality: str) -> TrunkEncoder:
        """Raises ValueError listing the modalities."""
        if modality not in self.trunks:
            raise ValueError(f"No encoder of {modality!r}; this model has {', '.join(self.trunks)}.")
        return self.trunks[modality]
