"""A vocabulary split over ranks: each rank reduces its own columns, two all-reduces join the statistics."""

import torch.distributed as dist
from torch import Tensor

from multimodal.kernels.statistics import TokenStatistics, join_statistics


def join_over_ranks(local: TokenStatistics, group: dist.ProcessGroup | None) -> TokenStatistics:
    """Statistics [n] over this rank's columns -> over all ranks' columns; the same on every rank."""
    peak = local.lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)

    def sums(parts: Tensor) -> Tensor:
        dist.all_reduce(parts, dist.ReduceOp.SUM, group=group)
        return parts

    return join_statistics(local, peak, sums)


def sum_over_ranks(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum d loss / d hidden [n, D] over the ranks in float32 or wider, back in its own dtype."""
    total = gradient if gradient.element_size() >= 4 else gradient.float()
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    return total.to(gradient.dtype)
