"""Semantic centers: what a frozen text tower says of each class, several sentences a class.

    mean   one center a class, the normalised mean of its sentences (CLIP's prompt ensemble)
    lse    every sentence is a center; a class scores (1 / sharpness) log sum exp(sharpness <z, c>) over its own (UniBind)
    max    the nearest of its sentences: lse with infinite sharpness
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.bind.corpus_file import ObjectClass

POOLINGS = ("mean", "lse", "max")


@dataclass(frozen=True)
class SemanticCenters:
    """Unit vectors [K, J, D] without gradient, J sentences of each of K classes."""

    names: tuple[str, ...]
    vectors: Tensor
    pooling: str = "mean"
    sharpness: float = 50.0  # of lse

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}; choose one of {', '.join(POOLINGS)}.")
        if self.vectors.ndim != 3 or len(self.vectors) != len(self.names):
            raise ValueError(
                f"Centers are {list(self.vectors.shape)} for {len(self.names)} classes; expected [classes, sentences, width]."
            )
        if self.vectors.requires_grad:
            raise ValueError("Centers require a gradient; they are frozen: pass vectors.detach().")

    @property
    def dimension(self) -> int:
        return self.vectors.shape[2]

    def scores(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of unit length -> cosine-like scores [B, K] in [-1, 1] (lse: up to log(J) / sharpness more)."""
        if embeddings.shape[-1] != self.dimension:
            raise ValueError(
                f"Embeddings have width {embeddings.shape[-1]}, the centers {self.dimension}; make the centers with the text "
                "tower that the encoder was bound to."
            )
        vectors = self.vectors.to(embeddings)
        if self.pooling == "mean":
            return embeddings @ F.normalize(vectors.mean(1), dim=-1).T
        cosines = torch.einsum("bd,kjd->bkj", embeddings, vectors)
        if self.pooling == "max":
            return cosines.amax(-1)
        return (self.sharpness * cosines).logsumexp(-1) / self.sharpness

    def logits(self, embeddings: Tensor, scale: float) -> Tensor:
        """Scores times an encoder's logit_scale."""
        return scale * self.scores(embeddings)

    def select(self, classes: Sequence[int]) -> "SemanticCenters":
        """Those classes only, in that order."""
        chosen = list(classes)
        return replace(self, names=tuple(self.names[index] for index in chosen), vectors=self.vectors[chosen])

    def pooled(self, pooling: str) -> "SemanticCenters":
        return replace(self, pooling=pooling)


@torch.no_grad()
def build_centers(
    classes: Sequence[ObjectClass], embed_text: Callable[[Sequence[str]], Tensor], pooling: str = "mean"
) -> SemanticCenters:
    """embed_text: sentences -> unit vectors [n, D], of a tower in eval mode. Raises ValueError unless every class has as many
    sentences as the first."""
    counts = {kind.name: len(kind.prompts) for kind in classes}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"Classes have {counts} sentences; give each the same number, at least one.")
    vectors = embed_text([prompt for kind in classes for prompt in kind.prompts]).detach().clone()
    return SemanticCenters(tuple(counts), vectors.view(len(classes), -1, vectors.shape[-1]), pooling)
