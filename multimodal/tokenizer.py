"""Text ids: a small word-level or byte-level BPE tokenizer over the `tokenizers` library, one JSON string per tokenizer."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

if TYPE_CHECKING:  # a policy exported to ONNX tokenizes without torch
    from torch import Tensor

PAD, UNK, BOS = "<pad>", "<unk>", "<bos>"  # ids 0, 1, 2 of every tokenizer trained here


class TextTokenizer:
    """Encodes sentences to right-padded ids; special tokens are found by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "<pad>" typed by a user is text, not padding; no JSON field holds this
        missing = [name for name in (PAD, UNK, BOS) if tokenizer.token_to_id(name) is None]
        if missing:
            raise ValueError(f"The tokenizer lacks the special tokens {missing}; train it with train_tokenizer().")
        self.pad_id: int = tokenizer.token_to_id(PAD)
        self.unk_id: int = tokenizer.token_to_id(UNK)
        self.bos_id: int = tokenizer.token_to_id(BOS)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def vocabulary(self) -> frozenset[str]:
        """Spellings of all tokens."""
        return frozenset(self._tokenizer.get_vocab())

    def token_id(self, name: str) -> int:
        """Id of the token spelled `name`. Raises ValueError if there is none."""
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(f"The tokenizer has no token {name!r} among its {self.vocab_size}.")
        return token

    def encode(self, text: str) -> list[int]:
        """<bos> and the text's ids; a word never seen by a word-level tokenizer is <unk>."""
        return [self.bos_id, *self._tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> "tuple[Tensor, Tensor]":
        """`encode_arrays` as tensors."""
        import torch

        ids, mask = self.encode_arrays(texts, max_length)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def encode_arrays(self, texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [B, T] and mask bool [B, T] (True at text, False at padding on the right).

        T is `max_length`, or the longest text's length without one. Raises ValueError if a text does not fit, since
        dropping words would change the task.
        """
        rows = [self.encode(text) for text in texts]
        length = max((len(row) for row in rows), default=0) if max_length is None else max_length
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise ValueError(
                    f"Text needs {len(row)} tokens (with {BOS}) but max_length is {length}: {text!r}. "
                    f"Shorten it or raise max_length."
                )
        ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return ids, np.arange(length)[None] < lengths[:, None]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens. Word-level text comes back normalised (lower case, single spaces)."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """Inverse of `to_json`. Raises ValueError if the text is no tokenizer."""
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception on a damaged file
            raise ValueError(f"Not a tokenizer.json: {error}. Restore the file from the checkpoint it came with.") from error
        return cls(tokenizer)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 1024,
    kind: Literal["word", "bpe"] = "word",
    extra_tokens: Sequence[str] = (),
) -> TextTokenizer:
    """Learn a vocabulary of at most `vocab_size` ids, the three special ones and `extra_tokens` included.

    extra_tokens: further special tokens, with the ids from 3 on; found by `token_id`, never in what text encodes to.

    word: lower-cased words and punctuation marks, most frequent first (ties by spelling); enough for a suite's
        instructions, unseen words become <unk>. Raises ValueError if the words do not fit into `vocab_size`.
    bpe: byte-level BPE, lossless on any text (no <unk> arises); needs vocab_size >= 259 for the bytes.
    The same texts give the same tokenizer.
    """
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [PAD, UNK, BOS, *extra_tokens]
        tokenizer.add_special_tokens(special)
        words = sorted({word for text in texts for word in _words(tokenizer, text)})
        if len(words) + len(special) > vocab_size:
            raise ValueError(
                f"The texts have {len(words)} distinct words, vocab_size {vocab_size} holds {vocab_size - len(special)}: raise "
                f"it to {len(words) + len(special)} or use kind='bpe'."
            )
        tokenizer.model = models.WordLevel({token: index for index, token in enumerate([*special, *words])}, UNK)
    elif kind == "bpe":
        special = [PAD, UNK, BOS, *extra_tokens]
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"Byte-level BPE needs vocab_size >= {256 + len(special)} (256 bytes and {len(special)} special tokens), got "
                f"{vocab_size}."
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    else:
        raise ValueError(f"Unknown tokenizer kind {kind!r}; choose 'word' or 'bpe'.")
    return TextTokenizer(tokenizer)


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    normalised = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalised)]
