"""Linear cross-entropy in row chunks: library GEMMs around one in-place row pass, never more than a byte budget of logits.

The row pass is pluggable (`RowPass`): plain torch (`logit_rows`) or a Triton kernel (`triton_kernels`)."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.row_loss import RowLoss
from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype

# CPU: one chunk of half types needs no float32 product, which takes twice as long (2048 rows of 152k columns: 2.6 against 5.4 s).
# H200: >= 4096 rows of 128k columns hide the float32 weight-gradient traffic.
LOGITS_BYTES = {"cpu": 2**29, "cuda": 2**30}


class RowPass(Protocol):
    """The arithmetic between the GEMMs, on a chunk of raw logits [c, V] (`logit_rows` says what each does)."""

    def statistics(self, logits: Tensor, bias: Tensor | None, rows: Rows) -> TokenStatistics: ...

    def loss_gradient_(
        self, logits: Tensor, bias: Tensor | None, rows: Rows, row_loss: RowLoss
    ) -> tuple[TokenStatistics, Tensor | None]: ...

    def known_gradient_(
        self, logits: Tensor, bias: Tensor | None, rows: Rows, known: TokenStatistics, upstream: TokenStatistics
    ) -> Tensor | None: ...


@dataclass
class Gradients:
    """d loss / d input; None where not needed. `weight` accumulates in the accumulation dtype and is rounded in `rounded`."""

    hidden: Tensor | None = None  # [n, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, None if self.weight is None else self.weight.to(dtype), self.bias


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Chunked:
    """The chunked backend. Methods take hidden [n, D], weight [V, D] of one dtype, bias [V] in the accumulation dtype."""

    row_pass: RowPass = logit_rows
    logits_bytes: int | None = None  # None: LOGITS_BYTES of the device

    def chunks(self, hidden: Tensor, weight: Tensor, *, weight_gradient: bool) -> list[slice]:
        """Even slices of rows within the byte budget.

        One chunk needs no float32 buffer for a half-precision weight gradient, so it may spend that buffer's bytes on rows."""
        num_rows, row_bytes = hidden.shape[0], max(1, weight.shape[0] * hidden.element_size())
        budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) if self.logits_bytes is None else self.logits_bytes
        saved = 4 * weight.numel() if weight_gradient and weight.element_size() < 4 and self.logits_bytes is None else 0
        if num_rows * row_bytes <= budget + saved:
            return [slice(0, num_rows)]
        count = -(-num_rows // max(1, budget // row_bytes))
        step = -(-num_rows // count)
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]

    def halved(self, hidden: Tensor) -> Self:
        """The same with half the budget, for a caller who holds two chunks of logits at once."""
        budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) if self.logits_bytes is None else self.logits_bytes
        return replace(self, logits_bytes=budget // 2)

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, keep_logits: bool
    ) -> tuple[TokenStatistics, Tensor | None]:
        """Statistics [n], and the logits [n, V] if they are to be kept and fit one chunk (saves a GEMM in `gradients`)."""
        chunks = self.chunks(hidden, weight, weight_gradient=False)
        if len(chunks) == 1:
            logits = hidden @ weight.T
            return self.row_pass.statistics(logits, bias, rows), logits if keep_logits else None
        parts = [self.row_pass.statistics(hidden[chunk] @ weight.T, bias, rows[chunk]) for chunk in chunks]
        return TokenStatistics(*(torch.cat(part) for part in zip(*parts, strict=True))), None

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
        """Push gradients towards the statistics back to the inputs. `logits`, if kept, are overwritten; else recomputed."""
        chunks = [slice(0, hidden.shape[0])] if logits is not None else self.chunks(hidden, weight, weight_gradient=needs.weight)
        total = GradientSum(hidden, weight, needs, num_chunks=len(chunks))
        for chunk in chunks:
            dz = hidden[chunk] @ weight.T if logits is None else logits
            parts = (TokenStatistics(*(part[chunk] for part in each)) for each in (known, upstream))
            bias_gradient = self.row_pass.known_gradient_(dz, bias, rows[chunk], *parts)
            total.add(chunk, dz, bias_gradient)
        return total.gradients

    def loss_and_gradients(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, row_loss: RowLoss, needs: Needs
    ) -> tuple[TokenStatistics, Gradients]:
        """Statistics and gradients in one sweep of three GEMMs a chunk (6 n V D operations)."""
        chunks = self.chunks(hidden, weight, weight_gradient=needs.weight)
        total, parts = GradientSum(hidden, weight, needs, num_chunks=len(chunks)), []
        for chunk in chunks:
            dz = hidden[chunk] @ weight.T
            statistics, bias_gradient = self.row_pass.loss_gradient_(dz, bias, rows[chunk], row_loss.within(chunk))
            parts.append(statistics)
            total.add(chunk, dz, bias_gradient)
        return TokenStatistics(*(torch.cat(part) for part in zip(*parts, strict=True))), total.gradients


class GradientSum:
    """Sums the chunks' gradients; a weight gradient of several chunks is summed in the accumulation dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Needs, *, num_chunks: int):
        self._hidden, self._weight, self._needs = hidden, weight, needs
        self._single = num_chunks == 1
        self.gradients = Gradients()
        if needs.hidden and not self._single:
            self.gradients.hidden = torch.empty_like(hidden)

    def add(self, chunk: slice, dz: Tensor, bias_gradient: Tensor | None) -> None:
        """dz: d loss / d logits [c, V] of the rows `chunk`."""
        total, rows = self.gradients, self._hidden[chunk]
        if self._needs.hidden and self._single:
            total.hidden = dz @ self._weight
        elif self._needs.hidden:
            torch.mm(dz, self._weight, out=total.hidden[chunk])
        if self._needs.weight and self._single:
            total.weight = dz.T @ rows
        elif self._needs.weight and total.weight is None:
            total.weight = add_product_(None, dz, rows)
        elif self._needs.weight:
            add_product_(total.weight, dz, rows)
        if self._needs.bias and bias_gradient is not None:
            total.bias = bias_gradient if total.bias is None else total.bias.add_(bias_gradient)


def add_product_(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total [a, b] (accumulation dtype; None: zeros) += left.T [a, c] @ right [c, b], no product rounded to a half type."""
    dtype = accumulation_dtype(left.dtype)
    if total is None:
        total = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    if left.dtype == dtype:
        return total.addmm_(left.T, right)
    if left.is_cuda:
        return torch.addmm(total, left.T, right, out_dtype=dtype, out=total)
    right = right.to(dtype)  # no CPU GEMM takes bfloat16 and gives float32; blocks keep the copy small
    for start in range(0, left.shape[1], 4096):
        total[start : start + 4096].addmm_(left[:, start : start + 4096].T.to(dtype), right)
    return total
