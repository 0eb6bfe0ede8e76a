"""What a draft learns from and is measured on: dialogues of a corpus of described scenes, the answers as written or as the
target says them.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from serve.draft_loss import Dialogue
from serve.request import Finished, Request
from serve.target import Target


class CorpusDialogues:
    """Every text of a split as a Dialogue, in the corpus's order."""

    def __init__(self, root: Path | str, split: str, target: Target, *, limit: int | None = None) -> None:
        """limit: scenes to take, evenly spaced. Raises FileNotFoundError or ValueError as the corpus's reader does."""
        from multimodal.corpus_file import read_manifest
        from multimodal.data import SceneTexts
        from multimodal.dialogue import encode_dialogue

        cameras = len(read_manifest(Path(root).expanduser()).cameras)
        encode = target.encode_turns or (lambda turns, _: encode_dialogue(target.tokenizer, turns))
        self._scenes = SceneTexts(root, split, target.tokenizer, limit=limit, encode=lambda turns: encode(turns, cameras))
        self._tokenizer = target.tokenizer
        self._places = [(scene, text) for scene, texts in enumerate(self._scenes.texts) for text in range(len(texts))]
        self._answers: dict[int, tuple[int, ...]] = {}  # by number, where the target answered itself

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Dialogue:
        return replace(self._text(number), images=tuple(self._scenes.image(self._places[number][0]).numpy()))

    def _text(self, number: int) -> Dialogue:
        """A dialogue without its images: what can be looked through without decoding them."""
        ids, is_answer = self._scenes.encoded(*self._places[number])
        written = Dialogue((), tuple(ids.tolist()), tuple(is_answer.tolist()))
        if number not in self._answers:
            return written
        asked, told = prompt_of(written), self._answers[number]
        return replace(written, ids=asked + told, is_answer=(False,) * len(asked) + (True,) * len(told))

    def batch(self, index: int, size: int, seed: int) -> list[Dialogue]:
        """Training batch number `index` of the endless stream under `seed`: every epoch each dialogue once, in a new order."""
        numbers = []
        for place in range(index * size, (index + 1) * size):
            epoch, offset = divmod(place, len(self))
            numbers.append(int(np.random.default_rng([seed, epoch]).permutation(len(self))[offset]))
        return [self[number] for number in numbers]

    def questions(self, count: int, *, least_tokens: int = 0, max_tokens: int = 256) -> list[Request]:
        """First questions of `count` dialogues whose first answer has at least `least_tokens` ids, evenly spaced over the
        corpus.
        """
        long = [number for number in range(len(self)) if len(first_answer(self._text(number))) >= least_tokens]
        if not long:
            raise ValueError(f"No first answer of {self._scenes.root} has {least_tokens} tokens; lower the bound.")
        chosen = [long[int(place)] for place in np.linspace(0, len(long) - 1, min(count, len(long)))]
        return [Request(prompt_of(self[number]), self[number].images, max_tokens=max_tokens) for number in chosen]

    def frequent_ids(self, count: int) -> list[int]:
        """The `count` ids that answers hold most often, the lowest first among equals; then the lowest others."""
        counts: Counter[int] = Counter()
        for number in range(len(self)):
            dialogue = self._text(number)
            counts.update(token for token, told in zip(dialogue.ids, dialogue.is_answer, strict=True) if told)
        ranked = sorted(range(self._tokenizer.vocab_size), key=lambda token: (-counts[token], token))
        return sorted(ranked[:count])

    def regenerate(
        self, answer: Callable[[Sequence[Request]], Sequence[Finished]], count: int, path: Path, max_tokens: int = 200
    ) -> None:
        """Let the target answer the first question of `count` dialogues greedily, and use its answers; kept at `path`,
        resumable.
        """
        from tqdm import tqdm

        lines = path.read_text().splitlines() if path.exists() else []
        known = {int(row["number"]): tuple(row["answer"]) for row in map(json.loads, lines)}
        wanted = [int(place) for place in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))]
        missing = [number for number in wanted if number not in known]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for first in tqdm(range(0, len(missing), 16), desc="target answers", unit="batch", disable=not missing):
                numbers = missing[first : first + 16]
                asked = [Request(prompt_of(self[number]), self[number].images, max_tokens=max_tokens) for number in numbers]
                for number, finished in zip(numbers, answer(asked), strict=True):
                    known[number] = finished.token_ids
                    file.write(json.dumps({"number": number, "answer": finished.token_ids}) + "\n")
                file.flush()
        self._answers = {number: known[number] for number in wanted}


def prompt_of(dialogue: Dialogue) -> tuple[int, ...]:
    """Ids up to where the first answer begins."""
    return dialogue.ids[: dialogue.is_answer.index(True)]


def first_answer(dialogue: Dialogue) -> tuple[int, ...]:
    start = dialogue.is_answer.index(True)
    stop = next((place for place in range(start, len(dialogue.ids)) if not dialogue.is_answer[place]), len(dialogue.ids))
    return dialogue.ids[start:stop]

