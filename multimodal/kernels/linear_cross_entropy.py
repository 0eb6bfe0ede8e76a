"""The one public loss: cross-entropy of `hidden @ weight.T` without the logits. Validate, compact, pick a backend, reduce."""

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.autograd import Backend, Plan, summed_loss, token_statistics
from multimodal.kernels.chunked import LOGITS_BYTES, Chunked, RowPass
from multimodal.kernels.inputs import check_finite, check_inputs, compact
from multimodal.kernels.reduction import LossOutput, Reduction, row_scale
from multimodal.kernels.reference import token_statistics_reference
from multimodal.kernels.row_loss import RowLoss, SmoothedCrossEntropy
from multimodal.kernels.statistics import Rows, TokenLoss, TokenStatistics, VocabShard, accumulation_dtype
from multimodal.kernels.vocab_blocks import VocabBlocks

BackendName = Literal["auto", "reference", "chunked", "vocab_blocks", "triton", "triton_recompute"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    target_probs: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    vocab_range: tuple[int, int] | Tensor | None = None,
    valid_index: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    return_stats: bool = False,
    token_loss: TokenLoss | None = None,
    vocab_shard: VocabShard | None = None,
    backend: BackendName | Backend = "auto",
    logits_bytes: int | None = None,
    validate: bool | None = None,
) -> Tensor | LossOutput:
    """F.cross_entropy(hidden @ weight.T, targets), same defaults, in float32 and without holding [N, V].

    hidden: [..., D]. weight: [V, D], same dtype (under autocast both are cast). bias: [V].
    targets: int64 [...] column ids; or [..., K] with target_probs [..., K], rows summing to one (soft targets; an entry
        with ignore_index is padding). Rows whose targets are all ignore_index are dropped before any product.
    token_weight: [...] factor per row. reduction "mean" divides by the sum of the weights of the kept rows (their number if no
        weights), or by `normalizer`, which "sum" and "none" do not take: the global count for gradient accumulation or
        data parallelism. No row kept: loss 0 and zero gradients.
    softcap: z <- c tanh(z / c); temperature: z <- z / T, a float or [...], without gradient. Then label smoothing as in
        F.cross_entropy and z_loss * lse^2 per row.
    vocab_range: (start, end), or int64 [..., 2] per row: the softmax runs over columns start <= v < end alone.
    valid_index: int64 [n], the kept rows (flat) if known beforehand; saves the host a wait on an accelerator.
    token_loss: another loss per row of the statistics (`losses.py`), instead of label_smoothing and z_loss.
    vocab_shard: `weight` is this rank's part of the vocabulary; targets and ranges stay global ids.
    backend: a name (docs/cross_entropy.md), or an object such as Recompute(filter_epsilon=2**-12). logits_bytes: budget of one
        chunk of logits, for a backend given by name. validate: check values of targets, target_probs, statistics (NaN); None: on
        the CPU, where this makes nobody wait.
    Returns a float32 scalar (float64 for float64 input), [...] for reduction "none", or a `LossOutput` with return_stats.
    The weight gradient is summed in float32 and rounded once. Fused backends raise RuntimeError on double backward.
    Raises ValueError naming the argument that does not fit.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if token_loss is not None and (label_smoothing or z_loss):
        raise ValueError("token_loss replaces label_smoothing and z_loss; got both. Leave the latter at 0 or put them into token_loss.")
    custom = token_loss is not None
    token_loss = token_loss or SmoothedCrossEntropy(label_smoothing, z_loss)
    shape = targets.shape if target_probs is None else targets.shape[:-1]
    check_inputs(
        hidden, weight, targets, target_probs, bias=bias, token_weight=token_weight, label_smoothing=label_smoothing, softcap=softcap,
        temperature=temperature, vocab_range=vocab_range, valid_index=valid_index, vocab_shard=vocab_shard,
    )  # fmt: skip
    if isinstance(vocab_range, tuple) and vocab_shard is None:  # one range for all rows needs no other column at all
        weight, bias = weight[slice(*vocab_range)], None if bias is None else bias[slice(*vocab_range)]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    kept, index = compact(
        hidden, weight, targets, target_probs, ignore_index=ignore_index, token_weight=token_weight, softcap=softcap, temperature=temperature,
        vocab_range=vocab_range, valid_index=valid_index, vocab_shard=vocab_shard, want_entropy=return_stats or custom,
        want_mean=label_smoothing > 0 or custom,
        validate=hidden.device.type == "cpu" if validate is None else validate,
    )  # fmt: skip
    bias = None if bias is None else bias.to(accumulation_dtype(hidden.dtype))
    scale = row_scale(kept.weight, len(kept.rows), reduction, normalizer)
    chosen = build_backend(backend, kept.hidden, weight, logits_bytes)
    if chosen is None and vocab_shard is not None:
        raise ValueError("vocab_shard does not go with backend 'reference', which joins no ranks; allowed: 'chunked', 'vocab_blocks'.")
    if _one_sweep(chosen, kept.hidden, reduction, return_stats, scale, vocab_shard) and len(kept.rows):
        loss = summed_loss(kept.hidden, weight, bias, Plan(chosen, kept.rows), RowLoss(token_loss, scale))
        if kept.validate:
            check_finite(loss, kept.hidden, weight)
        return loss
    statistics = _statistics(chosen, kept.hidden, weight, bias, kept.rows, vocab_shard)
    if kept.validate:
        check_finite(statistics.lse, kept.hidden, weight)
    loss = token_loss(statistics) * scale

    def spread(values: Tensor) -> Tensor:
        """[n] -> [...] with zeros at ignored rows."""
        if index is None:
            return values.reshape(shape)
        return values.new_zeros(hidden.shape[0]).index_put((index,), values).reshape(shape)

    loss = spread(loss) if reduction == "none" else loss.sum()
    if not return_stats:
        return loss
    return LossOutput(loss, spread(statistics.nll), spread(statistics.lse), spread(statistics.entropy), len(kept.rows))


def _one_sweep(
    backend: Backend | None, hidden: Tensor, reduction: Reduction, return_stats: bool, scale: Tensor | float, shard: VocabShard | None
) -> bool:
    """Whether gradients can be formed during the forward pass: one scalar that depends on nothing else differentiable.

    Not in float16: p / N underflows, and what keeps it from that, the factor of a GradScaler, arrives with the backward pass."""
    if not isinstance(backend, Chunked) or hidden.dtype == torch.float16:
        return False
    differentiable_scale = isinstance(scale, Tensor) and scale.requires_grad
    return reduction != "none" and not return_stats and not differentiable_scale and shard is None


def _statistics(
    backend: Backend | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, shard: VocabShard | None
) -> TokenStatistics:
    if len(rows) == 0:  # keeps the graph, so that every input still gets its zero gradient
        anchor = hidden.sum() + weight[:0].sum() + (0 if bias is None else bias[:0].sum())
        return TokenStatistics(*[anchor.to(accumulation_dtype(hidden.dtype)).expand(0)] * 4)
    if backend is None:
        return token_statistics_reference(hidden, weight, bias, rows)
    return token_statistics(hidden, weight, bias, Plan(backend, rows, shard))


def build_backend(
    name: BackendName | Backend, hidden: Tensor, weight: Tensor, logits_bytes: int | None = None
) -> Backend | None:
    """The backend called `name` for these tensors, or the one given; None stands for the reference.

    "auto": `chunked` on the CPU and wherever triton is missing; on CUDA `triton`, or `vocab_blocks` if its logits and float32 weight
    gradient would not fit into half the free memory. Raises ValueError for a name, a device or a package that does not fit."""
    if isinstance(name, Backend):
        return name
    if name == "auto":
        name = _automatic(hidden, weight)
    if name == "reference":
        return None
    if name == "chunked":
        return Chunked(logits_bytes=logits_bytes)
    if name == "vocab_blocks":
        return VocabBlocks(row_pass=_triton_rows() if hidden.is_cuda and has_triton() else logit_rows, logits_bytes=logits_bytes)
    if name not in ("triton", "triton_recompute"):
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(map(repr, get_args(BackendName)))}.")
    if not has_triton():
        raise ValueError(f"backend is {name!r}, but triton is not installed. Install it, or use backend='auto'.")
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend is {name!r} for tensors on {hidden.device}; it needs CUDA tensors. Use backend='auto'.")
    if name == "triton":
        return Chunked(row_pass=_triton_rows(), logits_bytes=logits_bytes)
    from multimodal.kernels.triton_recompute import Recompute  # imports triton, which not every machine has

    return Recompute()


def _triton_rows() -> RowPass:
    from multimodal.kernels import triton_kernels

    return triton_kernels


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _automatic(hidden: Tensor, weight: Tensor) -> BackendName:
    if not hidden.is_cuda:
        return "chunked"
    free, _ = torch.cuda.mem_get_info(hidden.device)
    needed = min(LOGITS_BYTES["cuda"], hidden.shape[0] * weight.shape[0] * hidden.element_size()) + 4 * weight.numel()
    if needed > free / 2:
        return "vocab_blocks"
    return "triton" if has_triton() else "chunked"
