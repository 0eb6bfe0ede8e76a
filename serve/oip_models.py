"""The models that the Open Inference Protocol finds by name: the policy, and the encoders. HTTP and gRPC share this."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from serve.protocol import oip
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest, deadline_after
from serve.protocol.tensors import TensorSpec
from serve.services import Services
from serve.tensor_model import check_inputs
from serve.tensor_process import TensorProcess


class OipModel(Protocol):
    """One model as both forms of the protocol see it."""

    name: str
    checkpoint: str  # its version
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: dict[str, Any]  # what else its metadata say

    @property
    def ready(self) -> bool: ...

    async def infer(
        self, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any], wanted: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], str]:
        """Outputs (the wanted ones; none named: all) and the checkpoint that made them. Raises Refusal."""
        ...


def find_model(services: Services, name: str, version: str) -> OipModel:
    """Raises Refusal unless there is a model of that name and, if a version is given, of that version."""
    if name == oip.MODEL_NAME:
        model: OipModel = _PolicyModel(services)
    elif name in services.encoders:
        model = _EncoderModel(services, services.encoders[name])
    else:
        names = [*([oip.MODEL_NAME] if services.policy is not None else []), *services.encoders]
        raise Refusal(Code.NOT_FOUND, f"There is no model {name!r:.60}; there is {', '.join(names) or 'none'}.")
    if version and version != model.checkpoint:
        text = f"Model {name!r} has no version {version!r:.60}; it has {model.checkpoint!r}. Leave it out for the newest."
        raise Refusal(Code.NOT_FOUND, text)
    return model


class _PolicyModel:
    def __init__(self, services: Services) -> None:
        self._services, self._description = services, services.need_description()
        self.name, self.checkpoint = oip.MODEL_NAME, self._description.checkpoint
        self.inputs, self.outputs = oip.inputs_of(self._description), oip.outputs_of(self._description)
        self.facts = self._description.to_dict()

    @property
    def ready(self) -> bool:
        return self._services.policy.ready and not self._services.gate.draining

    async def infer(
        self, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any], wanted: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], str]:
        def make() -> list[ActRequest]:
            return oip.act_requests(self._description, self._services.limits, inputs, parameters)

        has_files = any(name.startswith(oip.IMAGE_PREFIX) and array.dtype == object for name, array in inputs.items())
        requests = await asyncio.to_thread(make) if has_files else make()  # pictures are decoded off the loop
        chunks = await self._services.act(requests)
        return oip.output_tensors(chunks, wanted), chunks[0].info.get("checkpoint", self.checkpoint)


class _EncoderModel:
    def __init__(self, services: Services, encoder: TensorProcess) -> None:
        if encoder.signature is None:
            raise Refusal(Code.UNAVAILABLE, f"The model {encoder.name!r} is being loaded.")
        self._services, self._encoder, self.name = services, encoder, encoder.name
        self.checkpoint = encoder.signature.checkpoint
        self.inputs, self.outputs = encoder.signature.inputs, encoder.signature.outputs
        self.facts: dict[str, Any] = {}

    @property
    def ready(self) -> bool:
        return self._encoder.ready and not self._services.gate.draining

    async def infer(
        self, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any], wanted: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], str]:
        unknown = sorted(set(wanted) - {tensor.name for tensor in self.outputs})
        if unknown:
            raise Refusal.invalid(f"The model has no output {unknown[0]!r:.80}; it has {[t.name for t in self.outputs]}.")
        check_inputs(self._encoder.signature, inputs, self._services.limits)
        deadline = deadline_after(oip.timeout_of(parameters), self._services.limits)
        answer = await self._encoder.infer(inputs, deadline)
        return {name: answer[name] for name in wanted or answer}, self.checkpoint
