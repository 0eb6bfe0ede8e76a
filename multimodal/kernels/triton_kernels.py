"""Triton kernel for rows of logits between library GEMMs: statistics and the in-place gradient, one program a row.

The same three functions as `logit_rows` (the torch twin), so `Chunked(row_pass=triton_kernels)` is the hybrid backend. Runs under
TRITON_INTERPRET=1 on the CPU too: hence no libdevice calls, and half types widen before any arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal.kernels.row_loss import RowLoss, SmoothedCrossEntropy
from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype

STATISTICS, KNOWN_GRADIENT, LOSS_GRADIENT = 0, 1, 2  # what one launch does
LARGEST_BLOCK = 8192  # columns a program holds at once
WARPS = ((1024, 8), (4096, 8), (8192, 16))  # (block up to, warps): no spills on sm_90; untuned on hardware


@triton.jit
def shaped(raw, columns, inside, bias_ptr, softcap, scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ACC: tl.constexpr):
    """Raw logits -> (z, dz/draw) after bias, soft cap and temperature (scale = 1 / T)."""
    z = raw.to(ACC)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    slope = tl.zeros_like(z) + scale
    if HAS_CAP:
        cap = 2 * tl.sigmoid((2 * z / softcap).to(ACC)) - 1  # tanh
        z = softcap * cap
        slope *= 1 - cap * cap
    return z * scale, slope


@triton.jit
def row_kernel(
    logits_ptr,  # [n, V] any float; overwritten by the gradient unless MODE is STATISTICS
    bias_ptr,  # [V]
    targets_ptr,  # int64 [n, K]
    probs_ptr,  # ACC [n, K]
    range_ptr,  # int64 [n, 2]
    temperature_ptr,  # ACC [n]
    num_columns_ptr,  # ACC [n]
    scale_ptr,  # ACC [n]: factor of each row's loss (LOSS_GRADIENT)
    statistics_ptr,  # ACC [4, n]: written, or read by KNOWN_GRADIENT
    upstream_ptr,  # ACC [4, n] (KNOWN_GRADIENT)
    softcap,
    label_smoothing,
    z_loss,
    num_rows,
    num_classes,
    row_stride,
    K,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    low, high = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + num_classes
    if HAS_RANGE:
        low, high = tl.load(range_ptr + 2 * row), tl.load(range_ptr + 2 * row + 1)
    scale = tl.zeros((), ACC) + 1.0
    if HAS_TEMPERATURE:
        scale /= tl.load(temperature_ptr + row)
    lse = tl.zeros((), ACC)
    entropy = tl.zeros((), ACC)
    if MODE == 1:
        lse = tl.load(statistics_ptr + num_rows + row)
        entropy = tl.load(statistics_ptr + 2 * num_rows + row)
    else:
        target_logit = tl.zeros((), ACC)
        for k in range(K):  # before the reductions below, whose barriers keep it ahead of the writes
            column = tl.load(targets_ptr + row * K + k)
            z, _ = shaped(tl.load(logits_ptr + column), column, True, bias_ptr, softcap, scale, HAS_BIAS, HAS_CAP, ACC)
            target_logit += z * tl.load(probs_ptr + row * K + k)
        peak = tl.zeros((), ACC) - 1e30
        total = tl.zeros((), ACC)
        weighted = tl.zeros((), ACC)  # sum of e^(z - peak) (z - peak)
        plain = tl.zeros((), ACC)
        for start in range(0, num_classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (columns >= low) & (columns < high)
            raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
            z, _ = shaped(raw, columns, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_CAP, ACC)
            if HAS_MEAN:
                plain += tl.sum(tl.where(inside, z, 0.0), 0)
            new_peak = tl.maximum(peak, tl.max(tl.where(inside, z, -1e30), 0))
            z -= new_peak
            e = tl.where(inside, tl.exp(z), 0.0)
            shrink = tl.exp(peak - new_peak)
            if HAS_ENTROPY:
                weighted = shrink * (weighted + total * (peak - new_peak)) + tl.sum(e * z, 0)
            total = total * shrink + tl.sum(e, 0)
            peak = new_peak
        log_total = tl.log(total)
        lse = peak + log_total
        tl.store(statistics_ptr + row, target_logit)
        tl.store(statistics_ptr + num_rows + row, lse)
        if HAS_ENTROPY:
            entropy = log_total - weighted / total
        tl.store(statistics_ptr + 2 * num_rows + row, entropy)
        if HAS_MEAN:
            plain /= tl.load(num_columns_ptr + row)
        tl.store(statistics_ptr + 3 * num_rows + row, plain)
    if MODE == 0:
        return
    if MODE == 1:
        g_target = tl.load(upstream_ptr + row)
        g_lse = tl.load(upstream_ptr + num_rows + row)
        g_entropy = tl.load(upstream_ptr + 2 * num_rows + row)
        g_mean = tl.load(upstream_ptr + 3 * num_rows + row)
    else:
        factor = tl.load(scale_ptr + row)
        g_target = -(1 - label_smoothing) * factor
        g_lse = (1 + 2 * z_loss * lse) * factor
        g_entropy = tl.zeros((), ACC)
        g_mean = -label_smoothing * factor
    if HAS_MEAN:
        g_mean /= tl.load(num_columns_ptr + row)
    for start in range(0, num_classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (columns >= low) & (columns < high)
        raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
        z, slope = shaped(raw, columns, inside, bias_ptr, softcap, scale, HAS_BIAS, HAS_CAP, ACC)
        log_p = z - lse
        factor_p = tl.zeros_like(z) + g_lse
        if HAS_ENTROPY:
            factor_p -= g_entropy * (log_p + entropy)
        dz = tl.exp(log_p) * factor_p
        if HAS_MEAN:
            dz += g_mean
        for k in range(K):
            share = g_target * tl.load(probs_ptr + row * K + k)
            dz += tl.where(columns == tl.load(targets_ptr + row * K + k), share, 0.0)
        dz = tl.where(inside, dz * slope, 0.0)
        tl.store(logits_ptr + columns, dz.to(logits_ptr.dtype.element_ty), mask=columns < num_classes)


def launch(
    logits: Tensor,
    bias: Tensor | None,
    rows: Rows,
    mode: int,
    statistics: Tensor,
    upstream: Tensor | None = None,
    row_scale: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """One program per row of logits [n, V]; statistics and upstream are [4, n]."""
    block = min(LARGEST_BLOCK, triton.next_power_of_2(logits.shape[1]))
    nothing = statistics  # stands in for absent pointers; never read
    row_kernel[(logits.shape[0],)](
        logits,
        nothing if bias is None else bias,
        rows.targets.contiguous(),
        rows.target_probs.contiguous(),
        nothing if rows.vocab_range is None else rows.vocab_range.contiguous(),
        nothing if rows.temperature is None else rows.temperature.contiguous(),
        nothing if rows.num_columns is None else rows.num_columns.contiguous(),
        nothing if row_scale is None else row_scale,
        statistics,
        nothing if upstream is None else upstream,
        1.0 if rows.softcap is None else rows.softcap,
        label_smoothing,
        z_loss,
        *logits.shape,
        logits.stride(0),
        rows.targets.shape[1],
        MODE=mode,
        HAS_BIAS=bias is not None,
        HAS_CAP=rows.softcap is not None,
        HAS_RANGE=rows.vocab_range is not None,
        HAS_TEMPERATURE=rows.temperature is not None,
        HAS_MEAN=rows.num_columns is not None,
        HAS_ENTROPY=rows.want_entropy,
        ACC=tl.float64 if statistics.dtype == torch.float64 else tl.float32,
        BLOCK=block,
        num_warps=next(warps for limit, warps in WARPS if block <= limit),
    )


def _empty_statistics(logits: Tensor) -> Tensor:
    return torch.empty(4, logits.shape[0], dtype=accumulation_dtype(logits.dtype), device=logits.device)


def statistics(logits: Tensor, bias: Tensor | None, rows: Rows) -> TokenStatistics:
    """As `logit_rows.statistics`."""
    result = _empty_statistics(logits)
    launch(logits, bias, rows, STATISTICS, result)
    return TokenStatistics(*result)


def known_gradient_(
    logits: Tensor, bias: Tensor | None, rows: Rows, known: TokenStatistics, upstream: TokenStatistics
) -> Tensor | None:
    """As `logit_rows.known_gradient_`."""
    launch(logits, bias, rows, KNOWN_GRADIENT, torch.stack(known), torch.stack(upstream))
    return None if bias is None else logits.sum(0, dtype=bias.dtype)


def loss_gradient_(logits: Tensor, bias: Tensor | None, rows: Rows, row_loss: RowLoss) -> tuple[TokenStatistics, Tensor | None]:
    """As `logit_rows.loss_gradient_`; one launch where the loss has a closed form, else statistics, then gradient."""
    every_row, loss = slice(0, logits.shape[0]), row_loss.token_loss
    if not isinstance(loss, SmoothedCrossEntropy):
        known = statistics(logits, bias, rows)
        return known, known_gradient_(logits, bias, rows, known, row_loss.gradient(known, every_row))
    result = _empty_statistics(logits)
    row_scale = row_loss.row_scale(every_row, result[0])
    launch(logits, bias, rows, LOSS_GRADIENT, result, None, row_scale, loss.label_smoothing, loss.z_loss)
    row_loss.gradient(TokenStatistics(*result), every_row)  # records the value; the kernel had its own closed form
    return TokenStatistics(*result), None if bias is None else logits.sum(0, dtype=bias.dtype)
