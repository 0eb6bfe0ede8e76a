"""The model that answers: weights, tokenizer and what it expects of an image, in one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from multimodal.device import check_device
from multimodal.images import ImageConfig, prepare_images, scale_frame
from multimodal.layers import Rotary
from multimodal.vlm import VLM
from multimodal.vlm_folder import check_answers, open_vlm

Turn = tuple[str, str]  # question, answer


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
    # text, number of images -> prompt ids, the model's image token at its images if it has one; None: what the tokenizer says
    encode_question: Callable[[str, int], Sequence[int]] | None = None
    # questions and answers, number of images -> ids, which of them are answers; None: multimodal.dialogue
    encode_turns: Callable[[Sequence[Turn], int], tuple[list[int], list[bool]]] | None = None
    name: str = ""  # content hash of its checkpoint

    def __post_init__(self) -> None:
        vocab_size = self.vlm.config.vocab_size + self.vlm.config.num_new_tokens
        check_answers(self.vlm.config)
        if self.tokenizer.vocab_size > vocab_size:
            ids = self.tokenizer.vocab_size
            raise ValueError(f"The tokenizer has {ids} ids, the model {vocab_size}: they do not belong together.")

    def encode(self, text: str, num_images: int = 0) -> list[int]:
        """The prompt's ids, images unexpanded: `VLM.expand_prompt` comes next. Raises ValueError for what cannot be asked."""
        return list(self.tokenizer.encode(text) if self.encode_question is None else self.encode_question(text, num_images))

    def prepare_all(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> [N, 3, h, w] as the model's tower takes them."""
        weight = self.vlm.text_embedding.weight
        return torch.stack([self.prepare(image) for image in images]).to(weight)

    def prepare(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] -> float32 [3, h, w] in the tower's range."""
        return prepare_images(scale_frame(torch.as_tensor(np.ascontiguousarray(image)), self.frame_size), self.images)

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
    """The model of a folder of `vla train-vlm`, or of a published model (multimodal/pretrained).

    Raises FileNotFoundError, OSError or ValueError saying what is wrong with it, or why it cannot be asked here.
    """
    check_device(device)
    loaded = open_vlm(path, dtype=dtype)
    try:
        check_answers(loaded.model.config)
    except ValueError as error:
        raise ValueError(f"{path} cannot answer here: {error}") from error
    return Target(
        vlm=cast(loaded.model, dtype).to(device),
        tokenizer=loaded.tokenizer,
        images=loaded.images,
        eos_ids=loaded.eos_ids,
        frame_size=loaded.frame_size,
        encode_question=loaded.encode,
        encode_turns=loaded.encode_turns,
        name=loaded.content_hash,
    )
