"""Our own trunks: patches, the backbone's decoder with a full mask, mean, projection; and what an encoder must keep to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.attention import key_padding_mask
from multimodal.bind.interface import ModalityEncoder, check_inputs
from multimodal.bind.modalities import MODALITIES, TEXT, box_of, build_patches
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


def check_encoder(encoder: ModalityEncoder, inputs: Tensor, dimension: int | None = None) -> None:
    """Raise ValueError, with the fix, unless `encoder` keeps to ModalityEncoder on `inputs` [B, *shape].

    Checked: known modality; inputs in the box; eval mode; two passes and two batch sizes agree; width (`dimension`: what
    centers or other encoders have) and unit length; a gradient reaches the inputs.
    """
    if not isinstance(encoder, ModalityEncoder):
        lacking = [name for name in ("modality", "dimension", "box", "logit_scale", "embed") if not hasattr(encoder, name)]
        raise ValueError(
            f"{type(encoder).__name__} is no ModalityEncoder: it lacks {', '.join(lacking)} (multimodal/bind/interface.py)."
        )
    name = encoder.modality
    if name not in MODALITIES:
        raise ValueError(
            f"Unknown modality {name!r}; allowed: {', '.join(MODALITIES)}. Set `modality`, or add it to "
            "multimodal/bind/sensors.py."
        )
    check_inputs(encoder.box, name, inputs)
    if getattr(encoder, "training", False):
        raise ValueError(f"The {name} encoder is in training mode; call .eval() first.")
    with torch.no_grad():
        first, second = encoder.embed(inputs), encoder.embed(inputs)
    if not torch.equal(first, second):
        raise ValueError(
            f"The {name} encoder is not deterministic in eval mode: two passes differ by up to "
            f"{float((first - second).abs().max()):.2g}. Remove random sampling from embed, or seed it by "
            "the input; attacks on noise measure the noise."
        )
    wanted = encoder.dimension if dimension is None else dimension
    if first.shape != (len(inputs), wanted) or encoder.dimension != wanted:
        raise ValueError(
            f"The {name} encoder says dimension {encoder.dimension} and gives {list(first.shape)}; expected "
            f"[{len(inputs)}, {wanted}]. Use encoders and centers of one binding, or add a projection."
        )
    if not torch.isfinite(first).all():
        raise ValueError(f"The {name} encoder gives values that are not finite for valid inputs; look for a division by zero.")
    length = first.norm(dim=-1)
    if not torch.allclose(length, torch.ones_like(length), atol=1e-3):
        raise ValueError(
            f"The {name} encoder's vectors have length {float(length.min()):.3g} to {float(length.max()):.3g}; "
            "normalise them in embed."
        )
    if name != TEXT:
        _check_gradient(encoder, inputs)


def _check_gradient(encoder: ModalityEncoder, inputs: Tensor) -> None:
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        embedding = encoder.embed(leaf)
        weight = torch.linspace(-1.0, 1.0, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
        gradient = None
        if embedding.requires_grad:
            gradient = torch.autograd.grad((embedding @ weight).sum(), leaf, allow_unused=True)[0]
    if gradient is None or not torch.isfinite(gradient).all() or not gradient.flatten(1).abs().amax(1).gt(0).all():
        raise ValueError(
            f"No finite, non-zero gradient reaches the {encoder.modality} encoder's inputs: an attack would be blind. Remove "
            "no_grad, detach, rounding or conversion to numpy from embed."
        )


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
