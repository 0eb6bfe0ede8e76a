"""Row arithmetic on a block of logits held in cache: statistics in, logit gradient out, in place. Plain torch, any device."""

import torch
from torch import Tensor

from multimodal.kernels.reference import range_mask
from multimodal.kernels.row_loss import RowLoss
from multimodal.kernels.statistics import Rows, TokenStatistics, accumulation_dtype

# exp(x) as exp2(x log2 e): torch's float32 exp goes through a vendor library that takes 3 to 4 times as long on the CPUs measured.
# The product costs |x| / 2^24 of relative error, nothing where exp(x) matters, since x <= 0 is counted from the row's peak.
LOG2_E = 1.4426950408889634
BLOCK_BYTES = 2**22  # of float32 per block: larger leaves the cache, smaller pays per-call overhead (bench_cross_entropy)


def row_blocks(num_rows: int, vocab_size: int) -> list[slice]:
    """Even slices of rows whose float32 logits fill about BLOCK_BYTES."""
    blocks = max(1, -(-num_rows * vocab_size * 4 // BLOCK_BYTES))
    step = max(1, -(-num_rows // blocks))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class _Block:
    """One block of rows: logits, overwritten by exp(z - shift), overwritten by their gradient."""

    def __init__(self, logits: Tensor, bias: Tensor | None, rows: Rows):
        """Works in the memory of `logits` [b, V] if they have the accumulation dtype, else on a copy."""
        self.rows = rows
        self.inside = None if rows.vocab_range is None else range_mask(rows.vocab_range, logits.shape[1])
        z = self.z = logits.to(accumulation_dtype(logits.dtype))
        if bias is not None:
            z += bias
        if rows.softcap is not None:
            z.div_(rows.softcap).tanh_()
            self.cap_slope = 1 - z.square()
            z.mul_(rows.softcap)
        if rows.temperature is not None:
            z.div_(rows.temperature[:, None])

    def _exponentiate(self, shift: Tensor) -> None:
        """z <- exp(z - shift), keeping z - shift where the entropy needs it. shift: [b]."""
        self.z.sub_(shift[:, None])
        self.shifted = self.z.clamp(min=-1e4) if self.rows.want_entropy else None  # exp(-1e4) is 0; -inf * 0 would be NaN
        self.z.mul_(LOG2_E).exp2_()

    def statistics(self) -> TokenStatistics:
        rows, z = self.rows, self.z
        target_logit = (z.gather(1, rows.targets) * rows.target_probs).sum(1)
        mean_logit = entropy = torch.zeros_like(target_logit)
        if rows.num_columns is not None:
            mean_logit = (z if self.inside is None else z * self.inside).sum(1) / rows.num_columns
        if self.inside is not None:
            z.masked_fill_(~self.inside, -torch.inf)
        peak = z.amax(1).clamp(min=torch.finfo(z.dtype).min)  # a shard may hold none of a row's columns
        self._exponentiate(peak)
        self.total = z.sum(1)
        self.log_total = self.total.log()
        if self.shifted is not None:
            entropy = self.log_total - torch.linalg.vecdot(z, self.shifted) / self.total
        self.entropy = entropy
        return TokenStatistics(target_logit, self.log_total + peak, entropy, mean_logit)

    def assume(self, known: TokenStatistics) -> None:
        """Skip the reductions: the statistics (of all shards) are known."""
        if self.inside is not None:
            self.z.masked_fill_(~self.inside, -torch.inf)
        self._exponentiate(known.lse)
        self.total, self.log_total = torch.ones_like(known.lse), torch.zeros_like(known.lse)
        self.entropy = known.entropy

    def gradient(self, upstream: TokenStatistics) -> Tensor:
        """d loss / d raw logits [b, V]; the one-hot is folded here, before anything is rounded to a half type."""
        rows, dz = self.rows, self.z
        if self.shifted is None:
            dz.mul_((upstream.lse / self.total)[:, None])
        else:
            surprise = self.shifted.add_((self.entropy - self.log_total)[:, None])  # log p + entropy
            dz.mul_(surprise.mul_(-upstream.entropy[:, None]).add_(upstream.lse[:, None])).div_(self.total[:, None])
        if rows.num_columns is not None:
            share = (upstream.mean_logit / rows.num_columns)[:, None]
            dz.add_(share if self.inside is None else share * self.inside)
        _add_at_targets(dz, rows, upstream.target_logit)
        if rows.softcap is not None:
            dz.mul_(self.cap_slope)
        return dz if rows.temperature is None else dz.div_(rows.temperature[:, None])


def _add_at_targets(dz: Tensor, rows: Rows, upstream: Tensor) -> None:
    """dz[i, y_ik] += upstream_i q_ik, in a fixed order (a row may name one column twice)."""
    values = upstream[:, None] * rows.target_probs
    columns = [slice(None)] if dz.device.type == "cpu" else [slice(k, k + 1) for k in range(values.shape[1])]
    for column in columns:
        dz.scatter_add_(1, rows.targets[:, column], values[:, column])


def _concatenate(parts: list[TokenStatistics]) -> TokenStatistics:
    return TokenStatistics(*(torch.cat(part) for part in zip(*parts, strict=True)))


def statistics(logits: Tensor, bias: Tensor | None, rows: Rows) -> TokenStatistics:
    """Statistics [n] of raw logits [n, V], which are left as they are."""
    blocks = row_blocks(*logits.shape)
    return _concatenate([_Block(logits[block].clone(), bias, rows[block]).statistics() for block in blocks])


def loss_gradient_(logits: Tensor, bias: Tensor | None, rows: Rows, row_loss: RowLoss) -> tuple[TokenStatistics, Tensor | None]:
    """Overwrite raw logits [n, V] with d loss / d logits, one exponential each; returns the statistics and d loss / d bias [V]."""
    parts, bias_gradient = [], None if bias is None else torch.zeros_like(bias)
    for index in row_blocks(*logits.shape):
        block = _Block(logits[index], bias, rows[index])
        parts.append(block.statistics())
        _store(logits[index], block.gradient(row_loss.gradient(parts[-1], index)), bias_gradient)
    return _concatenate(parts), bias_gradient


def known_gradient_(
    logits: Tensor, bias: Tensor | None, rows: Rows, known: TokenStatistics, upstream: TokenStatistics
) -> Tensor | None:
    """Overwrite raw logits [n, V] with their gradient, given the statistics and the gradients towards these; returns d bias."""
    bias_gradient = None if bias is None else torch.zeros_like(bias)
    for index in row_blocks(*logits.shape):
        block = _Block(logits[index], bias, rows[index])
        block.assume(TokenStatistics(*(part[index] for part in known)))
        _store(logits[index], block.gradient(TokenStatistics(*(part[index] for part in upstream))), bias_gradient)
    return bias_gradient


def _store(logits: Tensor, dz: Tensor, bias_gradient: Tensor | None) -> None:
    if bias_gradient is not None:
        bias_gradient += dz.sum(0)
    if dz.data_ptr() != logits.data_ptr():  # half types worked on a copy
        logits.copy_(dz)
