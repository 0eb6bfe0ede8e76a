"""The model that answers: weights, tokenizer and what it expects of an image, in one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.images import ImageConfig, prepare_images
from multimodal.layers import Rotary
from multimodal.vlm import VLM


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; `multimodal.tokenizer.TextTokenizer` is one."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Target:
    """A vision-language model that can be asked."""

    vlm: VLM
    tokenizer: Tokenizer
    images: ImageConfig = field(default_factory=ImageConfig)
    eos_ids: tuple[int, ...] = ()
    frame_size: int | None = None  # pixels of the shorter side in training; other images are scaled to it first
    encode_question: Callable[[str], Sequence[int]] | None = None  # text -> prompt ids; None: what the tokenizer says
    name: str = ""  # content hash of its checkpoint

    def __post_init__(self) -> None:
        decoder, vocab_size = self.vlm.config.decoder, self.vlm.config.vocab_size
        if decoder.positions == "mrotary":
            raise ValueError("The engine counts positions along one axis; a model with positions='mrotary' needs three.")
        if getattr(decoder, "sliding_window", None) is not None:
            raise ValueError("The engine's slots hold all of the past; a model with a sliding window would see too much of it.")
        if self.tokenizer.vocab_size > vocab_size:
            ids = self.tokenizer.vocab_size
            raise ValueError(f"The tokenizer has {ids} ids, the model {vocab_size}: they do not belong together.")

    def encode(self, text: str) -> list[int]:
        """The prompt's ids, without images."""
        return list((self.encode_question or self.tokenizer.encode)(text))

    def prepare(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> float32 [3, h, w] in the tower's range."""
        pixels = torch.as_tensor(np.ascontiguousarray(image))
        side = min(image.shape[:2])
        if self.frame_size is not None and side != self.frame_size:
            size = [round(length * self.frame_size / side) for length in image.shape[:2]]
            planes = pixels.permute(2, 0, 1)[None].float()
            scaled = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
            pixels = scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return prepare_images(pixels, self.images)

    @property
    def min_side(self) -> int:
        """Pixels that an image needs on each side."""
        return 1 if self.frame_size is not None else self.images.crop


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights and buffers in `dtype`, in place, for inference; rotary frequencies keep the precision that positions need."""
    kept = {name: part.inverse_frequency for name, part in module.named_modules() if isinstance(part, Rotary)}
    module.to(dtype)
    for name, frequency in kept.items():
        module.get_submodule(name).inverse_frequency = frequency.to(torch.promote_types(dtype, torch.float32))
    return module.eval()


def load_target(path: Path | str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Target:
    """The model of a checkpoint folder of `vla train-vlm`. Raises FileNotFoundError or ValueError saying what is wrong with it.
    """
    from multimodal.dialogue import EOS, encode_prompt
    from multimodal.vlm_checkpoint import load_vlm

    loaded = load_vlm(path)
    tokenizer = loaded.assets.tokenizer
    return Target(
        vlm=cast(loaded.model, dtype).to(device),
        tokenizer=tokenizer,
        images=loaded.assets.images,
        eos_ids=(tokenizer.token_id(EOS),),
        frame_size=loaded.assets.image_size,
        encode_question=lambda question: encode_prompt(tokenizer, question),
        name=loaded.content_hash,
    )
