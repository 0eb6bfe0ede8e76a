"""Published layouts behind the language server and the ONNX export: token-exact against their naive `generate`, or refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multimodal.export_vlm import export_vlm, write_vlm
from multimodal.onnx_vlm import generate as onnx_generate
from multimodal.onnx_vlm import load_onnx_vlm
from multimodal.sampling import SamplingConfig
from multimodal.vlm import generate as naive_generate
from multimodal.vlm_folder import open_vlm
from serve.controller import FixedController
from serve.draft_data import CorpusDialogues
from serve.draft_loss import DistillationConfig, DistillationLoss, Teacher
from serve.draft_model import DraftModel, DraftModelConfig
from serve.drafters import DraftLimits, NgramDrafter
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.errors import InvalidRequest, TooManyImages
from serve.generate import main as vla_generate
from serve.request import Request
from serve.target import Target, load_target
from tests.published import IMAGE, save_model, write_words
from tests.test_corpus_data import make_corpus
from tests.tiny_vlm import naive

ANSWERED = ("llava", "llava_next", "smolvlm", "qwen2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for name in (*ANSWERED, "qwen2_vl", "paligemma", "mistral"):
        save_model(name, root / name)
        write_words(root / name)
    return root


def target_of(saved: Path, name: str) -> Target:
    return load_target(saved / name, dtype=torch.float64)


def frames(count: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, (count, 40, 52, 3), dtype=np.uint8))


def asked_of(target: Target) -> list[Request]:
    """Greedy and sampled, with as many images as it takes, up to two."""
    counts = (0, 0) if target.vlm.config.vision is None else (0, 1, 2)
    words = ("pick up the cup", "the cup", "up the the cup")
    sampled = SamplingConfig(temperature=0.9, seed=4)
    return [
        Request(text, frames(count), sampling, max_tokens=6)
        for count, text in zip(counts, words, strict=False)
        for sampling in (SamplingConfig(), sampled)
    ]


def engine_on(target: Target, drafter=None) -> Engine:
    config = EngineConfig(max_batch=3, context=64, prefill_chunk=5, max_nodes=8)
    return Engine(target, config, drafter, FixedController(DraftLimits(max_nodes=6, max_depth=3, width=2)))


@pytest.mark.parametrize("name", ANSWERED)
def test_the_engine_says_what_the_naive_decoder_says(saved: Path, name: str):
    target = target_of(saved, name)
    requests = asked_of(target)
    wanted = [naive(target, asked) for asked in requests]
    assert len({tuple(answer) for answer in wanted}) > 1
    drafters = [NgramDrafter()]
    if name == "llava":
        torch.manual_seed(0)
        draft = DraftModel(DraftModelConfig(), target.vlm).double().eval()
        drafters.append(EagleDrafter(draft, target.vlm, num_slots=3, capacity=72))
    for drafter in drafters:
        assert [list(finished.token_ids) for finished in engine_on(target, drafter).run(requests)] == wanted


def test_a_prompt_has_its_images_where_the_published_one_has_them(saved: Path):
    target = target_of(saved, "llava")
    ids = target.encode("pick up", 2)
    start, rest = [1, 5], ids[4:]  # {bos}USER:
    assert ids[:2] == start and ids[2:4] == [IMAGE, IMAGE] and rest == target.encode("pick up")[2:]
    expanded = target.vlm.expand_prompt(ids, 2)
    assert expanded == [*start, *[-1] * (2 * target.vlm.tokens_per_image), *rest]


def test_a_draft_learns_from_a_published_model(saved: Path, tmp_path: Path):
    make_corpus(tmp_path / "corpus", scenes=5, held_out=1, texts=3)
    target = load_target(saved / "llava")
    dialogues = CorpusDialogues(tmp_path / "corpus", "train", target)
    batch = dialogues.batch(0, 2, 0)
    assert all(dialogue.ids.count(IMAGE) == 2 and dialogue.ids[-1] in target.eos_ids for dialogue in batch)
    draft = DraftModel(DraftModelConfig(), target.vlm)
    terms = DistillationLoss(Teacher(target), DistillationConfig(rollout=1))(draft, batch, torch.Generator().manual_seed(0))
    terms.loss_sum.backward()
    assert float(draft.fuse.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [("qwen2_vl", "positions on a grid"), ("paligemma", "see themselves whole"), ("mistral", "sliding window")],
)
def test_what_cannot_be_asked_is_one_error(saved: Path, tmp_path: Path, name: str, reason: str):
    with pytest.raises(ValueError, match=f"{name} cannot answer here: .*{reason}"):
        load_target(saved / name)
    with pytest.raises(ValueError, match=f"{name} cannot be exported: .*{reason}"):
        export_vlm(str(saved / name), tmp_path / "export", "float32", None, 0)


def test_more_images_than_fit_and_forged_tokens_are_refused(saved: Path):
    engine = engine_on(target_of(saved, "llava"))
    assert engine.limits.max_images == 64 // engine.limits.tokens_per_image
    with pytest.raises(TooManyImages):
        engine.submit(Request("the cup", frames(engine.limits.max_images + 1), max_tokens=1))
    with pytest.raises(InvalidRequest, match="spells the special token '<image>'"):
        engine.submit(Request("the <image> cup", frames(1), max_tokens=1))
    with pytest.raises(TooManyImages, match="at most 0"):
        engine_on(target_of(saved, "qwen2")).submit(Request("the cup", frames(1), max_tokens=1))


def test_the_command_asks_a_published_folder(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = load_target(saved / "llava")
    wanted = naive(target, Request("pick up the cup", max_tokens=5))
    words = [f"--vlm={saved / 'llava'}", "--prompt=pick up the cup", "--max_tokens=5", "--quiet=true"]
    assert vla_generate([*words, "--engine.context=64", "--engine.max_batch=1"]) == 0
    assert capsys.readouterr().out == target.tokenizer.decode([token for token in wanted if token not in target.eos_ids]) + "\n"


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_an_exported_published_model_says_what_its_naive_decoder_says(saved: Path, tmp_path: Path, name: str):
    model = open_vlm(saved / name)
    write_vlm(model, tmp_path, "float32")
    exported = load_onnx_vlm(tmp_path, threads=1)
    assert json.loads((tmp_path / "manifest.json").read_text())["prompt"] is not None
    for count in (0, 1, 2):
        prompt, images = exported.encode("pick up the cup", count), exported.prepare(frames(count))
        assert prompt == model.model.expand_prompt(model.encode("pick up the cup", count), count)
        wanted = naive_generate(model.model, prompt, torch.from_numpy(images), max_tokens=6, stop_ids=model.eos_ids)
        assert onnx_generate(exported, prompt, images, max_tokens=6) == wanted


def test_the_end_of_an_answer_is_the_generation_configs(saved: Path, tmp_path: Path):
    target = target_of(saved, "llava")
    assert target.eos_ids == (2,)
    asked = Request("pick up the cup", max_tokens=8, ignore_eos=True)
    free = naive(target, asked)
    ending = replace(target, eos_ids=(free[2],))
    (finished,) = engine_on(ending).run([replace(asked, ignore_eos=False)])
    assert list(finished.token_ids) == free[: free.index(free[2]) + 1] and finished.reason == "stop"
