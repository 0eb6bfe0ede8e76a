"""protobuf messages <-> arrays, observations and chunks: both gRPC services' translations, no I/O."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from serve.oip_models import OipModel
from serve.protocol import oip
from serve.protocol import open_inference_pb2 as oip_pb2
from serve.protocol import policy_pb2
from serve.protocol.images import decode_image, fit_image
from serve.protocol.limits import Limits
from serve.protocol.refusal import Refusal
from serve.protocol.requests import ActRequest, Description, act_request
from serve.protocol.tensors import check_shape, datatype_of, from_raw, from_values, to_raw
from vla.interface import ActionChunk

CONTENTS = {  # datatype -> field of InferTensorContents; FP16 has none
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def status_of(refusal: Refusal) -> grpc.StatusCode:
    return getattr(grpc.StatusCode, refusal.code.value.grpc)


def trailers_of(refusal: Refusal) -> tuple[tuple[str, str], ...]:
    """Trailing metadata: when to try again, in milliseconds (gRFC A6's name)."""
    if refusal.retry_after_s is None:
        return ()
    return (("grpc-retry-pushback-ms", str(int(1000 * refusal.retry_after_s) + 1)),)


# ---------------------------------------------------------------------------------------------- Open Inference Protocol


def infer_inputs(request: oip_pb2.ModelInferRequest) -> dict[str, np.ndarray]:
    """The tensors of a ModelInfer call. Raises Refusal naming what is wrong."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise Refusal.invalid(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; there is one each, or none at all."
        )
    inputs: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(request.inputs):
        shape = tuple(tensor.shape)
        if tensor.name in inputs:
            raise Refusal.invalid(f"Input {tensor.name!r:.80} is there twice.")
        if raw:
            if tensor.HasField("contents"):
                raise Refusal.invalid(f"Input {tensor.name!r:.80} has contents beside raw_input_contents.")
            inputs[tensor.name] = from_raw(tensor.name, tensor.datatype, shape, raw[index])
        else:
            check_shape(tensor.name, tensor.datatype, shape)
            field = CONTENTS.get(tensor.datatype)
            if field is None:
                raise Refusal.invalid(f"Input {tensor.name!r:.80}: {tensor.datatype} travels in raw_input_contents only.")
            inputs[tensor.name] = from_values(tensor.name, tensor.datatype, shape, list(getattr(tensor.contents, field)))
    return inputs


def parameters_of(parameters: Mapping[str, oip_pb2.InferParameter]) -> dict[str, Any]:
    values = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            values[name] = getattr(parameter, choice)
    return values


def infer_response(
    request: oip_pb2.ModelInferRequest, tensors: Mapping[str, np.ndarray], checkpoint: str
) -> oip_pb2.ModelInferResponse:
    """The outputs, as raw contents."""
    response = oip_pb2.ModelInferResponse(model_name=request.model_name, model_version=checkpoint, id=request.id)
    for name, array in tensors.items():
        response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        response.raw_output_contents.append(to_raw(array))
    return response


def model_metadata(model: OipModel) -> oip_pb2.ModelMetadataResponse:
    response = oip_pb2.ModelMetadataResponse(name=model.name, versions=[model.checkpoint], platform=oip.PLATFORM)
    for tensor in model.inputs:
        response.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    for tensor in model.outputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return response


# -------------------------------------------------------------------------------------------------------- PolicyService


def describe_response(description: Description) -> policy_pb2.DescribeResponse:
    spec = description.spec
    return policy_pb2.DescribeResponse(
        robot=spec.name,
        cameras=spec.cameras,
        image_size=spec.image_size,
        state_names=spec.state_names,
        action_names=spec.action_names,
        binary_actions=spec.binary_actions,
        control_hz=spec.control_hz,
        action_horizon=description.action_horizon,
        checkpoint=description.checkpoint,
    )


async def parsed(description: Description, limits: Limits, message: policy_pb2.ActRequest, deadline: float) -> ActRequest:
    """`request_of`, off the event loop where pictures have to be decoded."""
    if any(image.WhichOneof("content") == "encoded" for image in message.images):
        return await asyncio.to_thread(request_of, description, limits, message, deadline)
    return request_of(description, limits, message, deadline)


def request_of(description: Description, limits: Limits, message: policy_pb2.ActRequest, deadline: float) -> ActRequest:
    """Raises Refusal naming what is wrong."""
    if len(message.images) > limits.images:
        raise Refusal.invalid(f"{len(message.images)} images; at most {limits.images} are accepted.")
    wanted = [image for image in message.images if image.camera in description.spec.cameras]
    images = {image.camera: _image(image, description.spec.image_size, limits) for image in wanted}
    tail = message.tail
    known = None
    if message.HasField("tail"):
        if tail.steps < 0 or tail.dims < 0 or tail.steps * tail.dims != len(tail.values):
            raise Refusal.invalid(f"The tail is {tail.steps} x {tail.dims} with {len(tail.values)} values.")
        known = np.array(tail.values, dtype=np.float32).reshape(tail.steps, tail.dims)
    return act_request(
        description,
        limits,
        images=images,
        state=np.array(message.state, dtype=np.float32),
        instruction=message.instruction,
        tail=known,
        delay=message.delay if message.HasField("delay") else None,
        seed=message.seed,
        deadline=deadline,
    )


def act_response(chunk: ActionChunk) -> policy_pb2.ActResponse:
    actions = np.asarray(chunk.actions, dtype=np.float32)
    response = policy_pb2.ActResponse(
        actions=policy_pb2.Actions(steps=actions.shape[0], dims=actions.shape[1], values=actions.ravel().tolist()),
        rounds=int(chunk.info.get("rounds", 0)),
        milliseconds=float(chunk.info.get("milliseconds", 0.0)),
        checkpoint=str(chunk.info.get("checkpoint", "")),
    )
    if "confidence" in chunk.info:
        response.confidence.extend(np.asarray(chunk.info["confidence"], dtype=np.float32).ravel().tolist())
    if "committed" in chunk.info:
        response.committed.extend(np.asarray(chunk.info["committed"]).astype(int).ravel().tolist())
    return response


def _image(image: policy_pb2.Image, size: int, limits: Limits) -> np.ndarray:
    kind = image.WhichOneof("content")
    if kind == "encoded":
        return fit_image(decode_image(image.encoded, max_pixels=limits.pixels), size)
    if kind is None:
        raise Refusal.invalid(f"Image {image.camera!r:.80} has no content.")
    raw = image.raw
    if raw.height < 0 or raw.width < 0 or raw.height * raw.width * 3 != len(raw.data):
        raise Refusal.invalid(
            f"Image {image.camera!r:.80} is {raw.height} x {raw.width} with {len(raw.data)} bytes; "
            f"uint8 RGB has {raw.height * raw.width * 3}."
        )
    return np.frombuffer(raw.data, dtype=np.uint8).reshape(raw.height, raw.width, 3)
