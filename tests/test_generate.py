"""`vla generate`: what streams to the terminal is the answer."""

import numpy as np
import pytest
import torch
from torchvision.io import write_png

from serve import generate as module
from serve.controller import AdaptiveController
from serve.errors import PromptTooLong
from serve.generate import load_engine, main, read_image
from serve.request import Request
from tests.tiny_vlm import naive, target, tokenizer


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "load_target", lambda path, dtype, device: target())


def test_the_answer_streams_and_equals_the_naive_decoder(loaded, tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    path = tmp_path / "frame.png"
    write_png(torch.as_tensor(image).permute(2, 0, 1).contiguous(), str(path))
    assert np.array_equal(read_image(path), image)
    words = ["--vlm=v", "--prompt=the red cup", f"--images=[{path}]", "--max_tokens=9", "--temperature=0.7", "--seed=4"]
    assert main([*words, "--engine.context=64", "--engine.max_batch=1"]) == 0
    shown = capsys.readouterr()
    asked = Request("the red cup", [image], module.SamplingConfig(0.7, seed=4), max_tokens=9)
    ids = naive(target(), asked)
    assert shown.out == tokenizer().decode([token for token in ids if token != 7]) + "\n"
    assert f"[{len(ids)} tokens, ended by" in shown.err


def test_an_engine_from_checkpoints_measures_its_machine(loaded):
    engine = load_engine("v", config=module.EngineConfig(max_batch=1, context=64))
    assert isinstance(engine.controller, AdaptiveController) and engine.controller.target.seconds[0] > 0
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        load_engine("v", dtype="int4")


def test_a_request_is_refused_before_anything_is_measured(loaded, monkeypatch):
    monkeypatch.setattr(module, "build_controller", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(PromptTooLong, match="context holds 64"):
        main(["--vlm=v", "--prompt=the red cup", "--max_tokens=64", "--engine.context=64", "--engine.max_batch=1"])


def test_a_missing_or_broken_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png is no PNG or JPEG"):
        read_image(tmp_path / "text.png")
