"""Arguments of the fused losses: what fits what, which rows are kept, and errors that name the argument."""

from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.kernels.statistics import Rows, VocabShard, accumulation_dtype


@dataclass(frozen=True)
class Kept:
    """The supervised rows."""

    hidden: Tensor  # [n, D]
    rows: Rows
    weight: Tensor | None  # accumulation dtype [n]
    validate: bool


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_probs: Tensor | None,
    *,
    bias: Tensor | None,
    token_weight: Tensor | None,
    label_smoothing: float,
    softcap: float | None,
    temperature: float | Tensor,
    vocab_range: tuple[int, int] | Tensor | None,
    valid_index: Tensor | None,
    vocab_shard: VocabShard | None,
) -> None:
    """Raise ValueError on shapes, dtypes and settings that do not fit; looks at no tensor's values."""
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}; expected hidden [..., D] and weight [V, D] "
            "with the same D. A head stored as [D, V] needs .T."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; expected one floating dtype for both. Cast with weight.to(hidden.dtype), "
            "or run under torch.autocast."
        )
    lead, vocab_size = list(hidden.shape[:-1]), weight.shape[0] if vocab_shard is None else vocab_shard.vocab_size
    _check_shape("targets", targets, lead if target_probs is None else [*lead, -1])
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; expected int64 column ids. Cast with targets.long().")
    if target_probs is not None:
        _check_shape("target_probs", target_probs, list(targets.shape))
        if target_probs.requires_grad:
            raise ValueError("target_probs take no gradient here. Pass target_probs.detach().")
    if bias is not None:
        _check_shape("bias", bias, [weight.shape[0]])
    if token_weight is not None:
        _check_shape("token_weight", token_weight, lead)
    if isinstance(temperature, Tensor):
        if temperature.dim():
            _check_shape("temperature", temperature, lead)
        if temperature.requires_grad:
            raise ValueError("temperature takes no gradient here. Learn a scale by multiplying hidden with it.")
    elif not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no cap.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a number in [0, 1].")
    if isinstance(vocab_range, Tensor):
        _check_shape("vocab_range", vocab_range, [*lead, 2])
    elif vocab_range is not None and not 0 <= vocab_range[0] < vocab_range[1] <= vocab_size:
        raise ValueError(f"vocab_range is {vocab_range}; expected 0 <= start < end <= {vocab_size} (the vocabulary).")
    if valid_index is not None and (valid_index.dim() != 1 or valid_index.dtype != torch.int64):
        raise ValueError(f"valid_index is {valid_index.dtype} {list(valid_index.shape)}; expected int64 [n], flat row numbers.")


def _check_shape(name: str, tensor: Tensor, expected: list[int]) -> None:
    """-1 in `expected` allows any size."""
    shape = list(tensor.shape)
    if len(shape) != len(expected) or any(want not in (-1, got) for got, want in zip(shape, expected, strict=True)):
        raise ValueError(f"{name} has shape {shape}; expected {str(expected).replace('-1', 'K')}.")


