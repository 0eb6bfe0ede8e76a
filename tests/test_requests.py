"""What is wrong with a request is said, by type and field, before anything is computed."""

from dataclasses import replace

import numpy as np
import pytest

from multimodal.sampling import SamplingConfig
from serve.engine import Engine, EngineConfig
from serve.errors import InvalidImage, InvalidRequest, PromptTooLong, RequestError, TooManyImages
from serve.request import Request, SpeculationConfig, sampling_of
from tests.tiny_vlm import VOCAB, target

IMAGE = np.zeros((32, 32, 3), dtype=np.uint8)
WRONG = {
    "max_tokens zero": ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
    "max_tokens no number": ({"max_tokens": "9"}, InvalidRequest, "max_tokens"),
    "max_tokens a truth": ({"max_tokens": True}, InvalidRequest, "max_tokens"),
    "stop no list": ({"stop": "end"}, InvalidRequest, "stop"),
    "stop of numbers": ({"stop": [3]}, InvalidRequest, "stop"),
    "stop empty": ({"stop": [""]}, InvalidRequest, "stop"),
    "stop_ids unknown": ({"stop_ids": [VOCAB]}, InvalidRequest, "stop_ids"),
    "stop_ids of text": ({"stop_ids": ["a"]}, InvalidRequest, "stop_ids"),
    "ids unknown": ({"prompt": [1, VOCAB]}, InvalidRequest, "prompt"),
    "ids negative": ({"prompt": [-1]}, InvalidRequest, "prompt"),
    "no prompt": ({"prompt": []}, InvalidRequest, "prompt"),
    "bias unknown": ({"sampling": SamplingConfig(logit_bias={VOCAB: 1.0})}, InvalidRequest, "logit_bias"),
    "allow list unknown": ({"sampling": SamplingConfig(allowed_ids=(VOCAB,))}, InvalidRequest, "allowed_ids"),
    "sampling of another type": ({"sampling": {"temperature": 1}}, InvalidRequest, "sampling"),
    "logprobs": ({"top_logprobs": 99}, InvalidRequest, "top_logprobs"),
    "nodes": ({"speculation": SpeculationConfig(max_nodes=-1)}, InvalidRequest, "speculation"),
    "too long": ({"prompt": [9] * 30, "max_tokens": 20}, PromptTooLong, "prompt"),
    "too long by an image": ({"prompt": [9] * 20, "max_tokens": 18, "images": [IMAGE]}, PromptTooLong, "prompt"),
    "three images": ({"images": [IMAGE] * 3}, TooManyImages, "images"),
    "large image": ({"images": [np.zeros((99, 99, 3), np.uint8)]}, InvalidImage, "images"),
    "small image": ({"images": [np.zeros((31, 99, 3), np.uint8)]}, InvalidImage, "images"),
    "grey image": ({"images": [np.zeros((40, 40), np.uint8)]}, InvalidImage, "images"),
    "float image": ({"images": [np.zeros((40, 40, 3))]}, InvalidImage, "images"),
    "no list of ids": ({"prompt": None}, InvalidRequest, "prompt"),
    "ids as bytes": ({"prompt": b"abc"}, InvalidRequest, "prompt"),
    "stop_ids no list": ({"stop_ids": 5}, InvalidRequest, "stop_ids"),
    "no list of images": ({"images": None}, InvalidImage, "images"),
    "no image": ({"images": ["picture.png"]}, InvalidImage, "images"),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(target(), EngineConfig(max_batch=1, context=40, max_pixels=5000))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_its_error_and_leaves_no_trace(engine, case, monkeypatch):
    changes, kind, field = WRONG[case]
    monkeypatch.setattr(engine.runner, "read", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(engine.target.vlm, "image_features", lambda *_: pytest.fail("computed"))
    with pytest.raises(kind, match=field.split(".")[-1].removesuffix("s")) as caught:
        engine.submit(Request(**{"prompt": [9], "max_tokens": 4, **changes}))
    assert isinstance(caught.value, RequestError) and caught.value.field.split(".")[-1] == field.split(".")[-1]
    assert caught.value.code == kind.code and not engine.has_work and engine.step() == []


@pytest.mark.parametrize("shape", [(1, 4_000_000), (4_000_000, 1), (1, 51)])
def test_an_image_is_not_scaled_to_a_size_beyond_reason(shape, monkeypatch):
    """Its shorter side may be scaled up to the model's frame: the longer one would follow."""
    scaling = Engine(replace(target(), frame_size=32), EngineConfig(max_batch=1, context=40))
    monkeypatch.setattr(scaling.target.vlm, "image_features", lambda *_: pytest.fail("computed"))
    with pytest.raises(InvalidImage, match="50 times the shorter"):
        scaling.submit(Request([9], [np.zeros((*shape, 3), np.uint8)], max_tokens=4))


def test_an_image_as_long_as_allowed_is_scaled_and_answered():
    scaling = Engine(replace(target(), frame_size=32), EngineConfig(max_batch=1, context=40))
    assert scaling.run([Request([9], [np.zeros((2, 100, 3), np.uint8)], max_tokens=2)])[0].reason in ("length", "stop")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", 2.5), ("seed", -1), ("allowed_ids", ())],
)
def test_sampling_out_of_range_is_a_request_error_of_its_setting(setting, value):
    with pytest.raises(InvalidRequest, match=setting) as caught:
        sampling_of(**{setting: value})
    assert caught.value.field == f"sampling.{setting}"


def test_without_max_tokens_the_context_is_the_limit(engine):
    finished = engine.run([Request([9] * 20, max_tokens=None, ignore_eos=True)])[0]
    assert finished.reason == "length" and finished.usage.prompt_tokens + finished.usage.completion_tokens == 40
    with pytest.raises(PromptTooLong):
        engine.submit(Request([9] * 40, max_tokens=None))


def test_what_just_fits_is_taken(engine):
    tokens = target().vlm.tokens_per_image
    finished = engine.run([Request([9] * (40 - 4 - tokens), [IMAGE], max_tokens=4, ignore_eos=True)])[0]
    assert finished.reason == "length" and finished.usage.prompt_tokens == 36 and finished.usage.image_tokens == tokens
