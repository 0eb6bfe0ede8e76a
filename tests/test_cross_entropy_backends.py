"""Laws of the backends of `linear_cross_entropy`: which one is picked, what arithmetic it does, what it may hold."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from multimodal.kernels import linear_cross_entropy as module
from multimodal.kernels import logit_rows
from multimodal.kernels.chunked import LOGITS_BYTES, Chunked
from multimodal.kernels.linear_cross_entropy import build_backend, linear_cross_entropy
from multimodal.kernels.vocab_blocks import VocabBlocks
from tests.test_linear_cross_entropy import BACKENDS, FEATURES, loss_and_gradients, problem

N, V, D = 96, 2000, 24  # far more columns than width, so that logits outweigh the inputs


class Ledger(TorchDispatchMode):
    """Counts the operations of matrix products and the largest tensor that any call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        assert name not in ("bmm", "baddbmm", "matmul"), f"count {name} too"
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def ledger_of(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *, frozen: bool = False, backward: bool = True) -> Ledger:
    hidden, weight, targets, _ = problem({}, rows=N, vocab=V, width=D, dtype=torch.float32)
    targets[::4] = -100  # 72 supervised rows
    hidden.requires_grad_(backward)
    weight.requires_grad_(backward and not frozen)
    with Ledger() as ledger:
        value = loss(hidden, weight, targets)
        if backward:
            value.backward()
    return ledger


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"backend": "chunked"}, 6),
        ({"backend": "chunked", "logits_bytes": 10 * V * 4}, 6),
        ({"backend": "chunked", "return_stats": True}, 6),
        ({"backend": "chunked", "return_stats": True, "logits_bytes": 10 * V * 4}, 8),
        ({"backend": "vocab_blocks"}, 8),
    ],
)
def test_arithmetic_is_that_of_the_table(options: dict[str, Any], passes: int):
    """In units of n V D, n the supervised rows: none for ignored rows, none for a frozen weight, one product without gradients."""
    kept = 72

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        output = linear_cross_entropy(hidden, weight, targets, **options)
        return output.loss if options.get("return_stats") else output

    assert ledger_of(loss).operations == passes * kept * V * D
    assert ledger_of(loss, frozen=True).operations == (passes - 2) * kept * V * D
    assert ledger_of(loss, backward=False).operations == 2 * kept * V * D


def test_one_range_for_all_rows_costs_only_its_columns():
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, torch.where(targets == -100, -100, 700), vocab_range=(600, 856))

    assert ledger_of(loss).operations == 6 * 72 * 256 * D


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"backend": "chunked", "logits_bytes": 10 * V * 4}, V * D),  # the weight's gradient, larger than ten rows of logits
        ({"backend": "chunked", "logits_bytes": 10 * V * 4, "return_stats": True}, V * D),
        ({"backend": "vocab_blocks", "logits_bytes": 72 * 100 * 4}, V * D),
        ({"backend": "vocab_blocks", "logits_bytes": 72 * 2 * 4}, 24 * V),  # statistics of 1000 blocks are not kept either
        ({"backend": "reference"}, None),
    ],
)
def test_no_tensor_is_as_large_as_the_logits(options: dict[str, Any], allowed: int | None):
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        output = linear_cross_entropy(hidden, weight, targets, **options)
        return output.loss if options.get("return_stats") else output

    largest = ledger_of(loss).largest
    assert largest <= allowed if allowed else largest >= 72 * V


