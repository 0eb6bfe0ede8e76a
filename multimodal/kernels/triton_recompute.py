"""Triton kernels that never hold a logit in global memory: each tile of logits lives and dies on chip, recomputed where needed.

Least memory, more arithmetic. Three kernels, no locks and no atomics, so results are deterministic:

    statistics       a program owns a block of rows and a split of the vocabulary; splits are joined afterwards    2 n V D
    hidden gradient  a program owns a block of rows and adds to its own float32 rows in global memory              4 n V D
    weight gradient  a program owns a block of columns and a slab of D, sums over all rows in registers   2 n V D (slabs + 1)

After "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009), with partial statistics instead of its spin
locks and the one-hot folded before rounding. `filter_epsilon` is its gradient filter: a tile is skipped if all of its |p - q| stay
below it, whatever the loss is scaled by; off by default, since it drops what training from scratch needs (paper, section 5.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimodal.kernels.chunked import Gradients, Needs
from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype, join_statistics
from multimodal.kernels.triton_kernels import shaped


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel; powers of two, at least 16."""

    rows: int
    columns: int
    depth: int  # of D per multiplication
    slab: int  # of D that a weight-gradient program owns
    warps: int
    stages: int


# Chosen by compiling for sm_90 without spills (tests/test_triton_kernels.py); not tuned on hardware yet.
TILES = {
    "statistics": Tiles(rows=128, columns=128, depth=64, slab=0, warps=8, stages=3),
    "hidden_gradient": Tiles(rows=128, columns=128, depth=64, slab=0, warps=8, stages=3),
    "weight_gradient": Tiles(rows=64, columns=64, depth=64, slab=256, warps=8, stages=3),
}


@triton.jit
def product(a, b, total, ACC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b. WIDEN: the interpreter multiplies half types wrongly, so widen them first."""
    if WIDEN:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def logit_tile(
    hidden_ptr, weight_ptr, rows, columns, num_rows, num_classes, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw logits [ROWS, COLUMNS] of contiguous hidden [n, D] and weight [V, D]."""
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = tl.load(
            hidden_ptr + rows[:, None] * width + depth[None, :],
            mask=(rows[:, None] < num_rows) & (depth[None, :] < width), other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight_ptr + columns[None, :] * width + depth[:, None],
            mask=(columns[None, :] < num_classes) & (depth[:, None] < width), other=0.0,
        )  # fmt: skip
        total = product(a, b, total, ACC, WIDEN, PRECISION)
    return total


@triton.jit
def row_limits(
    range_ptr, temperature_ptr, rows, num_rows, num_classes, HAS_RANGE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ACC: tl.constexpr
):
    """Range and 1 / temperature of each row, [ROWS]."""
    low = tl.zeros_like(rows)
    high = tl.zeros_like(rows) + num_classes
    if HAS_RANGE:
        low = tl.load(range_ptr + 2 * rows, mask=rows < num_rows, other=0)
        high = tl.load(range_ptr + 2 * rows + 1, mask=rows < num_rows, other=0)
    scale = tl.zeros_like(rows).to(ACC) + 1.0
    if HAS_TEMPERATURE:
        scale /= tl.load(temperature_ptr + rows, mask=rows < num_rows, other=1.0)
    return low, high, scale


@triton.jit
def statistics_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr,
    partial_ptr,  # ACC [4, splits, n]: target_logit, lse, entropy, sum of logits
    softcap, num_rows, num_classes, width, K, split_size,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    low, high, scale = row_limits(range_ptr, temperature_ptr, rows, num_rows, num_classes, HAS_RANGE, HAS_TEMPERATURE, ACC)
    peak = tl.zeros((ROWS,), ACC) - 1e30
    total = tl.zeros((ROWS,), ACC)
    weighted = tl.zeros((ROWS,), ACC)
    plain = tl.zeros((ROWS,), ACC)
    target_logit = tl.zeros((ROWS,), ACC)
    for start in range(0, split_size, COLUMNS):
        columns = split * split_size + start + tl.arange(0, COLUMNS)
        raw = logit_tile(
            hidden_ptr, weight_ptr, rows, columns, num_rows, num_classes, width, ROWS, COLUMNS, DEPTH, ACC, WIDEN, PRECISION
        )  # fmt: skip
        held = (columns < num_classes)[None, :]
        z, _ = shaped(raw, columns[None, :], held, bias_ptr, softcap, scale[:, None], HAS_BIAS, HAS_CAP, ACC)
        inside = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]) & held
        for k in range(K):
            column = tl.load(targets_ptr + rows * K + k, mask=rows < num_rows, other=-1)
            share = tl.load(probs_ptr + rows * K + k, mask=rows < num_rows, other=0.0)
            target_logit += share * tl.sum(tl.where(columns[None, :] == column[:, None], z, 0.0), 1)
        if HAS_MEAN:
            plain += tl.sum(tl.where(inside, z, 0.0), 1)
        new_peak = tl.maximum(peak, tl.max(tl.where(inside, z, -1e30), 1))
        z -= new_peak[:, None]
        e = tl.where(inside, tl.exp(z), 0.0)
        shrink = tl.exp(peak - new_peak)
        if HAS_ENTROPY:
            weighted = shrink * (weighted + total * (peak - new_peak)) + tl.sum(e * z, 1)
        total = total * shrink + tl.sum(e, 1)
        peak = new_peak
    some = total > 0  # a split may hold none of a row's range
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, peak + tl.log(safe), float("-inf"))
    entropy = tl.zeros((ROWS,), ACC)
    if HAS_ENTROPY:
        entropy = tl.where(some, tl.log(safe) - weighted / safe, 0.0)
    size = tl.num_programs(1).to(tl.int64) * num_rows
    out = partial_ptr + split * num_rows + rows
    tl.store(out, target_logit, mask=rows < num_rows)
    tl.store(out + size, lse, mask=rows < num_rows)
    tl.store(out + 2 * size, entropy, mask=rows < num_rows)
    tl.store(out + 3 * size, plain, mask=rows < num_rows)


