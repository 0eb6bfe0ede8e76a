"""Laws of `linear_cross_entropy`: its meaning, and that its gradients are those of its value."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels import logit_rows
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 1.5, "bias": True, "label_smoothing": 0.1},
    "temperature": {"temperature": "rows", "softcap": 2.0},
    "range": {"vocab_range": "rows", "label_smoothing": 0.1, "bias": True},
    "slice": {"vocab_range": (2, 9), "bias": True},
    "soft": {"target_probs": True, "token_weight": True, "z_loss": 0.05},
    "weighted_sum": {"token_weight": True, "reduction": "sum"},
    "none": {"reduction": "none", "label_smoothing": 0.1},
    "normalizer": {"normalizer": 7.5, "token_weight": True},
}
BACKENDS = {"reference": ("reference", None), "one_chunk": ("chunked", None), "chunks": ("chunked", 1), "vocab_blocks": ("vocab_blocks", 150)}


def problem(
    features: dict[str, Any], *, rows: int = 7, vocab: int = 11, width: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """hidden [N, D], weight [V, D], targets and the options; the first row is ignored, the second names the last column."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = (2 * uniform(rows, width) - 1).to(dtype), (4 * uniform(vocab, width) - 2).to(dtype)
    options = dict(features)
    low, high = torch.zeros(rows, dtype=torch.long), torch.full((rows,), vocab)
    if options.get("vocab_range") == "rows":
        low, high = (uniform(rows) * vocab / 2).long(), vocab - (uniform(rows) * vocab / 2).long()
        options["vocab_range"] = torch.stack([low, high], 1)
    elif isinstance(options.get("vocab_range"), tuple):
        low, high = (torch.full((rows,), bound) for bound in options["vocab_range"])
    targets = low + (uniform(rows) * (high - low)).long()
    targets[1] = high[1] - 1
    targets[0] = -100
    if options.pop("target_probs", False):
        probs = uniform(rows, 3) + 0.1
        targets = low[:, None] + (uniform(rows, 3) * (high - low)[:, None]).long()
        targets[0], targets[-1, 1] = -100, -100  # a padding entry
        probs[-1, 1] = 0
        options["target_probs"] = probs / probs.sum(1, keepdim=True)
    if options.get("bias"):
        options["bias"] = uniform(vocab).to(dtype)
    if options.get("token_weight"):
        options["token_weight"] = uniform(rows)
    if options.get("temperature") == "rows":
        options["temperature"] = 0.5 + uniform(rows)
    return hidden, weight, targets, options


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any], factor: float = 1) -> list[Tensor]:
    """The loss, and the gradients of `factor` times it."""
    inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    if options.get("bias") is not None:
        inputs.append(options["bias"].detach().requires_grad_())
        options = {**options, "bias": inputs[2]}
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else torch.ones_like(loss)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, factor * upstream)]


def relative_error(got: Tensor, truth: Tensor) -> float:
    got, truth = got.detach(), truth.detach()
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logit_rows, "BLOCK_BYTES", 100)  # one row each


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_drop_in_for_cross_entropy(reduction: str, smoothing: float):
    hidden, weight, targets, _ = problem({}, rows=12)
    hidden, targets = hidden.reshape(3, 4, 5), targets.reshape(3, 4)
    got = loss_and_gradients(hidden, weight, targets, {"reduction": reduction, "label_smoothing": smoothing})
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    logits = (inputs[0] @ inputs[1].T).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction=reduction, label_smoothing=smoothing)
    loss = loss.reshape(3, 4) if reduction == "none" else loss
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
    for ours, theirs in zip(got, [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_are_those_of_the_value(feature: str, backend: str, small_blocks: None):
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, targets, options = problem(FEATURES[feature])
    bias = options.pop("bias", None)
    bias = None if bias is None else bias.requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, bias=bias, backend=name, logits_bytes=logits_bytes, **options)

    # nondet_tol: the second backward through one graph recomputes what the first consumed
    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_(), bias), nondet_tol=1e-10, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_differentiable(backend: str, small_blocks: None):
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, targets, options = problem(FEATURES["range"])

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_cross_entropy(
            hidden, weight, targets, return_stats=True, backend=name, logits_bytes=logits_bytes, **options
        )[:4]

    assert torch.autograd.gradcheck(outputs, (hidden.requires_grad_(), weight.requires_grad_()), nondet_tol=1e-10, fast_mode=True)


def test_loss_is_float32_and_gradients_have_the_inputs_dtype():
    hidden, weight, targets, _ = problem({}, dtype=torch.bfloat16)
    loss, *gradients = loss_and_gradients(hidden, weight, targets, {})
    assert loss.dtype == torch.float32 and [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2


@pytest.mark.parametrize("backend", ["reference", "chunked", "vocab_blocks"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [False, True])
def test_all_ignored_gives_zero_loss_and_zero_gradients(backend: str, reduction: str, weights: bool):
    hidden, weight, targets, _ = problem({})
    options = {"backend": backend, "reduction": reduction, "token_weight": torch.rand(7) if weights else None}
    for result in loss_and_gradients(hidden, weight, torch.full_like(targets, -100), options):
        assert torch.equal(result, torch.zeros_like(result))
    output = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), return_stats=True)
    assert output.count == 0 and output.entropy.shape == targets.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stats", [False, True])
