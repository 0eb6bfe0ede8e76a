"""Batches from a corpus of described scenes: an image and several of its texts in one row, a function of (seed, index).

A row's texts stand one after the other and do not see each other (`segment`), each from position 0, all seeing the same
image: so its tokens are computed once for all of them, and no padding is needed between short and long texts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from multimodal.corpus_file import Dialogue, Manifest, read_manifest, read_scenes, split_files
from multimodal.dialogue import encode_dialogue
from multimodal.packed_texts import rounded_up
from multimodal.tokenizer import TextTokenizer

Turns = Sequence[tuple[str, str]]  # questions and answers
IGNORED = -100  # target of a position that nothing is predicted at
LENGTH_MULTIPLE = 64  # of T, for the reason that multimodal/packed_texts.py gives


class TextRows(NamedTuple):
    """R rows, each of one scene: C images and T positions of text."""

    images: Tensor  # uint8 [R, C, S, S, 3]
    ids: Tensor  # int64 [R, T] inputs
    targets: Tensor  # int64 [R, T] the id after each input, or IGNORED where that is no part of an answer
    segment: Tensor  # int64 [R, T] which text of its row a position belongs to, -1 for padding
    position: Tensor  # int64 [R, T] place within its text, from 0
    weight: Tensor  # float32 [R, T] of the prediction in the loss; 0 where there is none


@dataclass(frozen=True)
class _Encoded:
    ids: np.ndarray  # int64 [n]
    is_answer: np.ndarray  # bool [n]


class SceneTexts:
    """One split of a corpus, its texts as ids and its images decoded at first use (49 kB each at 128 pixels)."""

    def __init__(
        self,
        root: Path | str,
        split: str,
        tokenizer: TextTokenizer,
        *,
        limit: int | None = None,
        encode: Callable[[Turns], tuple[list[int], list[bool]]] | None = None,
    ) -> None:
        """limit: take so many scenes only, evenly spaced. encode: of a dialogue; None: multimodal.dialogue's.

        Raises FileNotFoundError or ValueError, see corpus_file.
        """
        self.root, self.split, self.tokenizer = Path(root).expanduser(), split, tokenizer
        self.manifest: Manifest = read_manifest(self.root)
        scenes = [scene for path in split_files(self.root, split) for scene in read_scenes(path, truth=False)]
        if limit is not None and limit < len(scenes):
            scenes = [scenes[index] for index in np.linspace(0, len(scenes) - 1, limit).astype(int)]
        self.layouts = [scene.layout for scene in scenes]
        self.is_new_layout = [scene.is_new_layout for scene in scenes]
        self.texts: list[tuple[Dialogue, ...]] = [scene.texts for scene in scenes]
        self._jpegs = [[scene.images[camera] for camera in self.manifest.cameras] for scene in scenes]
        size, cameras = self.manifest.image_size, len(self.manifest.cameras)
        self._images = torch.empty(len(scenes), cameras, size, size, 3, dtype=torch.uint8)  # untouched memory costs nothing
        self._is_decoded = np.zeros(len(scenes), bool)
        encode = encode or partial(encode_dialogue, tokenizer)
        pairs = [[encode(text.turns) for text in texts] for texts in self.texts]
        self._encoded = [[_Encoded(np.array(ids, np.int64), np.array(told)) for ids, told in scene] for scene in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def image(self, scene: int) -> Tensor:
        """uint8 [C, S, S, 3], cameras in the manifest's order."""
        if not self._is_decoded[scene]:
            for camera, jpeg in enumerate(self._jpegs[scene]):
                pixels = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB)
                self._images[scene, camera] = pixels.permute(1, 2, 0)
            self._is_decoded[scene] = True
        return self._images[scene]

    def encoded(self, scene: int, text: int) -> tuple[np.ndarray, np.ndarray]:
        """A text as int64 [n] ids and bool [n] whether each is part of an answer; see multimodal/dialogue.py."""
        found = self._encoded[scene][text]
        return found.ids, found.is_answer

    def rows(self, chosen: Sequence[tuple[int, Sequence[int]]], *, length_power: float = 0.0) -> TextRows:
        """Rows of (scene, its texts' indices).

        length_power p: each prediction of an answer of n ids weighs n^-p. 0: ids weigh the same, so that long answers
        rule; 1: answers do.
        """
        packed = [self._pack(scene, texts, length_power) for scene, texts in chosen]
        length = rounded_up(max(len(row["ids"]) for row in packed), LENGTH_MULTIPLE)
        paddings = {"ids": self.tokenizer.pad_id, "targets": IGNORED, "segment": -1, "position": 0, "weight": 0.0}
        columns = {}
        for name, padding in paddings.items():
            values = [np.pad(row[name], (0, length - len(row[name])), constant_values=padding) for row in packed]
            columns[name] = torch.from_numpy(np.stack(values))
        return TextRows(images=torch.stack([self.image(scene) for scene, _ in chosen]), **columns)

    def batch(self, index: int, *, scenes: int, texts_per_scene: int, seed: int, length_power: float = 0.0) -> TextRows:
        """Training batch number `index` of the endless stream under `seed`: `scenes` rows of `texts_per_scene` texts.

        Every epoch shows each scene once, in a new order; its texts take turns over the epochs. A row has one text of each
        class of length, so that rows are of similar length and little is padding.
        """
        chosen = []
        for place in range(index * scenes, (index + 1) * scenes):
            epoch, offset = divmod(place, len(self))
            scene = int(_permutation(len(self), seed, epoch)[offset])
            chosen.append((scene, self._turn(scene, epoch, texts_per_scene, seed)))
        return self.rows(chosen, length_power=length_power)

    def every(self, texts_per_row: int, rows: int) -> Iterator[tuple[list[tuple[int, list[int]]], TextRows]]:
        """Every text once, in order: (which, the rows)."""
        pieces = [
            (scene, list(range(first, min(first + texts_per_row, len(texts)))))
            for scene, texts in enumerate(self.texts)
            for first in range(0, len(texts), texts_per_row)
        ]
        for first in range(0, len(pieces), rows):
            chosen = pieces[first : first + rows]
            yield chosen, self.rows(chosen)

    def _turn(self, scene: int, epoch: int, count: int, seed: int) -> list[int]:
        """The `count` texts of a scene that an epoch shows: one of each class of length, each class in its own order."""
        lengths = np.array([len(text.ids) for text in self._encoded[scene]])
        classes = np.array_split(np.argsort(lengths, kind="stable"), min(count, len(lengths)))
        round_, place = divmod(epoch, max(1, len(lengths) // len(classes)))
        shown = [texts[_permutation(len(texts), seed, scene, round_, number)[place]] for number, texts in enumerate(classes)]
        return [int(text) for text in shown]

    def _pack(self, scene: int, texts: Sequence[int], length_power: float) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "targets", "segment", "position", "weight")}
        for number, text in enumerate(texts):
            encoded = self._encoded[scene][text]
            told = encoded.is_answer[1:]
            parts["ids"].append(encoded.ids[:-1])
            parts["targets"].append(np.where(told, encoded.ids[1:], IGNORED))
            parts["segment"].append(np.full(len(told), number))
            parts["position"].append(np.arange(len(told)))
            parts["weight"].append(np.where(told, float(told.sum()) ** -length_power, 0.0).astype(np.float32))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count)
