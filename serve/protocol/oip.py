"""A policy as a model of the Open Inference Protocol: which tensors mean what. JSON and gRPC share this.

    observation.images.CAMERA  UINT8 [B, S, S, 3], or BYTES [B] of PNG or JPEG files (resized to S)
    observation.state          FP32 [B, state_dim]
    task                       BYTES [B], the instruction
    known                      FP32 [B, k, action_dim], optional: the unexecuted tail (real-time chunking)
    known_length               INT32 [B], optional: how many of the k rows are meant, per observation
    delay                      INT32 [B], optional: how many of them the answer must start with; default all
    seed                       INT64 [B], optional; or one parameter `seed` for all
->  action                     FP32 [B, H, action_dim], robot units
    confidence                 FP32 [B, H, action_dim]
    committed                  INT32 [B, H, action_dim], the round in which each slot got its token; 0 for known ones
    rounds                     INT32 [B]
    milliseconds               FP64 [B], compute of the batch

The parameter `timeout_ms` is the request's deadline. Outputs that a policy does not make are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serve.protocol.images import decode_image, fit_image
from serve.protocol.limits import Limits
from serve.protocol.refusal import Refusal
from serve.protocol.requests import ActRequest, Description, act_request, check_batch, deadline_after
from serve.protocol.tensors import TensorSpec, texts
from vla.interface import ActionChunk

MODEL_NAME = "policy"
PLATFORM = "remask"
SERVER_NAME = "remask"
EXTENSIONS = ("binary_tensor_data",)
IMAGE_PREFIX = "observation.images."
STATE, TASK, KNOWN, KNOWN_LENGTH, DELAY, SEED = "observation.state", "task", "known", "known_length", "delay", "seed"


def inputs_of(description: Description) -> tuple[TensorSpec, ...]:
    """The model's inputs; the optional ones may be left out of a request."""
    spec = description.spec
    size = spec.image_size
    return (
        *(TensorSpec(IMAGE_PREFIX + camera, "UINT8", (-1, size, size, 3)) for camera in spec.cameras),
        TensorSpec(STATE, "FP32", (-1, spec.state_dim)),
        TensorSpec(TASK, "BYTES", (-1,)),
        TensorSpec(KNOWN, "FP32", (-1, -1, spec.action_dim), optional=True),
        TensorSpec(KNOWN_LENGTH, "INT32", (-1,), optional=True),
        TensorSpec(DELAY, "INT32", (-1,), optional=True),
        TensorSpec(SEED, "INT64", (-1,), optional=True),
    )


def outputs_of(description: Description) -> tuple[TensorSpec, ...]:
    slots = (-1, description.action_horizon, description.spec.action_dim)
    return (
        TensorSpec("action", "FP32", slots),
        TensorSpec("confidence", "FP32", slots, optional=True),
        TensorSpec("committed", "INT32", slots, optional=True),
        TensorSpec("rounds", "INT32", (-1,), optional=True),
        TensorSpec("milliseconds", "FP64", (-1,), optional=True),
    )


def act_requests(
    description: Description, limits: Limits, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any]
) -> list[ActRequest]:
    """The observations of one inference request. Raises Refusal naming the tensor that is missing or wrong."""
    signature = {tensor.name: tensor for tensor in inputs_of(description)}
    unknown = sorted(set(inputs) - set(signature))
    if unknown:
        raise Refusal.invalid(f"The model has no input {unknown[0]!r:.80}; it has {', '.join(signature)}.")
    missing = [name for name, tensor in signature.items() if name not in inputs and not tensor.optional]
    if missing:
        raise Refusal.invalid(
            f"Input {missing[0]!r} is missing; required: {', '.join(n for n, t in signature.items() if not t.optional)}."
        )
    count = _rows(inputs[STATE])
    cameras = description.spec.cameras
    check_batch(count, count * len(cameras), limits)
    for name, array in inputs.items():
        if _rows(array) != count:
            raise Refusal.invalid(
                f"Input {name!r} has {_rows(array)} rows, {STATE!r} has {count}; all share the first dimension."
            )
    images = {camera: _images(inputs[IMAGE_PREFIX + camera], description.spec.image_size, limits) for camera in cameras}
    instructions = texts(TASK, _typed(inputs, TASK, object, 1))
    state = _typed(inputs, STATE, np.floating, 2)
    tails = _tails(inputs, count)
    delays = _integers(inputs, DELAY, [None] * count)
    seeds = _integers(inputs, SEED, [_seed(parameters)] * count)
    deadline = deadline_after(timeout_of(parameters), limits)
    return [
        act_request(
            description,
            limits,
            images={camera: images[camera][row] for camera in cameras},
            state=state[row],
            instruction=instructions[row],
            tail=tails[row],
            delay=delays[row],
            seed=seeds[row],
            deadline=deadline,
        )
        for row in range(count)
    ]


