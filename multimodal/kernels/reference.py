"""The definition: full logits, plain autograd, in the dtype it is given (half types reduce in float32). Slow, and the truth."""

import torch
from torch import Tensor

from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype


def range_mask(vocab_range: Tensor, vocab_size: int) -> Tensor:
    """bool [n, V]: column v lies in its row's `start <= v < end`."""
    column = torch.arange(vocab_size, device=vocab_range.device)
    return (column >= vocab_range[:, :1]) & (column < vocab_range[:, 1:])


def shaped_logits(logits: Tensor, rows: Rows) -> Tensor:
    """Soft cap, then temperature (the order in which a sampler applies them)."""
    if rows.softcap is not None:
        logits = rows.softcap * torch.tanh(logits / rows.softcap)
    return logits if rows.temperature is None else logits / rows.temperature[:, None]


def statistics_of_logits(logits: Tensor, rows: Rows) -> TokenStatistics:
    """Statistics of raw logits [n, V] in the accumulation dtype, by the formulas of `kernels/statistics.py`."""
    z = shaped_logits(logits, rows)
    target_logit = (z.gather(1, rows.targets) * rows.target_probs).sum(1)
    inside = torch.ones_like(z, dtype=torch.bool) if rows.vocab_range is None else range_mask(rows.vocab_range, z.shape[1])
    lse = z.masked_fill(~inside, -torch.inf).logsumexp(1)
    log_probs = (z - lse[:, None]).masked_fill(~inside, 0)
    entropy = -(log_probs.exp() * log_probs * inside).sum(1)
    mean_logit = torch.zeros_like(lse) if rows.num_columns is None else (z * inside).sum(1) / rows.num_columns
    return TokenStatistics(target_logit, lse, entropy if rows.want_entropy else torch.zeros_like(lse), mean_logit)


def token_statistics_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> TokenStatistics:
    """hidden [n, D], weight [V, D], bias [V] -> statistics [n]; memory 4 to 6 times [n, V]. Double backward works here alone."""
    logits = (hidden @ weight.T).to(accumulation_dtype(hidden.dtype))
    return statistics_of_logits(logits if bias is None else logits + bias, rows)
