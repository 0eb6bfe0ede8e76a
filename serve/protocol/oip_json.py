"""The Open Inference Protocol over HTTP: JSON with binary tensors behind it, to arrays and back.

Binary tensors (extension `binary_tensor_data`, as Triton and KServe write it): the header Inference-Header-Content-Length
gives the bytes of the JSON; each input whose parameters hold `binary_data_size` has its bytes behind it, in order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.schemas import InferRequestBody, first_error
from serve.protocol.tensors import JSON_LENGTH_HEADER, datatype_of, from_raw, from_values, to_raw, to_values


@dataclass(frozen=True)
class InferRequest:
    """A parsed request: tensors by name, and how its outputs are wanted."""

    id: str | None
    parameters: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...]  # empty: all
    binary_outputs: frozenset[str] | None  # None: all of them


def parse(body: bytes, json_length: str | None, limits: Limits) -> InferRequest:
    """Raises Refusal naming what is wrong."""
    head, tail = _split(body, json_length)
    if len(head) > limits.json_bytes:
        raise Refusal(
            Code.TOO_LARGE, f"{len(head)} bytes of JSON; at most {limits.json_bytes} are read. Send tensors as binary data."
        )
    try:
        request = InferRequestBody.model_validate(load_json(head))
    except ValidationError as error:
        raise Refusal.invalid(first_error(error)) from error
    inputs: dict[str, np.ndarray] = {}
    position = 0
    for tensor in request.inputs:
        if tensor.name in inputs:
            raise Refusal.invalid(f"Input {tensor.name!r:.80} is there twice.")
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            if tensor.data is None:
                raise Refusal.invalid(f"Input {tensor.name!r:.80} has neither data nor binary_data_size.")
            inputs[tensor.name] = from_values(tensor.name, tensor.datatype, tensor.shape, tensor.data)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail) - position:
            raise Refusal.invalid(
                f"Input {tensor.name!r:.80} names binary_data_size {size!r:.20}; {len(tail) - position} bytes are left."
            )
        inputs[tensor.name] = from_raw(tensor.name, tensor.datatype, tensor.shape, tail[position : position + size])
        position += size
    if position != len(tail):
        raise Refusal.invalid(
            f"{len(tail) - position} bytes follow the last binary tensor; do {JSON_LENGTH_HEADER} and the sizes fit?"
        )
    return InferRequest(
        request.id, request.parameters or {}, inputs, tuple(output.name for output in request.outputs or ()), _binary(request)
    )


def response(
    request: InferRequest, model: str, version: str, tensors: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON if binary tensors follow it (None: it is JSON alone)."""
    outputs, blobs = [], []
    for name, array in tensors.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if request.binary_outputs is None or name in request.binary_outputs:
            blobs.append(to_raw(array))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = to_values(array)
        outputs.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": outputs}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer, allow_nan=False).encode()
    return (head + b"".join(blobs), len(head)) if blobs else (head, None)


def load_json(data: bytes) -> Any:
    """JSON from a network: no NaN, no bottomless nesting. Raises Refusal."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and integers of thousands of digits
        raise Refusal.invalid(f"The body is not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _split(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not json_length.isascii() or not json_length.isdigit() or len(json_length) > 12 or int(json_length) > len(body):
        raise Refusal.invalid(f"{JSON_LENGTH_HEADER} is {json_length!r:.40}; the body has {len(body)} bytes.")
    return body[: int(json_length)], body[int(json_length) :]


def _binary(request: InferRequestBody) -> frozenset[str] | None:
    """Names of the outputs wanted as binary data; None for all."""
    everything = _flag(request.parameters, "binary_data_output", False)
    wanted: Sequence[Any] = request.outputs or ()
    if not wanted:
        return None if everything else frozenset()
    return frozenset(output.name for output in wanted if _flag(output.parameters, "binary_data", everything))


def _flag(parameters: Mapping[str, Any] | None, name: str, default: bool) -> bool:
    value = (parameters or {}).get(name, default)
    if not isinstance(value, bool):
        raise Refusal.invalid(f"The parameter {name} is {value!r:.40}; it must be true or false.")
    return value