def output_tensors(chunks: Sequence[ActionChunk], wanted: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """What the chunks say, batched; `wanted`: only these. Raises Refusal for an output that does not exist."""
    tensors = {"action": np.stack([chunk.actions for chunk in chunks]).astype(np.float32)}
    dtypes = {"confidence": np.float32, "committed": np.int32, "rounds": np.int32, "milliseconds": np.float64}
    for name, dtype in dtypes.items():
        if all(name in chunk.info for chunk in chunks):
            tensors[name] = np.stack([np.asarray(chunk.info[name], dtype=dtype) for chunk in chunks])
    if not wanted:
        return tensors
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise Refusal.invalid(f"The model has no output {unknown[0]!r:.80}; it has {', '.join(tensors)}.")
    return {name: tensors[name] for name in wanted}


def _rows(array: np.ndarray) -> int:
    return array.shape[0] if array.ndim else 0


def _images(array: np.ndarray, size: int, limits: Limits) -> Sequence[np.ndarray]:
    """One camera's pictures: files are decoded, raw pixels stay as they are (`check_observation` judges them)."""
    if array.dtype != object:
        return array
    if array.ndim != 1:
        raise Refusal.invalid(f"Encoded images have shape {list(array.shape)}; expected [B].")
    return [fit_image(decode_image(item, max_pixels=limits.pixels), size) for item in array]


def _typed(inputs: Mapping[str, np.ndarray], name: str, kind: type, dimensions: int) -> np.ndarray:
    array = inputs[name]
    fits = array.dtype == object if kind is object else np.issubdtype(array.dtype, kind)
    if not fits or array.ndim != dimensions:
        expected = {object: "BYTES", np.floating: "FP32", np.integer: "INT64"}[kind]
        raise Refusal.invalid(
            f"Input {name!r} is {array.dtype} {list(array.shape)}; expected {expected} in {dimensions} dimensions."
        )
    return array


def _tails(inputs: Mapping[str, np.ndarray], count: int) -> list[np.ndarray | None]:
    if KNOWN not in inputs:
        return [None] * count
    known = _typed(inputs, KNOWN, np.floating, 3)
    lengths = _integers(inputs, KNOWN_LENGTH, [known.shape[1]] * count)
    wrong = [length for length in lengths if not 0 <= length <= known.shape[1]]
    if wrong:
        raise Refusal.invalid(f"{KNOWN_LENGTH} is {wrong[0]}; {KNOWN!r} has {known.shape[1]} rows.")
    return [known[row, : lengths[row]] for row in range(count)]


def _integers(inputs: Mapping[str, np.ndarray], name: str, default: list[Any]) -> list[Any]:
    return [int(value) for value in _typed(inputs, name, np.integer, 1)] if name in inputs else default


def _seed(parameters: Mapping[str, Any]) -> int:
    seed = parameters.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise Refusal.invalid(f"The parameter seed is {seed!r:.40}; it must be an integer.")
    return seed


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """Seconds, from the parameter timeout_ms."""
    timeout = parameters.get("timeout_ms")
    if timeout is None:
        return None
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise Refusal.invalid(f"The parameter timeout_ms is {timeout!r:.40}; it must be a number.")
    try:
        return float(timeout) / 1000
    except OverflowError:
        raise Refusal.invalid("The parameter timeout_ms is beyond all numbers; leave it out for the server's limit.") from None
