"""The tokenizer of a published checkpoint, behind the same calls as one trained here."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from multimodal.prompt import PromptConfig, PromptFormat
from multimodal.tokenizer import TextTokenizer


class PublishedTokenizer(TextTokenizer):
    """Ids of the prompt's text behind the images; special tokens count in the template, and are refused in instructions."""

    def __init__(self, tokenizer: Tokenizer, prompt: PromptConfig) -> None:
        """Raises ValueError if the prompt's pad token is not in the vocabulary."""
        self._tokenizer, self.prompt = tokenizer, prompt
        self.pad_id = self.token_id(prompt.pad_token)
        self.bos_id = self.unk_id = None  # the prompt's ids hold the first token, and byte fallback leaves nothing unknown
        self._special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)

    @property
    def vocab_size(self) -> int:
        """Ids up to the largest; a published table may be padded beyond it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the prompt's template with `text` as its instruction. Raises ValueError if that spells a special token."""
        spelt = [token for token in self._special if token in text]
        if spelt:
            raise ValueError(f"The instruction {text!r} spells the special token {spelt[0]!r}; write it another way.")
        return encode_piece(self._tokenizer, self.prompt.template.replace("{instruction}", text))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text without the template: what the model is to say."""
        return encode_piece(self._tokenizer, text)

    @classmethod
    def from_json(cls, text: str, prompt: PromptConfig | None = None) -> "PublishedTokenizer":
        """Inverse of `to_json`, with the prompt that it was made for. Raises ValueError if the text is no tokenizer."""
        plain = _parse(text, "the checkpoint")
        return cls(plain, PromptConfig() if prompt is None else prompt)


def load_tokenizer(folder: Path, format: PromptFormat) -> PublishedTokenizer:
    """The tokenizer of a model folder, and the ids of the prompt that `format` describes.

    Raises FileNotFoundError with the command that makes a missing tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        made = f"from transformers import AutoTokenizer as T; T.from_pretrained('SOURCE').save_pretrained('{folder}')"
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json. Write it there from the model it belongs to (slow tokenizers are converted, "
            f'which needs sentencepiece): python -c "{made}"'
        )
    tokenizer = _parse(path.read_text(), str(path))
    names = _special_names(folder)
    bos = names.get("bos_token") if _leads(tokenizer, names.get("bos_token")) else None
    pad = names.get("pad_token") or names.get("eos_token") or names.get("unk_token")
    if pad is None or tokenizer.token_to_id(pad) is None:
        raise ValueError(
            f"{folder}/tokenizer_config.json names no token to pad with (pad_token {names.get('pad_token')!r}, eos_token "
            f"{names.get('eos_token')!r}). Add \"pad_token\": one of the vocabulary's tokens, to it."
        )
    before, image_before, image_after = (
        tuple(encode_piece(tokenizer, piece.replace("{bos}", bos or "")))
        for piece in (format.before, format.image_before, format.image_after)
    )
    template = format.after.replace("{bos}", bos or "")
    return PublishedTokenizer(tokenizer, PromptConfig(before, image_before, image_after, template, pad))


def encode_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a piece of a prompt, special tokens spelt in it included and none added."""
    return tokenizer.encode(text, add_special_tokens=False).ids if text else []


def _leads(tokenizer: Tokenizer, bos: str | None) -> bool:
    """Does the tokenizer put `bos` before a text by itself? (Qwen's names one in its config and never writes it.)"""
    return bos is not None and tokenizer.encode("", add_special_tokens=True).ids[:1] == [tokenizer.token_to_id(bos)]


def _special_names(folder: Path) -> Mapping[str, str]:
    """bos_token, eos_token, pad_token, unk_token by spelling, from the tokenizer's settings."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        settings: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = settings.get(role)
            spelt = value.get("content") if isinstance(value, dict) else value
            if spelt:
                names[role] = spelt
    return names


def _parse(text: str, source: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception on a damaged file
        raise ValueError(f"The tokenizer.json of {source} cannot be read: {error}. Restore the file.") from error
