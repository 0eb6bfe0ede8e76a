"""UniBind-style: any frozen encoder, a linear head that starts as the identity, and many centers per class.

Lyu et al. 2024: descriptions written by a language model surround each class; a sample belongs to the class whose
descriptions are near. The score of several centers is their log-sum-exp (see centers.py); it tends to the nearest one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.centers import SemanticCenters
from multimodal.bind.interface import ModalityEncoder

PUBLISHED_SHARPNESS = 1000.0  # of the published code's log-sum-exp


class UniBindEncoder(nn.Module):
    """A ModalityEncoder: normalise(head(base.embed(x))). The base keeps no gradient of its own weights."""

    def __init__(self, base: ModalityEncoder) -> None:
        super().__init__()
        self.base = base.requires_grad_(False) if isinstance(base, nn.Module) else base
        self.modality, self.dimension = base.modality, base.dimension
        self.box, self.logit_scale = base.box, base.logit_scale
        self.head = nn.Linear(base.dimension, base.dimension)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(base.dimension))
            self.head.bias.zero_()

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> unit vectors [B, dimension]."""
        return F.normalize(self.head(self.base.embed(inputs)), dim=-1)

    forward = embed


def unibind_centers(centers: SemanticCenters, sharpness: float = PUBLISHED_SHARPNESS) -> SemanticCenters:
    """The same sentences, each a center of its own."""
    return SemanticCenters(centers.names, centers.vectors, "lse", sharpness)
