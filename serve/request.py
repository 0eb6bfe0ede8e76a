"""What is asked of the engine and what it answers, as values; and the checks that come before any compute."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from multimodal.sampling import SamplingConfig, SamplingError
from serve.errors import InvalidImage, InvalidRequest, PromptTooLong, TooManyImages


@dataclass(frozen=True)
class SpeculationConfig:
    """How much may be drafted for one request; it changes the speed, never the answer."""

    enabled: bool = True
    max_nodes: int | None = None  # drafted tokens per round; None: what the controller thinks best


@dataclass(frozen=True)
class Request:
    """One prompt, its images and how to answer."""

    prompt: str | Sequence[int]  # text (the tokenizer puts <bos> first), or ids
    images: Sequence[np.ndarray] = ()  # uint8 [H, W, 3]; before the text, or where the prompt's image token stands
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int | None = 256  # None: what the prompt leaves of the context
    stop: Sequence[str] = ()  # the text ends before the first of these
    stop_ids: Sequence[int] = ()  # end the answer, beside the model's own; counted as a token, not shown
    ignore_eos: bool = False  # go on past the model's own end ids
    top_logprobs: int | None = None  # None: no log-probabilities; 0: of the chosen token; k: of the k most likely too
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)


@dataclass(frozen=True)
class TokenLogprobs:
    """Of the target's own distribution, before temperature, penalties and truncation."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), most likely first


@dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int = 0  # image tokens included
    image_tokens: int = 0
    completion_tokens: int = 0
    rounds: int = 0  # target passes after the prompt
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones, those that became part of the answer
    queue_seconds: float = 0.0  # submitted -> admitted
    first_token_seconds: float = 0.0  # submitted -> first token
    prefill_seconds: float = 0.0  # admitted -> first token
    decode_seconds: float = 0.0  # first token -> end


@dataclass(frozen=True)
class Delta:
    """Tokens committed in one round. The first `num_accepted` were drafted, the last one is the target's own."""

    request_id: int
    text: str  # what became final; "" while a character or a possible stop string is incomplete
    token_ids: tuple[int, ...]
    num_accepted: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request. `text` is the concatenation of its deltas' texts."""

    request_id: int
    reason: str  # stop | length | cancelled | error
    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    stop_string: str | None = None  # the one that ended it
    error: str | None = None


Event = Delta | Finished


@dataclass(frozen=True)
class Limits:
    """What a model and an engine can take."""

    vocab_size: int
    context: int  # positions of prompt, images and answer together
    tokens_per_image: int
    max_images: int
    max_pixels: int
    min_side: int  # pixels; what the model crops from an image
    max_stretch: int = 50  # an image's longer side over its shorter one, which may be scaled to a size of the model's
    max_top_logprobs: int = 20
    max_stop_strings: int = 16


def sampling_of(**settings: Any) -> SamplingConfig:
    """How a request samples. Raises InvalidRequest naming the setting that is out of range."""
    try:
        return SamplingConfig(**settings)
    except SamplingError as error:
        raise InvalidRequest(f"sampling.{error.field}", str(error)) from error


def check_request(request: Request, limits: Limits) -> None:
    """Raise the RequestError that names what is wrong; the length of the prompt is `check_length`'s."""
    if not isinstance(request.sampling, SamplingConfig) or not isinstance(request.speculation, SpeculationConfig):
        raise InvalidRequest("sampling", "sampling must be a SamplingConfig and speculation a SpeculationConfig.")
    if request.max_tokens is not None and not _is_count(request.max_tokens, 1):
        raise InvalidRequest("max_tokens", f"max_tokens is {request.max_tokens!r}; expected a whole number of at least 1.")
    top = request.top_logprobs
    if top is not None and not (_is_count(top, 0) and top <= limits.max_top_logprobs):
        raise InvalidRequest("top_logprobs", f"top_logprobs is {top!r}; expected None or 0 .. {limits.max_top_logprobs}.")
    nodes = request.speculation.max_nodes
    if nodes is not None and not _is_count(nodes, 0):
        raise InvalidRequest("speculation", f"speculation.max_nodes is {nodes!r}; expected None or a whole number.")
    _check_stops(request, limits)
    _check_ids("stop_ids", request.stop_ids, limits.vocab_size)
    _check_ids("sampling.logit_bias", list(request.sampling.logit_bias), limits.vocab_size)
    _check_ids("sampling.allowed_ids", request.sampling.allowed_ids or (), limits.vocab_size)
    if not isinstance(request.prompt, str):
        _check_ids("prompt", request.prompt, limits.vocab_size)
    if not _is_list(request.images):
        raise InvalidImage("images", f"images is {type(request.images).__name__}; expected a list of uint8 arrays [H, W, 3].")
    TooManyImages.check(len(request.images), limits.max_images)
    for index, image in enumerate(request.images):
        _check_image(index, image, limits)


def check_length(num_prompt: int, request: Request, limits: Limits) -> None:
    """Raise PromptTooLong unless the expanded prompt and the longest answer fit; InvalidRequest for an empty prompt."""
    wanted = 1 if request.max_tokens is None else request.max_tokens
    if num_prompt == 0:
        raise InvalidRequest("prompt", "the prompt is empty and there is no image; give at least one token.")
    if num_prompt + wanted > limits.context:
        images = len(request.images) * limits.tokens_per_image
        raise PromptTooLong(
            "prompt",
            f"the prompt takes {num_prompt} positions ({images} of them for images) and max_tokens is {wanted}: "
            f"{num_prompt + wanted} together, the context holds {limits.context}. Shorten the prompt, send fewer "
            "images or lower max_tokens.",
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least


def _is_list(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes))


def _check_stops(request: Request, limits: Limits) -> None:
    stops = request.stop
    if isinstance(stops, (str, bytes)) or not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop", f"stop is {stops!r}; expected a list of strings.")
    if len(stops) > limits.max_stop_strings or any(stop == "" for stop in stops):
        most = limits.max_stop_strings
        raise InvalidRequest("stop", f"stop holds {len(stops)} strings; allowed: up to {most}, none of them empty.")


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if not _is_list(ids):
        raise InvalidRequest(name, f"{name} is {ids!r:.40}; expected a list of token ids.")
    wrong = [token for token in ids if not (_is_count(token, 0) and token < vocab_size)]
    if wrong:
        raise InvalidRequest(name, f"{name} holds {wrong[:5]!r}; token ids are whole numbers in 0 .. {vocab_size - 1}.")


def _check_image(index: int, image: object, limits: Limits) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InvalidImage("images", f"image {index} is {got}; expected a uint8 array [H, W, 3].")
    height, width = image.shape[:2]
    size = f"image {index} has {height} x {width} pixels"
    if height * width > limits.max_pixels:
        side = math.isqrt(limits.max_pixels)
        raise InvalidImage("images", f"{size}; the limit is {limits.max_pixels} ({side} squared).")
    if min(height, width) < limits.min_side:
        raise InvalidImage("images", f"{size}; the model needs {limits.min_side} on each side.")
    if max(height, width) > limits.max_stretch * min(height, width):
        raise InvalidImage("images", f"{size}; the longer side may be {limits.max_stretch} times the shorter. Crop it.")
