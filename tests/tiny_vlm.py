"""A random vision-language model small enough to enumerate, in float64 so that equal means equal, and requests for it."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from multimodal.config import DecoderConfig, get_preset
from multimodal.images import ImageConfig
from multimodal.sampling import SamplingConfig
from multimodal.tokenizer import TextTokenizer, train_tokenizer
from multimodal.vlm import VLM, generate
from serve.request import Request
from serve.target import Target, cast

TEXTS = [
    "the red cup stands on the table, left of the plate",
    "grüße aus köln 🤖 と 茶碗",
    "how many bowls? two bowls and one drawer.",
]
VOCAB = 320


@cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS, VOCAB, kind="bpe")


@cache
def target(seed: int = 0, dtype: torch.dtype = torch.float64, bidirectional_images: bool = True) -> Target:
    """Random weights, sharp enough that no two logits of a position are equal up to rounding; id 7 ends an answer."""
    torch.manual_seed(seed)
    decoder = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48)
    preset = replace(get_preset("debug"), decoder=decoder, vocab_size=VOCAB, tie_embeddings=False)
    vlm = VLM(replace(preset, bidirectional_images=bidirectional_images))
    for parameter in vlm.decoder.parameters():
        parameter.data.mul_(2.0)
    return Target(cast(vlm, dtype), tokenizer(), ImageConfig(crop=32), eos_ids=(7,))


def request(index: int, **changes) -> Request:
    """Request number `index`: random ids, none to two random images, greedy or sampled in turn."""
    random = np.random.default_rng(index)
    prompt = tuple(int(token) for token in random.integers(8, VOCAB, random.integers(1, 12)))
    images = tuple(random.integers(0, 256, (int(side), 40, 3), dtype=np.uint8) for side in random.integers(32, 48, index % 3))
    sampling = SamplingConfig() if index % 2 == 0 else SamplingConfig(temperature=0.8, top_p=0.95, seed=index)
    built = Request(prompt, images, sampling, max_tokens=int(random.integers(1, 24)))
    return replace(built, **changes)


def pixels(model: Target, asked: Request) -> Tensor | None:
    """The request's images as the tower takes them."""
    if not asked.images:
        return None
    return model.prepare_all(asked.images)


def naive(model: Target, asked: Request) -> list[int]:
    """The answer's ids by the slow truth; stop strings are not its business."""
    ids = model.encode(asked.prompt, len(asked.images)) if isinstance(asked.prompt, str) else asked.prompt
    prompt = model.vlm.expand_prompt(ids, len(asked.images))
    ends = {*asked.stop_ids, *(() if asked.ignore_eos else model.eos_ids)}
    options = {"sampling": asked.sampling, "max_tokens": asked.max_tokens, "stop_ids": ends}
    return generate(model.vlm, prompt, pixels(model, asked), **options)
