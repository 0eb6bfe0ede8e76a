"""Zero-shot classification: an encoder against frozen centers; and the checks an encoder, centers and inputs must pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from multimodal.bind.interface import Box, ModalityEncoder, check_inputs


class Classifier(nn.Module):
    """Inputs in the encoder's box -> logits [B, C].

    centers: unit vectors [C, D], or [C, K, D], K centers a class: then a class scores log mean_k exp(scale <z, c_k>), which
    needs the scale inside (UniBind's score; published code multiplies by it afterwards, which leaves logits flat).
    scale: of the cosines; default the encoder's own.
    """

    centers: Tensor

    def __init__(self, encoder: ModalityEncoder, centers: Tensor, scale: float | None = None) -> None:
        super().__init__()
        check_centers(centers, encoder.dimension)
        self.encoder = encoder
        self.scale = encoder.logit_scale if scale is None else scale
        self.register_buffer("centers", centers.detach().clone(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return center_logits(self.encoder.embed(inputs), self.centers, self.scale)


def center_logits(embeddings: Tensor, centers: Tensor, scale: float) -> Tensor:
    """Embeddings [B, D] against centers [C, D] or [C, K, D] -> [B, C]."""
    scores = scale * (embeddings @ centers.flatten(0, -2).T)
    if centers.ndim == 2:
        return scores
    scores = scores.unflatten(1, centers.shape[:2])
    return scores.logsumexp(2) - torch.log(torch.tensor(float(centers.shape[1]), device=scores.device))


def check_centers(centers: Tensor, dimension: int, class_names: Sequence[str] | None = None) -> None:
    """Raise ValueError unless the centers are unit vectors of the encoder's width, one row (or group) a class name."""
    if centers.ndim not in (2, 3) or centers.shape[-1] != dimension:
        raise ValueError(
            f"Centers are {list(centers.shape)}; the encoder embeds into {dimension} dimensions, so [classes, {dimension}] or "
            f"[classes, prompts, {dimension}] is needed. Make them with the text tower that this encoder was bound to."
        )
    if class_names is not None and len(class_names) != len(centers):
        raise ValueError(f"There are {len(centers)} centers and {len(class_names)} class names; give one name per center.")
    norms = centers.norm(dim=-1)
    if not torch.isfinite(centers).all() or (norms - 1).abs().max() > 1e-3:
        raise ValueError(
            f"Centers have norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}; unit vectors are needed: "
            "normalise them over the last dimension."
        )


def as_stored(box: Box) -> Box:
    """The box with bounds as float32 rounds them, outwards: what a value clamped to the box can be (58.86 is stored as 58.860001)."""
    low, high = torch.tensor([box.low, box.high], dtype=torch.float32).tolist()
    return replace(box, low=min(low, box.low), high=max(high, box.high))


def check_encoder(encoder: ModalityEncoder, inputs: Tensor) -> None:
    """Raise ValueError unless the encoder gives finite unit vectors of its width, the same ones twice, on inputs in its box."""
    check_inputs(as_stored(encoder.box), encoder.modality, inputs)
    with torch.no_grad():
        first, second = encoder.embed(inputs), encoder.embed(inputs)
    if first.shape != (len(inputs), encoder.dimension):
        raise ValueError(
            f"The {encoder.modality} encoder says dimension {encoder.dimension} and embeds {len(inputs)} inputs to "
            f"{list(first.shape)}; correct `dimension`."
        )
    if not torch.equal(first, second):
        raise ValueError(
            f"The {encoder.modality} encoder embeds the same inputs differently (by up to {float((first - second).abs().max()):.3g}): "
            "call eval() on its trunk (dropout, batch norm), or average its noise inside `embed`."
        )
    off = (first.norm(dim=1) - 1).abs().max()
    if not off < 1e-3:
        raise ValueError(f"Embeddings of the {encoder.modality} encoder are off unit length by {float(off):.3g}; normalise in `embed`.")


def check_modality(encoders: Mapping[str, ModalityEncoder], modality: str) -> ModalityEncoder:
    """The encoder of that modality. Raises ValueError listing those there are."""
    if modality not in encoders:
        raise ValueError(f"Unknown modality {modality!r}; this task has {sorted(encoders)}.")
    return encoders[modality]
