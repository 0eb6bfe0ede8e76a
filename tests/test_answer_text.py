"""Streamed text equals decoded text: split characters, word spaces, stop strings at any offset."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multimodal.tokenizer import TextTokenizer, train_tokenizer
from serve.answer_text import AnswerText
from tests.tiny_vlm import TEXTS, VOCAB, tokenizer

WORDS = train_tokenizer(TEXTS)


def stream(codec: TextTokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[AnswerText, list[str], int]:
    """The answer, its pieces, and how many tokens were pushed."""
    answer, pieces, count = AnswerText(codec.decode, stop), [], 0
    for token in ids:
        count += 1
        ended = answer.push(token)
        pieces.append(answer.take())
        if ended:
            break
    answer.finish()
    pieces.append(answer.take())
    return answer, pieces, count


def stop_reference(codec: TextTokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """Decode every beginning anew; cut at the first stop string to be complete."""
    for count in range(1, len(ids) + 1):
        text = codec.decode(ids[:count])
        places = [place for each in stop if (place := text.find(each)) >= 0]
        if places:
            return text[: min(places)], count
    return codec.decode(ids), len(ids)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_pieces_of_any_ids_add_up_to_their_text(ids):
    answer, pieces, _ = stream(tokenizer(), ids)
    assert "".join(pieces) == answer.text == tokenizer().decode(ids)


@given(st.lists(st.integers(0, WORDS.vocab_size - 1), max_size=12))
def test_pieces_of_words_keep_their_spaces(ids):
    answer, pieces, _ = stream(WORDS, ids)
    assert "".join(pieces) == answer.text == WORDS.decode(ids)


def test_a_character_split_over_tokens_is_shown_whole_or_not_at_all():
    text = "tee ☕ für 🤖🤖 und 茶"
    single = train_tokenizer(["a"], 259, kind="bpe")  # one token per byte
    ids = single.encode(text)[1:]
    assert len(ids) == len(text.encode())
    answer, pieces, _ = stream(single, ids)
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces) and "🤖" in pieces
    assert stream(single, ids[:-1])[0].text == text[:-1] + "\ufffd"  # cut off inside a character


@given(st.text(alphabet="ab ☕", max_size=30), st.lists(st.text(alphabet="ab ☕", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    ids, stop = tokenizer().encode(text)[1:], tuple(stop)
    answer, pieces, count = stream(tokenizer(), ids, stop)
    assert (answer.text, count) == stop_reference(tokenizer(), ids, stop)
    assert "".join(pieces) == answer.text
    assert (answer.stop_string is not None) == any(each in text for each in stop)


@pytest.mark.parametrize("offset", range(6))
def test_what_may_begin_a_stop_string_is_held_back(offset):
    answer = AnswerText(lambda ids: "".join(map(chr, ids)), ("stop",))
    for character in "x" * offset + "sto":
        assert not answer.push(ord(character))
    assert answer.take() == "x" * offset
    assert not answer.push(ord("a")) and answer.take() == "stoa"
    assert [answer.push(ord(character)) for character in "stop"] == [False] * 3 + [True]
    assert answer.text == "x" * offset + "stoa" and answer.stop_string == "stop"


def test_many_invalid_bytes_are_no_trouble():
    single = train_tokenizer(["a"], 259, kind="bpe")
    ids = np.random.default_rng(0).integers(3, 259, 400).tolist()
    assert stream(single, ids)[0].text == single.decode(ids)
