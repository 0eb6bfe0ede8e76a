"""From statistics to a loss and back: the scaled loss of each row and its gradient towards the row's statistics."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from multimodal.kernels.statistics import TokenLoss, TokenStatistics


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """(1 - s) nll + s (lse - mean_logit) + z_loss lse^2 per row, as F.cross_entropy smooths; s = label_smoothing.

    Kernels know its gradient in closed form (`triton_kernels`)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, statistics: TokenStatistics) -> Tensor:
        loss = statistics.nll
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * (statistics.lse - statistics.mean_logit)
        return loss + self.z_loss * statistics.lse.square() if self.z_loss else loss


@dataclass(frozen=True)
class RowLoss:
    """sum of scale * token_loss(statistics), asked block by block while the blocks' logits are at hand."""

    token_loss: TokenLoss
    scale: Tensor | float  # [n] in the accumulation dtype, or one number for all rows
    start: int = 0  # first row of the chunk that indices count from
    _values: list[Tensor] = field(default_factory=list)
    _gradients: list[TokenStatistics] = field(default_factory=list)

    def within(self, chunk: slice) -> Self:
        """The same loss for a caller who counts rows from the beginning of `chunk`."""
        return replace(self, start=self.start + chunk.start)

    def row_scale(self, index: slice, like: Tensor) -> Tensor:
        """Factor of the rows `index`, shape and dtype of `like` [b]."""
        if isinstance(self.scale, Tensor):
            own = self.scale[self.start + index.start : self.start + index.stop] if self.scale.dim() else self.scale
            return own.to(like.device, like.dtype).expand_as(like).contiguous()
        return torch.full_like(like, self.scale)

    def values(self, statistics: TokenStatistics, index: slice) -> Tensor:
        """Losses [b] of the rows `index`."""
        return self.token_loss(statistics) * self.row_scale(index, statistics.lse)

    def gradient(self, statistics: TokenStatistics, index: slice) -> TokenStatistics:
        """d loss / d statistics of the rows `index`, each [b]; blocks must come in order, once."""
        with torch.enable_grad():
            leaves = TokenStatistics(*(part.detach().requires_grad_() for part in statistics))
            value = self.values(leaves, index).sum()
            gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        self._values.append(value.detach())
        self._gradients.append(TokenStatistics(*gradients))
        return self._gradients[-1]

    def total(self) -> tuple[Tensor, TokenStatistics]:
        """The summed loss and its gradients [n] over all blocks asked."""
        return torch.stack(self._values).sum(), TokenStatistics(*(torch.cat(part) for part in zip(*self._gradients, strict=True)))