@triton.jit
def gradient_tile(
    raw, rows, columns, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr, known_ptr, upstream_ptr,
    softcap, num_rows, num_classes, K,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d loss / d raw logits [ROWS, COLUMNS]; known and upstream are ACC [4, n] (upstream's mean already over R)."""
    here = rows < num_rows
    low, high, scale = row_limits(range_ptr, temperature_ptr, rows, num_rows, num_classes, HAS_RANGE, HAS_TEMPERATURE, ACC)
    lse = tl.load(known_ptr + num_rows + rows, mask=here, other=0.0)
    g_target = tl.load(upstream_ptr + rows, mask=here, other=0.0)
    g_lse = tl.load(upstream_ptr + num_rows + rows, mask=here, other=0.0)
    held = (columns < num_classes)[None, :]
    z, slope = shaped(raw, columns[None, :], held, bias_ptr, softcap, scale[:, None], HAS_BIAS, HAS_CAP, ACC)
    inside = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]) & held & here[:, None]
    log_p = z - lse[:, None]
    factor = tl.zeros_like(z) + g_lse[:, None]
    if HAS_ENTROPY:
        entropy = tl.load(known_ptr + 2 * num_rows + rows, mask=here, other=0.0)
        g_entropy = tl.load(upstream_ptr + 2 * num_rows + rows, mask=here, other=0.0)
        factor -= g_entropy[:, None] * (log_p + entropy[:, None])
    dz = tl.exp(log_p) * factor
    if HAS_MEAN:
        dz += tl.load(upstream_ptr + 3 * num_rows + rows, mask=here, other=0.0)[:, None]
    for k in range(K):
        column = tl.load(targets_ptr + rows * K + k, mask=here, other=-1)
        share = g_target * tl.load(probs_ptr + rows * K + k, mask=here, other=0.0)
        dz += tl.where(columns[None, :] == column[:, None], share[:, None], 0.0)
    return tl.where(inside, dz * slope, 0.0)


@triton.jit
def exceeds(dz, upstream_ptr, rows, num_rows, filter_epsilon):
    """Whether any entry of dz [ROWS, COLUMNS] is over filter_epsilon, in units of its row's upstream gradient; true for NaN."""
    g_target = tl.load(upstream_ptr + rows, mask=rows < num_rows, other=0.0)
    g_lse = tl.load(upstream_ptr + num_rows + rows, mask=rows < num_rows, other=0.0)
    unit = tl.maximum(tl.abs(g_lse), tl.abs(g_target))  # |dz| / unit is about |p - q|
    return not (tl.max(tl.max(tl.abs(dz) - filter_epsilon * unit[:, None], 1), 0) <= 0)


