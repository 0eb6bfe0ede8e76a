"""Questions and answers as token ids: the one place that knows where in a sequence a question ends and an answer begins.

    <bos> question <answer> answer <eos> question <answer> answer <eos> ...

<bos>, <answer> and <eos> are special tokens, so nothing that a user types can forge them. A model completes a prompt that
ends in <answer> and stops at <eos>; the next question follows directly.
"""

from collections.abc import Sequence

from multimodal.tokenizer import TextTokenizer

ANSWER, EOS = "<answer>", "<eos>"
SPECIAL_TOKENS = (ANSWER, EOS)  # to train a tokenizer with, besides those that every tokenizer has


def encode_dialogue(tokenizer: TextTokenizer, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids of a whole dialogue, and which of them belong to answers (each answer's <eos> does): what training supervises."""
    ids, is_answer = [tokenizer.bos_id], [False]
    for question, answer in turns:
        asked = [*tokenizer.encode(question)[1:], tokenizer.token_id(ANSWER)]
        told = [*tokenizer.encode(answer)[1:], tokenizer.token_id(EOS)]
        ids += asked + told
        is_answer += [False] * len(asked) + [True] * len(told)
    return ids, is_answer


def encode_prompt(tokenizer: TextTokenizer, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Ids up to where the model answers `question`; `history`: the turns before it."""
    ids, _ = encode_dialogue(tokenizer, history)
    return [*ids, *tokenizer.encode(question)[1:], tokenizer.token_id(ANSWER)]


def decode_answer(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """Text of generated ids up to the first <eos>."""
    end = tokenizer.token_id(EOS)
    kept = list(ids)[: list(ids).index(end)] if end in ids else list(ids)
    return tokenizer.decode(kept)