def test_chunks_follow_the_byte_budget():
    for width in (8, 4096):  # never the ratio of vocabulary and width
        hidden, weight = torch.empty(1000, width, device="meta"), torch.empty(5000, width, device="meta")
        for budget in (1, 20_000, 400_000, 10**9):
            chunks = Chunked(logits_bytes=budget).chunks(hidden, weight, weight_gradient=True)
            assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]] and chunks[-1].stop == 1000
            sizes = [chunk.stop - chunk.start for chunk in chunks]
            assert len(sizes) == min(1000, max(1, -(-1000 // max(1, budget // 20_000))))
            assert max(sizes) * 5000 * 4 <= max(budget, 5000 * 4) and max(sizes) - sizes[-1] < len(chunks)


def test_one_chunk_of_half_types_may_use_the_bytes_of_the_buffer_it_spares():
    rows = LOGITS_BYTES["cpu"] // (2 * 50_000) + 1000
    hidden, weight = (torch.empty(*shape, 512, dtype=torch.bfloat16, device="cpu") for shape in ((rows,), (50_000,)))
    assert len(Chunked().chunks(hidden, weight, weight_gradient=True)) == 1
    assert len(Chunked().chunks(hidden, weight, weight_gradient=False)) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature", ["plain", "soft", "range"])
def test_strides_do_not_matter(feature: str, backend: str):
    """A head stored as [D, V], hidden states cut from a wider tensor."""
    name, logits_bytes = BACKENDS[backend]
    hidden, weight, targets, options = problem(FEATURES[feature])
    options |= {"backend": name, "logits_bytes": logits_bytes}
    wide = torch.zeros(hidden.shape[0], 2 * hidden.shape[1], dtype=hidden.dtype)
    wide[:, ::2] = hidden
    strided = (wide[:, ::2], weight.T.contiguous().T)
    assert not any(each.is_contiguous() for each in strided)
    for ours, theirs in zip(
        loss_and_gradients(*strided, targets, options), loss_and_gradients(hidden, weight, targets, options), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@dataclass(frozen=True)
class OnAccelerator:
    """As much of a CUDA tensor as choosing a backend looks at."""

    shape: tuple[int, int]
    is_cuda: bool = True
    device: str = "cuda:0"

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("free", "triton", "expected"),
    [
        (80 * 2**30, True, Chunked),
        (80 * 2**30, False, Chunked),
        (4 * 2**30, True, VocabBlocks),  # 2 GiB of float32 weight gradient do not fit half of it
        (4 * 2**30, False, VocabBlocks),
    ],
)
def test_auto_picks_by_device_and_size(free: int, triton: bool, expected: type, monkeypatch: pytest.MonkeyPatch):
    twin = object()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(module, "has_triton", lambda: triton)
    monkeypatch.setattr(module, "_triton_rows", lambda: twin)
    chosen = build_backend("auto", OnAccelerator((8192, 4096)), OnAccelerator((128256, 4096)))
    assert type(chosen) is expected and chosen.row_pass is (twin if triton else logit_rows)
    cpu = build_backend("auto", torch.empty(8, 4), torch.empty(9, 4))
    assert type(cpu) is Chunked and cpu.row_pass is logit_rows


def test_a_backend_may_be_given_as_an_object():
    hidden, weight, targets, options = problem(FEATURES["soft"])
    for chosen in (Chunked(logits_bytes=200), VocabBlocks(logits_bytes=200)):
        name = {Chunked: "chunked", VocabBlocks: "vocab_blocks"}[type(chosen)]
        ours = loss_and_gradients(hidden, weight, targets, {**options, "backend": chosen})
        theirs = loss_and_gradients(hidden, weight, targets, {**options, "backend": name, "logits_bytes": 200})
        assert all(torch.equal(mine, same) for mine, same in zip(ours, theirs, strict=True))


def test_triton_backends_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for present, words in ((True, "needs CUDA tensors"), (False, "triton is not installed")):
        monkeypatch.setattr(module, "has_triton", lambda present=present: present)
        for name in ("triton", "triton_recompute"):
            with pytest.raises(ValueError, match=f"'{name}'.*{words}.*backend='auto'"):
                build_backend(name, torch.empty(8, 4), torch.empty(9, 4))


WITHOUT_TRITON = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["triton"] = None  # an import of it fails, and it is not found
import torch
from multimodal.kernels.linear_cross_entropy import has_triton, linear_cross_entropy

hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
targets = torch.tensor([-100, 0, 3, 10, 5, 5])
assert not has_triton()
loss = linear_cross_entropy(hidden, weight, targets)
loss.backward()
truth = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
torch.testing.assert_close(loss, truth)
"""


def test_without_triton_the_loss_works_and_says_nothing():
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
