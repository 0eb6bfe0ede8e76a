"""Linear cross-entropy in blocks of the vocabulary: the mode of least memory that still runs on library GEMMs.

Each block of columns sees all rows, so a block of the weight gradient is one product, rounded once, and needs no second buffer. The
price is a fourth GEMM (8 n V D operations): the logits are formed once for the statistics and again for the gradient. The
blocks are joined as the ranks of a tensor-parallel vocabulary are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.chunked import Gradients, Needs, RowPass, add_product_
from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype, join_statistics

SHARE = 0.01  # of the weight's bytes that a block of logits may take, if no budget is given


@dataclass(frozen=True)
class VocabBlocks:
    """Memory beyond inputs and gradients: one block of logits [n, B] and its float32 rows, and hidden's gradient in float32."""

    row_pass: RowPass = logit_rows
    logits_bytes: int | None = None

    def blocks(self, hidden: Tensor, weight: Tensor) -> list[slice]:
        """Slices of columns whose logits fill the budget; at least 256 columns, so that a product is worth its launch."""
        num_columns = weight.shape[0]
        budget = SHARE * weight.numel() * weight.element_size() if self.logits_bytes is None else self.logits_bytes
        least = 256 if self.logits_bytes is None else 1
        step = min(num_columns, max(least, int(budget // max(1, hidden.shape[0] * hidden.element_size()))))
        return [slice(start, min(start + step, num_columns)) for start in range(0, num_columns, step)]

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, *, keep_logits: bool
    ) -> tuple[TokenStatistics, None]:
        """Statistics [n]; no logits are kept."""
        known, blocks = None, self.blocks(hidden, weight)
        buffer = _buffer(hidden, blocks)
        for block in blocks:
            logits = torch.mm(hidden, weight[block].T, out=_narrow(buffer, hidden, block))
            part = self.row_pass.statistics(logits, None if bias is None else bias[block], rows.columns(block.start, block.stop))
            part = TokenStatistics(*(each.double() for each in part))  # every join rounds
            if known is not None:  # joined as they come: hundreds of blocks would hold more than the logits of one
                pair = TokenStatistics(*map(torch.stack, zip(known, part, strict=True)))
                part = join_statistics(pair, pair.lse.amax(0), lambda each: each.sum(1))
            known = part
        return TokenStatistics(*(each.to(accumulation_dtype(hidden.dtype)) for each in known)), None

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
        wide = torch.zeros_like(hidden, dtype=accumulation_dtype(hidden.dtype)) if needs.hidden else None
        result = Gradients(
            weight=torch.empty_like(weight) if needs.weight else None,
            bias=torch.empty_like(bias) if needs.bias and bias is not None else None,
        )
        blocks = self.blocks(hidden, weight)
        buffer = _buffer(hidden, blocks)
        for block in blocks:
            dz = torch.mm(hidden, weight[block].T, out=_narrow(buffer, hidden, block))
            here = rows.columns(block.start, block.stop)
            bias_gradient = self.row_pass.known_gradient_(dz, None if bias is None else bias[block], here, known, upstream)
            if wide is not None:
                add_product_(wide, dz.T, weight[block])
            if result.weight is not None:
                torch.mm(dz.T, hidden, out=result.weight[block])
            if result.bias is not None:
                result.bias[block] = bias_gradient
        result.hidden = None if wide is None else wide.to(hidden.dtype)
        return result


def _buffer(hidden: Tensor, blocks: list[slice]) -> Tensor:
    """Room for the logits of any block, flat."""
    return hidden.new_empty(hidden.shape[0] * (blocks[0].stop - blocks[0].start))


def _narrow(buffer: Tensor, hidden: Tensor, block: slice) -> Tensor:
    """The part of the buffer that holds the logits [n, B] of a block."""
    shape = (hidden.shape[0], block.stop - block.start)
    return buffer[: shape[0] * shape[1]].view(shape)
