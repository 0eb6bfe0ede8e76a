"""What calibration, attacks and evaluation know of an encoder: its modality's box of valid inputs, and `embed`."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Box:
    """The valid inputs of a modality, and what a perturbation of one step (1/255 of the field's pictures) means in it.

    low, high: bounds of every value, in `unit`. step: radius of epsilon 1/255 in `unit`, under `norm` over one sample;
    a perturbation of k/255 has radius k * step and never leaves [low, high].
    """

    low: float
    high: float
    unit: str
    step: float
    norm: Norm = "linf"

    def radius(self, steps: float) -> float:
        """The radius of epsilon `steps`/255, in `unit`."""
        return steps * self.step

    def clamp(self, inputs: Tensor) -> Tensor:
        return inputs.clamp(self.low, self.high)


@runtime_checkable
class ModalityEncoder(Protocol):
    """A frozen or calibrated encoder of one modality into the shared space.

    In eval mode `embed` is deterministic. Whoever takes one in checks it with
    `multimodal.bind.encoder_checks.check_encoder`.
    """

    modality: str
    dimension: int
    box: Box
    logit_scale: float  # what cosines are multiplied by before the softmax (sharp: attacks run at it)

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> unit vectors [B, dimension], differentiable in the inputs."""
        ...


def check_inputs(box: Box, modality: str, inputs: Tensor) -> None:
    """Raise ValueError if a value is not finite or lies outside the box."""
    if not torch.isfinite(inputs).all():
        raise ValueError(f"{modality} inputs hold values that are not finite; mend or drop those samples.")
    low, high = float(inputs.min()), float(inputs.max())
    lowest, highest = box.low, box.high
    if inputs.is_floating_point():  # clamped values have the bounds as their own type rounds them: 58.86 is 58.860001 in float32
        rounded = torch.tensor([lowest, highest], dtype=inputs.dtype).tolist()
        lowest, highest = min(lowest, rounded[0]), max(highest, rounded[1])
    if low < lowest or high > highest:
        raise ValueError(
            f"{modality} inputs lie in [{low:.4g}, {high:.4g}] {box.unit}; allowed: [{box.low:.4g}, {box.high:.4g}]. "
            "Convert the unit or clamp before encoding."
        )
