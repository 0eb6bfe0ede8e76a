"""Laws of the fused backends against the definition: any number of ragged blocks, and no more error than eager.

On a machine with CUDA the laws on errors run there too, with the Triton backends compiled."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.chunked import Chunked
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.vocab_blocks import VocabBlocks
from tests.test_linear_cross_entropy import FEATURES, loss_and_gradients, problem, relative_error

HALF = [torch.bfloat16, torch.float16]
PLACES = [("cpu", "chunked"), ("cpu", "vocab_blocks")]
if torch.cuda.is_available():
    PLACES += [("cuda", name) for name in ("chunked", "vocab_blocks", "triton", "triton_recompute")]


def moved(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


@given(
    backend=st.sampled_from(["chunked", "vocab_blocks"]), feature=st.sampled_from(sorted(FEATURES)), block=st.sampled_from([5, 7, 9]),
    blocks=st.integers(3, 5), tail=st.integers(1, 4), other=st.integers(11, 60), width=st.integers(513, 600), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60)
def test_ragged_blocks_in_every_dimension_equal_the_reference(
    backend: str, feature: str, block: int, blocks: int, tail: int, other: int, width: int, seed: int
):
    """At least three blocks of rows (or columns) and, inside, of the row pass; the last of each is shorter; D > 512."""
    blocked = block * blocks + tail
    kept, columns = (blocked, other) if backend == "chunked" else (other, blocked)
    features, vocab = dict(FEATURES[feature]), columns
    if feature == "slice":
        features["vocab_range"], vocab = (1, columns + 1), columns + 2
    hidden, weight, targets, options = problem(features, rows=kept + 1, vocab=vocab, width=width, seed=seed)
    budget = block * 8 * (columns if backend == "chunked" else kept)
    cut = _blocks_of(backend, hidden[1:], weight[:columns], budget)
    assume(cut[-1] < cut[0])
    inner = cut[0] if backend == "chunked" else kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_rows, "BLOCK_BYTES", 2 * 4 * (columns if backend == "chunked" else block))  # two rows of logits
        assert len(cut) >= 3 and len(logit_rows.row_blocks(inner, columns if backend == "chunked" else block)) >= 3
        truth = loss_and_gradients(hidden, weight, targets, {**options, "backend": "reference"})
        got = loss_and_gradients(hidden, weight, targets, {**options, "backend": backend, "logits_bytes": budget})
        choice = {"backend": backend, "logits_bytes": budget, "return_stats": True}
        ours = linear_cross_entropy(hidden, weight, targets, **options, **choice)
    theirs = linear_cross_entropy(hidden, weight, targets, **options, backend="reference", return_stats=True)
    for mine, want in zip([*got, *ours[:4]], [*truth, *theirs[:4]], strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-11)


def _blocks_of(backend: str, hidden: Tensor, weight: Tensor, budget: int) -> list[int]:
    """Sizes of the row chunks, or of the column blocks."""
    if backend == "chunked":
        slices = Chunked(logits_bytes=budget).chunks(hidden, weight, weight_gradient=True)
    else:
        slices = VocabBlocks(logits_bytes=budget).blocks(hidden, weight)
    return [each.stop - each.start for each in slices]


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("chunks", [1, 5])
def test_error_is_at_most_that_of_eager(device: str, backend: str, dtype: torch.dtype, chunks: int):
    """Both in `dtype`, both against float64. 5 % and 1e-7 of slack: two roundings of the same numbers are never equal."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the order of float32 sums differs from one CUDA library to the next")
    hidden, weight, targets, _ = problem({}, rows=160, vocab=700, width=96, dtype=dtype)
    hidden, weight, targets = hidden.to(device), weight.to(device), targets.to(device)
    truth = loss_and_gradients(hidden.double(), weight.double(), targets, {"backend": "reference"})
    ours = loss_and_gradients(hidden, weight, targets, {"logits_bytes": -(-160 // chunks) * 700 * dtype.itemsize, "backend": backend})
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets)
    eager = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    for got, same_dtype, want in zip(ours, eager, truth, strict=True):
        assert relative_error(got, want) <= 1.05 * relative_error(same_dtype, want) + 1e-7


@pytest.mark.parametrize(("device", "backend"), PLACES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in ("plain", "slice", "none")])
def test_error_under_every_option_is_at_most_that_of_eager(device: str, backend: str, dtype: torch.dtype, feature: str):
    """Eager here is the reference in `dtype`, which reduces in float32: a stricter rival than F.cross_entropy."""
    hidden, weight, targets, options = problem(FEATURES[feature], rows=120, vocab=400, width=64, dtype=dtype)
    hidden, weight, targets, options = hidden.to(device), weight.to(device), targets.to(device), moved(device, options)
    wide = {**options, "bias": options["bias"].double()} if "bias" in options else options
    truth = loss_and_gradients(hidden.double(), weight.double(), targets, {**wide, "backend": "reference"})
    eager = loss_and_gradients(hidden, weight, targets, {**options, "backend": "reference"})
    ours = loss_and_gradients(hidden, weight, targets, {**options, "backend": backend, "logits_bytes": 50 * 400 * 2})
    for got, same_dtype, want in zip(ours, eager, truth, strict=True):
        assert relative_error(got, want) <= 1.05 * relative_error(same_dtype, want) + 1e-7


@pytest.mark.parametrize(("device", "backend"), PLACES)
def test_error_under_a_grad_scaler_is_at_most_that_of_eager(device: str, backend: str):
    """A mean over 2^14 rows takes p / N to float16's smallest numbers, unless the factor is in before the logit gradient is rounded."""
    hidden, weight, targets, options = problem({"normalizer": 2.0**14}, rows=120, vocab=400, width=64, dtype=torch.float16)
    inputs, wide = ([each.to(device, dtype) for each in (hidden, weight)] for dtype in (torch.float16, torch.float64))
    truth, eager, ours = (
        loss_and_gradients(*each, targets.to(device), {**options, "backend": name, "logits_bytes": 50 * 400 * 2}, factor=2.0**16)
        for each, name in ((wide, "reference"), (inputs, "reference"), (inputs, backend))
    )
    for got, same_dtype, want in zip(ours, eager, truth, strict=True):
        assert relative_error(got, want) <= 1.05 * relative_error(same_dtype, want) + 1e-7


def confident(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """hidden, weight, targets with p(target) >= 0.99 in every row, and the exact gradients of the mean for both.

    Exact given the logits: a backend that keeps them in `dtype` rounds them there, as eager does."""
    torch.manual_seed(0)
    weight = F.normalize(torch.randn(300, 128), dim=1).to(dtype)
    targets = torch.randint(0, 300, (200,))
    hidden = (weight[targets].float() * 14 + 0.05 * torch.randn(200, 128)).to(dtype)
    logits = (hidden.double() @ weight.double().T).to(dtype).double()
    assert F.cross_entropy(logits, targets, reduction="none").neg().exp().min() >= 0.99
    dz = (logits.softmax(1) - F.one_hot(targets, 300)) / 200
    truth = [each.to(device) for each in (dz @ weight.double(), dz.T @ hidden.double())]
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device), truth


@pytest.mark.parametrize(("device", "backend"), [place for place in PLACES if place[1] != "triton_recompute"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("logits_bytes", [None, 40 * 300 * 2])
def test_confident_tokens_keep_their_gradient_in_bfloat16(device: str, backend: str, stats: bool, logits_bytes: int | None):
    """At p(target) >= 0.99 the gradient is the rounding error of a probability, unless the one-hot is folded in float32."""
    hidden, weight, targets, truth = confident(device, torch.bfloat16)
    output = linear_cross_entropy(hidden, weight, targets, return_stats=stats, backend=backend, logits_bytes=logits_bytes)
    got = torch.autograd.grad(output.nll.mean() if stats else output, (hidden, weight))
    for mine, exact in zip(got, truth, strict=True):
        assert relative_error(mine, exact) <= 3e-3


def test_eager_loses_the_gradient_of_confident_tokens():
    """What the law above guards against: the same budget, broken by the usual two calls."""
    hidden, weight, targets, truth = confident("cpu", torch.bfloat16)
    got = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), (hidden, weight))
    assert max(relative_error(mine, exact) for mine, exact in zip(got, truth, strict=True)) > 0.02


@pytest.mark.parametrize("dtype", HALF)
def test_weight_gradient_of_many_chunks_is_rounded_once(dtype: torch.dtype):
    """A hundred chunks of one or two rows give the error of a single one: partial sums stay in float32."""
    hidden, weight, targets, _ = problem({}, rows=160, vocab=90, width=24, dtype=dtype)
    truth = loss_and_gradients(hidden.double(), weight.double(), targets, {"backend": "reference"})[2]
    one, many = (
        relative_error(loss_and_gradients(hidden, weight, targets, {"logits_bytes": rows * 90 * 2})[2], truth) for rows in (160, 1)
    )
    assert many <= 1.05 * one


@pytest.mark.parametrize("device", sorted({device for device, _ in PLACES}))
def test_results_are_deterministic(device: str):
    for place, backend in PLACES:
        if place == device:
            hidden, weight, targets, options = problem(FEATURES["soft"], rows=40, vocab=50, dtype=torch.float32)
            hidden, weight, targets, options = hidden.to(device), weight.to(device), targets.to(device), moved(device, options)
            options |= {"logits_bytes": 2000, "backend": backend}
            runs = [loss_and_gradients(hidden, weight, targets, options) for _ in range(2)]
            assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True)), backend
