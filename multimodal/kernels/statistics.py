"""Per-token statistics of `hidden @ weight.T`: what a loss may ask of a row of logits without ever holding them all.

Every loss of this package is a function of four numbers per row, and each backend only knows how to produce these four
and to push their gradients back:

    target_logit = sum_k q_k z_k        (q one-hot for hard targets)
    lse          = log sum_v exp z_v
    entropy      = lse - sum_v p_v z_v  (p = softmax z)
    mean_logit   = mean_v z_v           (label smoothing)

    dz_v = p_v (g_lse - g_entropy (log p_v + entropy)) + g_target q_v + g_mean / R

with z the logits after bias, soft cap and temperature, and v over the row's range of R columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """One entry per supervised row, float32 (float64 for float64 input); differentiable."""

    target_logit: Tensor  # [n]
    lse: Tensor  # [n]
    entropy: Tensor  # [n] nats; zeros if not asked for
    mean_logit: Tensor  # [n]; zeros if not asked for

    @property
    def nll(self) -> Tensor:
        return self.lse - self.target_logit


TokenLoss = Callable[[TokenStatistics], Tensor]  # a loss [n] per row as a differentiable function of its statistics


@dataclass(frozen=True)
class VocabShard:
    """The rows `start : start + weight.shape[0]` of a vocabulary of `vocab_size` rows; the rest lie on other ranks."""

    start: int
    vocab_size: int
    group: torch.distributed.ProcessGroup | None = None  # None: the default group


@dataclass(frozen=True)
class Rows:
    """What belongs to each supervised row besides its hidden state. Row tensors are sliced together by `[a:b]`."""

    targets: Tensor  # int64 [n, K], columns of the weight
    target_probs: Tensor  # accumulation dtype [n, K], rows sum to one
    vocab_range: Tensor | None = None  # int64 [n, 2]: softmax over columns start <= v < end
    temperature: Tensor | None = None  # accumulation dtype [n]
    softcap: float | None = None  # z <- softcap * tanh(z / softcap)
    num_columns: Tensor | None = None  # accumulation dtype [n]: columns in range; None: no mean_logit
    want_entropy: bool = False

    def __len__(self) -> int:
        return self.targets.shape[0]

    def __getitem__(self, index: slice) -> Self:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[index] for name, value in tensors.items() if isinstance(value, Tensor)})

    def columns(self, start: int, stop: int) -> Self:
        """The same rows seen by a weight that holds columns start <= v < stop only: ids and ranges relative to it."""
        inside = (self.targets >= start) & (self.targets < stop)
        vocab_range = None if self.vocab_range is None else (self.vocab_range - start).clamp(0, stop - start)
        targets = (self.targets - start).masked_fill(~inside, 0)
        return replace(self, targets=targets, target_probs=self.target_probs * inside, vocab_range=vocab_range)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64 (gradcheck); everything else is reduced in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def join_statistics(parts: TokenStatistics, peak: Tensor, sums: Callable[[Tensor], Tensor]) -> TokenStatistics:
    """Statistics over disjoint sets of columns -> over their union.

    parts: [..., n] each; peak: the largest lse of all parts; sums: adds a [4, ..., n] tensor over the parts, giving [4, n]. With the share
    s_r = exp(lse_r - lse) of part r, entropy = sum_r s_r (entropy_r - log s_r) (the chain rule). Target and mean logits are
    sums: an id outside a part carries probability 0 there, and every part divides by the columns of the union."""
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)  # -inf where no part holds a column of the row yet
    mass = (parts.lse - peak).exp()
    entropy_mass = torch.where(mass > 0, mass * (parts.entropy - (parts.lse - peak)), 0)
    mass, entropy_mass, target_logit, mean_logit = sums(torch.stack([mass, entropy_mass, parts.target_logit, parts.mean_logit]))
    return TokenStatistics(target_logit, peak + mass.log(), entropy_mass / mass + mass.log(), mean_logit)
