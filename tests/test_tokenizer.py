"""Laws of the text tokenizer: same text, same ids, after any round trip; nothing dropped in silence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal.tokenizer import BOS, PAD, UNK, TextTokenizer, train_tokenizer

TEXTS = ["pick up the red cube", "Pick up the alphabet soup, and place it in the basket", "lift it"]
WORD = train_tokenizer(TEXTS)
BPE = train_tokenizer(TEXTS * 3, 300, kind="bpe")


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_special_tokens_have_their_names_and_places(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.token_id(name) for name in (PAD, UNK, BOS)] == [0, 1, 2]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2)


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_batches_are_padded_on_the_right_and_equal_single_texts(tokenizer: TextTokenizer) -> None:
    ids, mask = tokenizer.encode_batch(TEXTS, max_length=60)
    assert ids.shape == mask.shape == (3, 60) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    for text, row, valid in zip(TEXTS, ids, mask, strict=True):
        expected = tokenizer.encode(text)
        assert row[valid].tolist() == expected and (row[~valid] == tokenizer.pad_id).all()
        assert valid.tolist() == [True] * len(expected) + [False] * (60 - len(expected))


def test_without_a_length_the_longest_text_decides() -> None:
    ids, mask = WORD.encode_batch(TEXTS)
    assert ids.shape[1] == max(len(WORD.encode(text)) for text in TEXTS) and mask.any(0).all()
    assert WORD.encode_batch([])[0].shape == (0, 0)


def test_text_that_does_not_fit_is_refused() -> None:
    needed = len(WORD.encode(TEXTS[1]))
    assert WORD.encode_batch(TEXTS, needed)[0].shape == (3, needed)
    with pytest.raises(ValueError, match=f"needs {needed} tokens .* max_length is {needed - 1}: 'Pick up the alphabet"):
        WORD.encode_batch(TEXTS, needed - 1)


def test_unseen_words_are_unknown_and_seen_ones_keep_their_ids() -> None:
    known, mixed = WORD.encode("pick up the cube"), WORD.encode("PICK up the zebra")
    assert known[:4] == mixed[:4] and mixed[4] == WORD.unk_id and WORD.unk_id not in known


@pytest.mark.parametrize("tokenizer", [WORD, BPE])
def test_names_of_special_tokens_in_a_text_are_text(tokenizer: TextTokenizer) -> None:
    assert {tokenizer.pad_id, tokenizer.bos_id}.isdisjoint(tokenizer.encode("lift <pad> <bos> it")[1:])


@given(st.text(max_size=40))
def test_json_round_trip_changes_no_id(text: str) -> None:
    for tokenizer in (WORD, BPE):
        assert TextTokenizer.from_json(tokenizer.to_json()).encode(text) == tokenizer.encode(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bpe_loses_no_text(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text and BPE.unk_id not in BPE.encode(text)


def test_training_is_deterministic_and_ignores_order() -> None:
    assert train_tokenizer(TEXTS[::-1] + TEXTS).to_json() == WORD.to_json()
    assert train_tokenizer(TEXTS * 3, 300, kind="bpe").to_json() == BPE.to_json()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="raise it to"):
        train_tokenizer(TEXTS, vocab_size=5)
    with pytest.raises(ValueError, match=">= 259"):
        train_tokenizer(TEXTS, vocab_size=100, kind="bpe")
    with pytest.raises(ValueError, match="'word' or 'bpe'"):
        train_tokenizer(TEXTS, kind="char")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Not a tokenizer.json"):
        TextTokenizer.from_json("{}")
    with pytest.raises(ValueError, match="no token 'zebra'"):
        WORD.token_id("zebra")