def compact(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_probs: Tensor | None,
    *,
    ignore_index: int,
    token_weight: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    vocab_range: tuple[int, int] | Tensor | None,
    valid_index: Tensor | None,
    vocab_shard: VocabShard | None,
    want_entropy: bool,
    want_mean: bool,
    validate: bool,
) -> tuple[Kept, Tensor | None]:
    """Keep the supervised rows of hidden [N, D]; returns them and their flat index [n], None if every row is kept."""
    dtype, num_rows = accumulation_dtype(hidden.dtype), hidden.shape[0]
    width = 1 if target_probs is None else target_probs.shape[-1]  # which -1 cannot tell where there are no rows
    targets = targets.reshape(num_rows, -1 if num_rows else width)
    index = valid_index
    if index is None:
        index = (targets != ignore_index).any(1).nonzero()[:, 0]
        index = None if index.shape[0] == num_rows else index

    def keep(tensor: Tensor) -> Tensor:
        return tensor if index is None else tensor[index]

    targets = keep(targets)
    padding = targets == ignore_index
    probs = torch.ones_like(targets, dtype=dtype) if target_probs is None else keep(target_probs.reshape(num_rows, width)).to(dtype)
    probs = probs.masked_fill(padding, 0) if target_probs is not None else probs
    low, high = (0, weight.shape[0] if vocab_shard is None else vocab_shard.vocab_size)
    if isinstance(vocab_range, tuple):
        low, high = vocab_range
    elif vocab_range is not None:
        vocab_range = keep(vocab_range.reshape(num_rows, 2))
        if validate:
            _check_range(vocab_range, high)
        low, high = vocab_range[:, :1], vocab_range[:, 1:]
    if validate:
        _check_values(targets, probs, padding, low, high, hard=target_probs is None)
    num_columns = torch.zeros_like(probs[:, :1]).add(high - low)[:, 0] if want_mean else None
    if isinstance(vocab_range, tuple) and vocab_shard is not None:
        vocab_range = torch.tensor([vocab_range], device=hidden.device).expand(targets.shape[0], 2)
    rows = Rows(
        targets=targets if target_probs is None else targets.masked_fill(padding, 0),
        target_probs=probs,
        vocab_range=vocab_range if isinstance(vocab_range, Tensor) else None,
        temperature=_row_temperature(temperature, targets.shape[0], keep, dtype, hidden.device),
        softcap=softcap,
        num_columns=num_columns,
        want_entropy=want_entropy,
    )
    if vocab_shard is not None:
        rows = rows.columns(vocab_shard.start, vocab_shard.start + weight.shape[0])
    elif isinstance(vocab_range, tuple):  # the caller cut the weight to this range
        rows = rows.columns(low, high)
    row_weight = None if token_weight is None else keep(token_weight.reshape(-1)).to(dtype)
    return Kept(keep(hidden), rows, row_weight, validate), index


def _row_temperature(temperature: float | Tensor, count: int, keep: object, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if isinstance(temperature, Tensor) and temperature.dim():
        return keep(temperature.reshape(-1)).to(dtype)
    if isinstance(temperature, Tensor):
        return temperature.to(device, dtype).expand(count)
    return None if temperature == 1 else torch.full((count,), temperature, dtype=dtype, device=device)


def _check_range(vocab_range: Tensor, vocab_size: int) -> None:
    bad = ((vocab_range[:, 0] < 0) | (vocab_range[:, 0] >= vocab_range[:, 1]) | (vocab_range[:, 1] > vocab_size)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"vocab_range of kept row {row} is {vocab_range[row].tolist()}; expected 0 <= start < end <= {vocab_size}.")


def _check_values(
    targets: Tensor, probs: Tensor, padding: Tensor, low: int | Tensor, high: int | Tensor, *, hard: bool
) -> None:
    """Ids and probabilities of the kept rows; each check makes the host wait for the device."""
    bad = (((targets < low) | (targets >= high)) & (~padding | hard)).nonzero()
    if len(bad):
        row, entry = bad[0].tolist()
        first, last = (int(bound[row]) if isinstance(bound, Tensor) else bound for bound in (low, high))
        raise ValueError(
            f"targets hold {int(targets[row, entry])} at kept row {row}; allowed: {first} <= id < {last} (the vocabulary, or vocab_range), "
            "or ignore_index."
        )
    if hard:
        return
    total = probs.sum(1)
    bad = (~((total - 1).abs() <= 1e-3) | (probs < 0).any(1)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"target_probs of kept row {row} sum to {float(total[row]):.6g}; expected non-negative numbers with sum 1 (within 1e-3).")


def check_finite(value: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError naming the input that made `value` (a loss, or statistics) NaN or infinite."""
    if torch.isfinite(value).all():
        return
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity. Training diverged: lower the learning rate or clip gradients.")
    raise ValueError(
        "The loss overflows although hidden and weight are finite. Check bias and token_weight, scale the logits down, or set softcap."
    )
