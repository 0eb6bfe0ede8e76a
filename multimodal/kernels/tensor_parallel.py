"""Statistics of a vocabulary split over ranks: each rank reduces its own columns, two all-reduces join them."""

import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.kernels.statistics import Rows, TokenStatistics


def combine_statistics(local: TokenStatistics, rows: Rows, group: dist.ProcessGroup | None) -> TokenStatistics:
    """Statistics over this rank's columns [n] -> over all ranks' columns; the same bits on every rank.

    With s_r = exp(lse_r - lse) the share of rank r: entropy = sum_r s_r (entropy_r - log s_r) (chain rule), and target and mean
    logits are sums, because an absent target carries probability 0 and the mean divides by the columns of all shards."""
    peak = local.lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    mass = (local.lse - peak).exp()
    entropy_mass = torch.where(mass > 0, mass * (local.entropy - (local.lse - peak)), 0)
    sums = torch.stack([mass, entropy_mass, local.target_logit, local.mean_logit])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    mass, entropy_mass, target_logit, mean_logit = sums
    entropy = entropy_mass / mass + mass.log() if rows.want_entropy else torch.zeros_like(mass)
    return TokenStatistics(target_logit, peak + mass.log(), entropy, mean_logit)


def sum_over_ranks_(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum d loss / d hidden [n, D] over the ranks in float32 or wider, back in its own dtype."""
    total = gradient if gradient.element_size() >= 4 else gradient.float()
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return total.to(gradient.dtype)
