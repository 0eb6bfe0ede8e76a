"""Models that are tensors in, tensors out (encoders and their embeddings), as the Open Inference Protocol serves them.

Any of them can be served: `--encoders='{NAME: {factory: "module:function", arguments: {...}}}'`, where the factory makes a
TensorModel. The one that is here embeds pictures with a policy's image tower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from multimodal.config import check_settings
from serve.protocol.limits import Limits
from serve.protocol.refusal import Refusal
from serve.protocol.tensors import NUMERIC, TensorSpec


class TensorModel(Protocol):
    """What a factory makes."""

    inputs: tuple[TensorSpec, ...]  # -1 in a shape: any size; the first dimension is the batch
    outputs: tuple[TensorSpec, ...]
    content_hash: str

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises ValueError for inputs it does not take."""
        ...


@dataclass(frozen=True)
class EncoderSource:
    """Which model is served under a name."""

    factory: str = "serve.image_encoder:policy_tower"  # module:function
    arguments: dict[str, Any] = field(default_factory=dict)  # of the factory, e.g. {path: RUN/checkpoints/last/policy}
    queue: int = 32  # requests waiting; more are refused as overload
    compute_timeout_s: float = 60.0

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any]) -> Self:
        """Settings of `--encoders` for one name. Raises ValueError naming those there are."""
        check_settings(f"encoders.{name} (what the factory takes stands under its `arguments`)", settings, cls)
        return cls(**settings)


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs, as they travel from its process."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    checkpoint: str

    def to_dict(self) -> dict[str, Any]:
        tensors = {"inputs": self.inputs, "outputs": self.outputs}
        return {name: [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in of] for name, of in tensors.items()} | {
            "checkpoint": self.checkpoint
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Signature":
        """Inverse of `to_dict`."""

        def tensors(of: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in of)

        return cls(tensors(values["inputs"]), tensors(values["outputs"]), values["checkpoint"])


def check_inputs(signature: Signature, tensors: Mapping[str, np.ndarray], limits: Limits) -> None:
    """Raise Refusal naming the tensor that is missing, unknown, or of another type or shape."""
    known = {tensor.name: tensor for tensor in signature.inputs}
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise Refusal.invalid(f"The model has no input {unknown[0]!r:.80}; it has {', '.join(known)}.")
    rows = {len(array) if array.ndim else 0 for array in tensors.values()}
    if len(rows) != 1 or not 1 <= min(rows) <= limits.batch:
        raise Refusal.invalid(f"The inputs have {sorted(rows)} rows; one number for all is needed, 1 to {limits.batch}.")
    for name, tensor in known.items():
        if name not in tensors:
            if not tensor.optional:
                raise Refusal.invalid(f"Input {name!r} is missing; the model has {', '.join(known)}.")
            continue
        array = tensors[name]
        dtype = np.dtype(object) if tensor.datatype == "BYTES" else NUMERIC[tensor.datatype]
        sizes = zip(array.shape, tensor.shape, strict=False)
        if array.dtype != dtype or array.ndim != len(tensor.shape) or any(b not in (-1, a) for a, b in sizes):
            got = f"{array.dtype} {list(array.shape)}"
            raise Refusal.invalid(f"Input {name!r} is {got}; expected {tensor.datatype} {list(tensor.shape)}.")
