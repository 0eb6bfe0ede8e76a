"""Zero-shot classification: an encoder against frozen centers, and the checks that centers must pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from multimodal.bind.interface import ModalityEncoder


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


def check_modality(encoders: Mapping[str, ModalityEncoder], modality: str) -> ModalityEncoder:
    """The encoder of that modality. Raises ValueError listing those there are."""
    if modality not in encoders:
        raise ValueError(f"Unknown modality {modality!r}; this task has {sorted(encoders)}.")
    return encoders[modality]
