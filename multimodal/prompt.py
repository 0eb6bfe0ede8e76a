"""What stands around images and instruction in a model's prompt, as it was trained to read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptFormat:
    """A published prompt as text. {bos} stands for the tokenizer's first token (nothing if it has none)."""

    before: str = "{bos}"  # before the first image
    image_before: str = ""  # before and after each image
    image_after: str = ""
    after: str = "{instruction}"  # behind the images


@dataclass(frozen=True)
class PromptConfig:
    """The same as token ids, where they are always the same, and what the tokenizer needs to be told."""

    before_ids: tuple[int, ...] = ()
    image_before_ids: tuple[int, ...] = ()
    image_after_ids: tuple[int, ...] = ()
    template: str = "{instruction}"  # text behind the images
    pad_token: str = ""  # spelling; "": a tokenizer trained here, which knows its own (multimodal/tokenizer.py)

    def __post_init__(self) -> None:
        if self.template.count("{instruction}") != 1:
            raise ValueError(f"PromptConfig.template {self.template!r} must hold {{instruction}} once.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PromptConfig":
        """Inverse of `dataclasses.asdict`, lists taken for tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