def test_one_kept_row_is_that_row_alone(backend: str, stats: bool):
    """The first, a middle and the last of seven; its target is the last column."""
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, _, _ = problem({})
    for row in (0, 3, 6):
        targets = torch.full((7,), -100)
        targets[row] = 10
        inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        output = linear_cross_entropy(*inputs, targets, backend=name, logits_bytes=logits_bytes, return_stats=stats)
        loss = output.loss if stats else output
        alone = F.cross_entropy(inputs[0][row : row + 1] @ inputs[1].T, targets[row : row + 1])
        torch.testing.assert_close(loss, alone, rtol=1e-12, atol=1e-14)
        for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(alone, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        assert not stats or (output.count == 1 and output.nll.nonzero().tolist() == [[row]])


def test_no_rows_at_all_give_zero():
    weight = torch.randn(11, 5, requires_grad=True)
    loss = linear_cross_entropy(torch.zeros(0, 5), weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and torch.equal(weight.grad, torch.zeros(11, 5))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)])
def test_no_rows_of_several_targets_give_zero_too(shape: tuple[int, ...]):
    weight, targets = torch.randn(11, 5, requires_grad=True), torch.zeros(*shape, 3, dtype=torch.long)
    loss = linear_cross_entropy(torch.zeros(*shape, 5), weight, targets, target_probs=torch.full((*shape, 3), 1 / 3))
    loss.backward()
    assert loss == 0 and torch.equal(weight.grad, torch.zeros(11, 5))


def test_ignored_rows_are_dropped_before_any_product():
    hidden, weight, targets, _ = problem({})
    poisoned = torch.cat([torch.full_like(hidden[:1], torch.nan), hidden[1:]])
    for ours, theirs in zip(*(loss_and_gradients(h, weight, targets, {}) for h in (poisoned, hidden)), strict=True):
        assert torch.equal(ours, theirs)


def test_valid_index_equals_the_search_for_it():
    hidden, weight, targets, options = problem(FEATURES["weighted_sum"])
    index = (targets != -100).nonzero()[:, 0]
    searched = loss_and_gradients(hidden, weight, targets, options)
    for ours, theirs in zip(loss_and_gradients(hidden, weight, targets, {**options, "valid_index": index}), searched, strict=True):
        assert torch.equal(ours, theirs)


def test_mean_divides_by_the_weights_or_the_normalizer():
    hidden, weight, targets, _ = problem({})
    token_weight = torch.rand(7).double()
    per_token = linear_cross_entropy(hidden, weight, targets, reduction="none")
    mean = linear_cross_entropy(hidden, weight, targets, token_weight=token_weight)
    torch.testing.assert_close(mean, (per_token * token_weight).sum() / token_weight[1:].sum())
    halves = [linear_cross_entropy(hidden[part], weight, targets[part], normalizer=6.0) for part in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(sum(halves), linear_cross_entropy(hidden, weight, targets))
    tensor = linear_cross_entropy(hidden, weight, targets, normalizer=torch.tensor(6.0))
    torch.testing.assert_close(tensor, sum(halves))
    assert linear_cross_entropy(hidden, weight, targets, token_weight=torch.zeros(7)) == 0


def test_token_weights_get_their_gradient():
    hidden, weight, targets, _ = problem({})
    token_weight = torch.rand(7, requires_grad=True)
    linear_cross_entropy(hidden, weight, targets, token_weight=token_weight, reduction="sum").backward()
    torch.testing.assert_close(token_weight.grad.double(), linear_cross_entropy(hidden, weight, targets, reduction="none"))


def test_a_range_is_a_slice_of_the_head():
    hidden, weight, targets, options = problem(FEATURES["slice"])
    inside = torch.where(targets == -100, -100, targets - 2)
    truth = loss_and_gradients(hidden, weight[2:9], inside, {"bias": options["bias"][2:9]})
    rows = torch.tensor([2, 9]).expand(7, 2)
    for vocab_range in ((2, 9), rows):
        loss, _, of_weight, of_bias = loss_and_gradients(hidden, weight, targets, {**options, "vocab_range": vocab_range})
        torch.testing.assert_close(loss, truth[0])
        torch.testing.assert_close(of_weight[2:9], truth[2])
        assert of_weight[:2].eq(0).all() and of_weight[9:].eq(0).all() and of_bias[9:].eq(0).all()


def test_soft_targets_on_one_column_are_hard_targets():
    hidden, weight, targets, _ = problem({})
    ids = targets[:, None].expand(7, 2)  # one column named twice
    soft = loss_and_gradients(hidden, weight, ids, {"target_probs": torch.tensor([0.25, 0.75]).expand(7, 2)})
    for ours, theirs in zip(soft, loss_and_gradients(hidden, weight, targets, {}), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_softcap_and_temperature_shape_the_logits():
    hidden, weight, targets, options = problem(FEATURES["temperature"])
    z = 2.0 * torch.tanh(hidden @ weight.T / 2.0) / options["temperature"][:, None]
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, **options), F.cross_entropy(z, targets))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("backend", ["one_chunk", "chunks", "vocab_blocks"])
def test_second_backward_recomputes_and_double_backward_raises(stats: bool, backend: str):
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, targets, _ = problem({})
    hidden.requires_grad_()
    output = linear_cross_entropy(hidden, weight, targets, return_stats=stats, backend=name, logits_bytes=logits_bytes)
    loss = output.loss if stats else output
    first, second = (torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward.*reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_input_gets_no_gradient(wanted: tuple[bool, bool], backend: str):
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, targets, _ = problem({})
    full = loss_and_gradients(hidden, weight, targets, {})
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    loss = linear_cross_entropy(hidden, weight, targets, backend=name, logits_bytes=logits_bytes)
    torch.testing.assert_close(loss.detach(), full[0])
    if any(wanted):
        loss.backward()
    for tensor, truth, want in zip((hidden, weight), full[1:], wanted, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(tensor.grad, truth)


def test_autocast_casts_like_a_linear_layer():
    hidden, weight, targets, _ = problem({}, dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, targets)
        loss.backward()
    assert weight.grad.dtype == torch.float32 and loss.dtype == torch.float32
    cast = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(loss, cast)
