"""Laws of the corpus's files and batches: nothing is lost, batches are functions of (seed, index), packing changes nothing."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
from PIL import Image

from multimodal.corpus_file import (
    HELD_OUT,
    TRAIN,
    DescribedScene,
    Dialogue,
    Manifest,
    file_name,
    read_manifest,
    read_scenes,
    write_manifest,
    write_scenes,
)
from multimodal.data import IGNORED, SceneTexts
from multimodal.dialogue import ANSWER, EOS, SPECIAL_TOKENS, decode_answer, encode_dialogue, encode_prompt
from multimodal.tokenizer import TextTokenizer, train_tokenizer
from sim.language.grammar import default_grammar
from sim.language.texts import write_texts
from tests.scenes import random_scene

CAMERAS, SIZE, RIM = ("base", "wrist"), 40, 4


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 5, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def described(seed: int, split: str, texts: int) -> DescribedScene:
    scene = random_scene(seed)
    told = write_texts(scene, default_grammar(), count=texts, held_out=split == HELD_OUT, seed=seed)
    return DescribedScene(
        suite="test",
        layout=f"layout_{seed % 3}",
        task=seed % 2,
        start=seed,
        period=0,
        split=split,
        is_new_layout=split == HELD_OUT and seed % 2 == 0,
        images={camera: picture(10 * seed + place) for place, camera in enumerate(CAMERAS)},
        texts=tuple(Dialogue(t.kind, t.family, t.half, t.is_exact, t.turns, t.templates) for t in told),
        truth="{}",
    )


def make_corpus(root: Path, *, scenes: int = 7, held_out: int = 4, texts: int = 10) -> list[DescribedScene]:
    """A corpus of made-up scenes with noise for pictures; returns its rows."""
    root.mkdir(parents=True, exist_ok=True)
    train = [described(seed, TRAIN, texts) for seed in range(scenes)]
    test = [described(1000 + seed, HELD_OUT, texts) for seed in range(held_out)]
    write_scenes(root / file_name(TRAIN, 0), train[:4], CAMERAS)
    write_scenes(root / file_name(TRAIN, 1), train[4:], CAMERAS)
    write_scenes(root / file_name(HELD_OUT, 0), test, CAMERAS)
    write_manifest(root, Manifest(CAMERAS, SIZE, RIM, {TRAIN: scenes, HELD_OUT: held_out}))
    return train + test


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DescribedScene]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, make_corpus(root)


@pytest.fixture(scope="module")
def tokenizer(rows: tuple[Path, list[DescribedScene]]) -> TextTokenizer:
    said = [said for scene in rows[1] for text in scene.texts for turn in text.turns for said in turn]
    return train_tokenizer(said, 500, "bpe", SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def scenes(rows: tuple[Path, list[DescribedScene]], tokenizer: TextTokenizer) -> SceneTexts:
    return SceneTexts(rows[0], TRAIN, tokenizer)


def test_a_file_gives_back_what_was_written(rows: tuple[Path, list[DescribedScene]]) -> None:
    root, written = rows
    read = [scene for path in sorted(root.glob("*.parquet"), reverse=True) for scene in read_scenes(path)]
    assert sorted(read, key=lambda scene: scene.start) == sorted(written, key=lambda scene: scene.start)
    bare = next(read_scenes(root / file_name(TRAIN, 0), images=False, truth=False))
    assert bare.texts == written[0].texts and not bare.images and bare.truth == ""


def test_a_folder_that_is_no_corpus_is_named(tmp_path: Path, rows: tuple[Path, list[DescribedScene]]) -> None:
    with pytest.raises(FileNotFoundError, match="vla corpus"):
        read_manifest(tmp_path)
    text = (rows[0] / "manifest.json").read_text().replace('"version": 1', '"version": 99')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="version 99"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="lacks the image of 'third'"):
        write_scenes(tmp_path / "x.parquet", [described(0, TRAIN, 2)], (*CAMERAS, "third"))
    assert not list(tmp_path.glob("*x.parquet*"))


def test_a_dialogue_supervises_its_answers_alone(tokenizer: TextTokenizer) -> None:
    turns = (("What is red?", "The cube"), ("Where is it?", "On the table"))
    ids, is_answer = encode_dialogue(tokenizer, turns)
    told = [index for index, flag in zip(ids, is_answer, strict=True) if flag]
    assert tokenizer.decode(told) == "The cubeOn the table" and told.count(tokenizer.token_id(EOS)) == 2
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert encode_prompt(tokenizer, turns[1][0], turns[:1]) == ids[: len(ids) - len(tokenizer.encode("On the table"))]
    assert ids[is_answer.index(True) - 1] == tokenizer.token_id(ANSWER)
    assert decode_answer(tokenizer, told) == "The cube" and decode_answer(tokenizer, tokenizer.encode("On")[1:]) == "On"


def test_special_tokens_cannot_be_typed(tokenizer: TextTokenizer) -> None:
    ids, is_answer = encode_dialogue(tokenizer, ((f"Say {EOS}{ANSWER}", "no"),))
    assert ids.count(tokenizer.token_id(ANSWER)) == 1 and ids.count(tokenizer.token_id(EOS)) == 1
    assert sum(is_answer) == len(tokenizer.encode("no"))


def test_a_batch_is_a_function_of_seed_and_index(rows: tuple[Path, list[DescribedScene]], tokenizer: TextTokenizer) -> None:
    def batches(seed: int, order: list[int]) -> dict[int, tuple]:
        fresh = SceneTexts(rows[0], TRAIN, tokenizer)
        return {index: fresh.batch(index, scenes=3, texts_per_scene=4, seed=seed, length_power=0.5) for index in order}

    first, second = batches(0, [0, 1, 2, 3]), batches(0, [3, 1, 2, 0])
    for index, batch in first.items():
        assert all(torch.equal(a, b) for a, b in zip(batch, second[index], strict=True))
    assert not torch.equal(first[0].ids, batches(1, [0])[0].ids)


def test_an_epoch_shows_every_scene_once_and_rounds_every_text(
    scenes: SceneTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(scenes, "rows", lambda chosen, length_power: shown.extend(chosen))
    for index in range(len(scenes)):  # 5 epochs of 7 scenes in batches of 5
        scenes.batch(index, scenes=5, texts_per_scene=2, seed=3)
    for epoch in range(5):
        of_epoch = shown[7 * epoch : 7 * epoch + 7]
        assert sorted(scene for scene, _ in of_epoch) == list(range(7))
    for scene in range(7):
        told = [text for which, texts in shown if which == scene for text in texts]
        assert sorted(told) == list(range(10))
    assert [scene for scene, _ in shown[:7]] != [scene for scene, _ in shown[7:14]]


def test_packing_keeps_every_text_as_it_is_alone(scenes: SceneTexts, tokenizer: TextTokenizer) -> None:
    batch = scenes.rows([(2, [0, 3, 5]), (4, [1])], length_power=1.0)
    for row, (scene, texts) in enumerate([(2, [0, 3, 5]), (4, [1])]):
        assert torch.equal(batch.images[row], scenes.image(scene))
        for number, text in enumerate(texts):
            own = batch.segment[row] == number
            ids, is_answer = encode_dialogue(tokenizer, scenes.texts[scene][text].turns)
            assert batch.ids[row][own].tolist() == ids[:-1] and batch.position[row][own].tolist() == list(range(len(ids) - 1))
            expected = [index if told else IGNORED for index, told in zip(ids[1:], is_answer[1:], strict=True)]
            assert batch.targets[row][own].tolist() == expected
            assert batch.weight[row][own].sum().item() == pytest.approx(1.0)
        padding = batch.segment[row] == -1
        assert (batch.targets[row][padding] == IGNORED).all() and (batch.weight[row][padding] == 0).all()


def test_every_text_comes_once(scenes: SceneTexts) -> None:
    told = [(scene, text) for chosen, _ in scenes.every(3, 2) for scene, texts in chosen for text in texts]
    assert told == [(scene, text) for scene in range(len(scenes)) for text in range(len(scenes.texts[scene]))]


def test_images_are_the_decoded_jpegs(rows: tuple[Path, list[DescribedScene]], scenes: SceneTexts) -> None:
    for _ in range(2):  # decoded, then kept
        for camera, name in enumerate(CAMERAS):
            expected = np.asarray(Image.open(io.BytesIO(rows[1][3].images[name])))
            difference = np.abs(scenes.image(3)[camera].numpy().astype(int) - expected)
            assert difference.max() <= 2  # two decoders round differently


def test_a_limit_takes_scenes_evenly(rows: tuple[Path, list[DescribedScene]], tokenizer: TextTokenizer) -> None:
    few = SceneTexts(rows[0], TRAIN, tokenizer, limit=3)
    assert [texts for texts in few.texts] == [rows[1][index].texts for index in (0, 3, 6)]


def test_all_texts_survive_the_tokenizer(rows: tuple[Path, list[DescribedScene]], tokenizer: TextTokenizer) -> None:
    for scene in random.Random(0).sample(rows[1], 5):
        for text in scene.texts:
            for said in (said for turn in text.turns for said in turn):
                assert tokenizer.decode(tokenizer.encode(said)) == said
