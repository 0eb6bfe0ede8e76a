"""What an encoder must keep to before anything is built on it: checked on a few inputs, refused with the fix."""

from collections.abc import Collection

import torch
from torch import Tensor

from multimodal.bind.interface import ModalityEncoder, check_inputs
from multimodal.bind.modalities import MODALITIES, TEXT


def check_encoder(
    encoder: ModalityEncoder, inputs: Tensor, dimension: int | None = None, modalities: Collection[str] | None = MODALITIES
) -> None:
    """Raise ValueError, with the fix, unless `encoder` keeps to ModalityEncoder on `inputs` [B, *shape].

    Checked: one of `modalities` (None: any, for a task with sensors of its own); inputs in the box; eval mode; two passes
    agree; width (`dimension`: what centers or other encoders have) and unit length; a gradient reaches the inputs.
    """
    if not isinstance(encoder, ModalityEncoder):
        lacking = [name for name in ("modality", "dimension", "box", "logit_scale", "embed") if not hasattr(encoder, name)]
        raise ValueError(
            f"{type(encoder).__name__} is no ModalityEncoder: it lacks {', '.join(lacking)} (multimodal/bind/interface.py)."
        )
    name = encoder.modality
    if modalities is not None and name not in modalities:
        raise ValueError(
            f"Unknown modality {name!r}; allowed: {', '.join(modalities)}. Set `modality`, or add it to "
            "multimodal/bind/sensors.py."
        )
    check_inputs(encoder.box, name, inputs)
    if getattr(encoder, "training", False):
        raise ValueError(f"The {name} encoder is in training mode; call .eval() first.")
    with torch.no_grad():
        first, second = encoder.embed(inputs), encoder.embed(inputs)
    if not torch.equal(first, second):
        raise ValueError(
            f"The {name} encoder is not deterministic in eval mode: two passes differ by up to "
            f"{float((first - second).abs().max()):.2g}. Remove random sampling from embed, or seed it by "
            "the input; attacks on noise measure the noise."
        )
    wanted = encoder.dimension if dimension is None else dimension
    if first.shape != (len(inputs), wanted) or encoder.dimension != wanted:
        raise ValueError(
            f"The {name} encoder says dimension {encoder.dimension} and gives {list(first.shape)}; expected "
            f"[{len(inputs)}, {wanted}]. Use encoders and centers of one binding, or add a projection."
        )
    if not torch.isfinite(first).all():
        raise ValueError(f"The {name} encoder gives values that are not finite for valid inputs; look for a division by zero.")
    length = first.norm(dim=-1)
    if not torch.allclose(length, torch.ones_like(length), atol=1e-3):
        raise ValueError(
            f"The {name} encoder's vectors have length {float(length.min()):.3g} to {float(length.max()):.3g}; "
            "normalise them in embed."
        )
    if name != TEXT:
        _check_gradient(encoder, inputs)


def _check_gradient(encoder: ModalityEncoder, inputs: Tensor) -> None:
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        embedding = encoder.embed(leaf)
        weight = torch.linspace(-1.0, 1.0, embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
        gradient = None
        if embedding.requires_grad:
            gradient = torch.autograd.grad((embedding @ weight).sum(), leaf, allow_unused=True)[0]
    if gradient is None or not torch.isfinite(gradient).all() or not gradient.flatten(1).abs().amax(1).gt(0).all():
        raise ValueError(
            f"No finite, non-zero gradient reaches the {encoder.modality} encoder's inputs: an attack would be blind. Remove "
            "no_grad, detach, rounding or conversion to numpy from embed."
        )