@triton.jit
def hidden_gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr, known_ptr, upstream_ptr,
    gradient_ptr,  # ACC [n, D], zeroed
    softcap, num_rows, num_classes, width, K, filter_epsilon,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first in range(0, num_classes, COLUMNS):
        columns = first + tl.arange(0, COLUMNS).to(tl.int64)
        raw = logit_tile(
            hidden_ptr, weight_ptr, rows, columns, num_rows, num_classes, width, ROWS, COLUMNS, DEPTH, ACC, WIDEN, PRECISION
        )  # fmt: skip
        dz = gradient_tile(
            raw, rows, columns, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr, known_ptr, upstream_ptr,
            softcap, num_rows, num_classes, K, HAS_BIAS, HAS_CAP, HAS_RANGE, HAS_TEMPERATURE, HAS_MEAN, HAS_ENTROPY, ACC,
        )  # fmt: skip
        keep = True
        if FILTER:
            keep = exceeds(dz, upstream_ptr, rows, num_rows, filter_epsilon)
        if keep:
            rounded = dz.to(weight_ptr.dtype.element_ty)
            for start in range(0, width, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                b = tl.load(
                    weight_ptr + columns[:, None] * width + depth[None, :],
                    mask=(columns[:, None] < num_classes) & (depth[None, :] < width), other=0.0,
                )  # fmt: skip
                mine = gradient_ptr + rows[:, None] * width + depth[None, :]
                mask = (rows[:, None] < num_rows) & (depth[None, :] < width)
                tl.store(mine, product(rounded, b, tl.load(mine, mask=mask, other=0.0), ACC, WIDEN, PRECISION), mask=mask)


@triton.jit
def weight_gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr, known_ptr, upstream_ptr,
    gradient_ptr,  # [V, D] of the weight's dtype
    bias_gradient_ptr,  # ACC [V]
    softcap, num_rows, num_classes, width, K, filter_epsilon,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SLAB: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    slab = tl.program_id(1) * SLAB + tl.arange(0, SLAB)
    total = tl.zeros((COLUMNS, SLAB), ACC)
    bias_total = tl.zeros((COLUMNS,), ACC)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        raw = logit_tile(
            hidden_ptr, weight_ptr, rows, columns, num_rows, num_classes, width, ROWS, COLUMNS, DEPTH, ACC, WIDEN, PRECISION
        )  # fmt: skip
        dz = gradient_tile(
            raw, rows, columns, bias_ptr, targets_ptr, probs_ptr, range_ptr, temperature_ptr, known_ptr, upstream_ptr,
            softcap, num_rows, num_classes, K, HAS_BIAS, HAS_CAP, HAS_RANGE, HAS_TEMPERATURE, HAS_MEAN, HAS_ENTROPY, ACC,
        )  # fmt: skip
        keep = True
        if FILTER:
            keep = exceeds(dz, upstream_ptr, rows, num_rows, filter_epsilon)
        if keep:
            bias_total += tl.sum(dz, 0)
            a = tl.load(
                hidden_ptr + rows[:, None] * width + slab[None, :],
                mask=(rows[:, None] < num_rows) & (slab[None, :] < width), other=0.0,
            )  # fmt: skip
            total = product(tl.trans(dz.to(hidden_ptr.dtype.element_ty)), a, total, ACC, WIDEN, PRECISION)
    mask = (columns[:, None] < num_classes) & (slab[None, :] < width)
    tl.store(gradient_ptr + columns[:, None] * width + slab[None, :], total.to(gradient_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS and tl.program_id(1) == 0:
        tl.store(bias_gradient_ptr + columns, bias_total, mask=columns < num_classes)


@dataclass(frozen=True)
class Recompute:
    """The recompute backend. Memory beyond the gradients: 4 n D bytes and 20 n bytes a split."""

    tiles: Mapping[str, Tiles] = field(default_factory=lambda: TILES)
    splits: int = 8  # of the vocabulary in the forward pass, so that few rows still fill the device
    filter_epsilon: float = 0.0  # CCE uses 2^-12 for bfloat16

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, keep_logits: bool
    ) -> tuple[TokenStatistics, None]:
        """Statistics [n]; no logits are ever kept."""
        tile, acc = self.tiles["statistics"], accumulation_dtype(hidden.dtype)
        split_size = triton.cdiv(triton.cdiv(weight.shape[0], self.splits), tile.columns) * tile.columns
        splits = triton.cdiv(weight.shape[0], split_size)
        partial = torch.empty(4, splits, hidden.shape[0], dtype=acc, device=hidden.device)
        tensors, numbers, flags = _arguments(hidden, weight, bias, rows, partial)
        statistics_kernel[(triton.cdiv(hidden.shape[0], tile.rows), splits)](
            *tensors, partial, *numbers, split_size, **flags, **_blocks(tile)
        )  # fmt: skip
        parts = TokenStatistics(*partial)
        if rows.num_columns is not None:
            parts = parts._replace(mean_logit=parts.mean_logit / rows.num_columns)
        return join_statistics(parts, parts.lse.amax(0), lambda each: each.sum(1)), None

    def gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        known: TokenStatistics,
        upstream: TokenStatistics,
        needs: Needs,
        logits: Tensor | None = None,
    ) -> Gradients:
        """As `Chunked.gradients`, without kept logits."""
        stacked = torch.stack(known)
        share = upstream.mean_logit if rows.num_columns is None else upstream.mean_logit / rows.num_columns
        towards = torch.stack(upstream._replace(mean_logit=share))
        tensors, numbers, flags = _arguments(hidden, weight, bias, rows, stacked)
        hidden, weight = tensors[:2]
        result = Gradients()
        if needs.hidden:
            tile = self.tiles["hidden_gradient"]
            total = torch.zeros_like(hidden, dtype=stacked.dtype)
            hidden_gradient_kernel[(triton.cdiv(hidden.shape[0], tile.rows),)](
                *tensors, stacked, towards, total, *numbers, self.filter_epsilon, **flags, **_blocks(tile),
                FILTER=self.filter_epsilon > 0,
            )  # fmt: skip
            result.hidden = total.to(hidden.dtype)
        if needs.weight or needs.bias:
            tile = self.tiles["weight_gradient"]
            result.weight = torch.empty_like(weight)
            result.bias = None if bias is None else torch.empty_like(bias)
            grid = (triton.cdiv(weight.shape[0], tile.columns), triton.cdiv(weight.shape[1], tile.slab))
            weight_gradient_kernel[grid](
                *tensors, stacked, towards, result.weight, stacked if bias is None else result.bias, *numbers, self.filter_epsilon,
                **flags, **_blocks(tile), SLAB=tile.slab, FILTER=self.filter_epsilon > 0,
            )  # fmt: skip
        return result


def _arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, nothing: Tensor
) -> tuple[list[Tensor], list[float], dict[str, Any]]:
    """Leading tensors, numbers and flags that the three kernels share; `nothing` stands in for absent pointers."""
    optional = (rows.vocab_range, rows.temperature)
    tensors = [hidden.contiguous(), weight.contiguous(), nothing if bias is None else bias, rows.targets.contiguous()]
    tensors += [rows.target_probs.contiguous(), *(nothing if each is None else each.contiguous() for each in optional)]
    numbers = [1.0 if rows.softcap is None else rows.softcap, hidden.shape[0], weight.shape[0], hidden.shape[1], rows.targets.shape[1]]
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": rows.softcap is not None,
        "HAS_RANGE": rows.vocab_range is not None,
        "HAS_TEMPERATURE": rows.temperature is not None,
        "HAS_MEAN": rows.num_columns is not None,
        "HAS_ENTROPY": rows.want_entropy,
        "ACC": tl.float64 if hidden.dtype == torch.float64 else tl.float32,
        "WIDEN": not hidden.is_cuda,
        "PRECISION": "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee",
    }
    return tensors, numbers, flags


def _blocks(tile: Tiles) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps, "num_stages": tile.stages}
