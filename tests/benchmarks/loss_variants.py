"""What `bench_cross_entropy` compares, and how one variant is measured on one shape.

Needs torch and `multimodal.kernels` alone, so that it runs beside another torch than the lock's; cut_cross_entropy and Liger
join where they are installed and the device is CUDA."""

import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels.linear_cross_entropy import has_triton, linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets, kept rows -> mean loss
LONGEST = 60.0  # seconds; a variant that may take longer than its arithmetic, and would, is not measured
ONCE = 8.0  # seconds; a call that takes longer is timed once, while its memory is measured


@dataclass(frozen=True)
class Cell:
    """One shape: hidden [rows, width], weight [vocab, width], `supervised` of the rows not ignored."""

    name: str  # of the head, or V
    rows: int
    vocab: int
    width: int
    dtype: str
    supervised: float
    device: str

    def __str__(self) -> str:
        return f"N {self.rows}, V {self.name}, D {self.width}"


@dataclass(frozen=True)
class Variant:
    """One way to compute the loss."""

    loss: Loss
    every_row: bool = False  # forms logits of ignored rows too
    logit_copies: float = 3.0  # held at once; decides whether it would fit the memory
    per_row: bool = False  # may take far longer than its arithmetic: a sixteenth of the rows is timed first
    cuda: bool = False  # needs CUDA


@dataclass(frozen=True)
class Measured:
    """One variant on one cell; None where it was not measured, and why."""

    milliseconds: float | None = None
    gemm_milliseconds: float | None = None  # three products on the supervised rows, timed in turn with the variant
    repetitions: int = 0
    peak_bytes: int | None = None  # beyond inputs and returned gradients
    loss: float | None = None
    note: str = ""


def build_variants(device: str) -> dict[str, Variant]:
    """Everything that can be imported here and runs on the device."""
    found = {
        "eager": Variant(lambda hidden, weight, targets, kept: F.cross_entropy(hidden @ weight.T, targets), every_row=True),
        "compacted eager": Variant(lambda hidden, weight, targets, kept: F.cross_entropy(hidden[kept] @ weight.T, targets[kept])),
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13

        def native(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
            return F.linear_cross_entropy(hidden[kept], weight, targets[kept])

        def native_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions()
            return F.linear_cross_entropy(hidden[kept], weight, targets[kept], options=options)

        found["torch, compacted"] = Variant(native)
        found["torch in chunks, compacted"] = Variant(native_chunked, logit_copies=1, per_row=True)
    if importlib.util.find_spec("cut_cross_entropy"):
        for name, settings in (("cut_cross_entropy", {}), ("cut_cross_entropy, no filter", {"filter_eps": None})):
            found[name] = Variant(_cut_cross_entropy(settings), logit_copies=0, cuda=True)
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = Variant(_liger, every_row=True, logit_copies=0, cuda=True)
    for backend in ("chunked", "vocab_blocks", "triton", "triton_recompute"):
        cuda = backend.startswith("triton")
        if not cuda or has_triton():
            found[f"ours, {backend}"] = Variant(_ours(backend), logit_copies=1 if backend in ("chunked", "triton") else 0, cuda=cuda)
    return {name: variant for name, variant in found.items() if device == "cuda" or not variant.cuda}


def _ours(backend: str) -> Loss:
    return lambda hidden, weight, targets, kept: linear_cross_entropy(hidden, weight, targets, backend=backend)


def _cut_cross_entropy(settings: dict[str, Any]) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy as theirs

        return theirs(hidden, weight, targets, **settings)

    return loss


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def build_inputs(cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight (both with gradients on), targets and the index of the kept rows; the same in every process."""
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    hidden = torch.randn(cell.rows, cell.width, device=cell.device).to(dtype)
    weight = (torch.randn(cell.vocab, cell.width, device=cell.device) / cell.width**0.5).to(dtype)
    targets = torch.randint(cell.vocab, (cell.rows,), device=cell.device)
    targets[torch.rand(cell.rows, device=cell.device) >= cell.supervised] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets, (targets != -100).nonzero()[:, 0]


@dataclass(frozen=True)
class Problem:
    """The inputs of a cell, and what is done with them."""

    cell: Cell
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    kept: Tensor

    def step(self, variant: Variant, rows: Tensor | None = None) -> Tensor:
        """Forward and backward, on all rows or on some; the loss."""
        self.hidden.grad = self.weight.grad = None
        if rows is None:
            loss = variant.loss(self.hidden, self.weight, self.targets, self.kept)
        else:
            loss = variant.loss(self.hidden[rows], self.weight, self.targets[rows], torch.arange(len(rows), device=rows.device))
        loss.backward()
        return loss.detach()

    def exact_loss(self) -> float:
        """The mean loss in float64 of the products in float32; a few rows at a time."""
        total = 0.0
        with torch.no_grad():
            wide = self.weight.float()
            for rows in self.kept.split(64):
                logits = self.hidden[rows].float() @ wide.T
                total += float(F.cross_entropy(logits.double(), self.targets[rows], reduction="sum"))
        return total / len(self.kept)

    def first_call(self, variant: Variant) -> Measured:
        """Loss, memory and time of one call, or why there was none."""
        device, num_rows = self.cell.device, self.cell.rows if variant.every_row else len(self.kept)
        logits = variant.logit_copies * num_rows * self.cell.vocab * self.hidden.element_size()
        needed, room = int(logits + self.hidden.nbytes + self.weight.nbytes), free_bytes(device)
        if needed > room:
            return Measured(note=f"skipped: about {needed / 2**30:.0f} GiB, {room / 2**30:.0f} free")
        if device == "cuda":
            self.step(variant, self.kept[:2])  # loads libraries, compiles kernels
        else:
            step_on_little(variant)
        if variant.per_row:
            estimate = 16 * clock(lambda: self.step(variant, self.kept[: len(self.kept) // 16]), device)
            if estimate > LONGEST:
                return Measured(note=f"skipped: about {estimate:.0f} s a call")
        began = time.process_time()
        try:
            peak, loss = peak_beyond(lambda: self.step(variant), device, self.hidden, self.weight)
        except torch.OutOfMemoryError:
            return Measured(note="out of memory")
        return Measured(1e3 * (time.process_time() - began), None, 1, peak, float(loss))


def measure(cell: Cell, names: list[str], repetitions: int) -> tuple[float, dict[str, Measured]]:
    """The exact loss, and every variant on one cell: memory of one call each, then times in turn with the three products."""
    variants = {name: build_variants(cell.device)[name] for name in names}
    problem = Problem(cell, *build_inputs(cell))
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    three_products(hidden[problem.kept[:128]], weight)()  # keeps some buffers for good, which belong to no variant
    exact = problem.exact_loss()
    set_allocator(keeps_memory=False)
    results = {name: problem.first_call(variant) for name, variant in variants.items()}
    problem.hidden.grad = problem.weight.grad = None
    set_allocator(keeps_memory=True)
    gemm = three_products(hidden[problem.kept], weight)
    gemm()
    rounds = {name: _rounds(result, cell.device, repetitions) for name, result in results.items()}
    seconds: dict[str, list[float]] = {name: [] for name in results}
    products = []
    for name, count in rounds.items():
        if count > 1:
            problem.step(variants[name])  # its memory is kept from now on
    for turn in range(max(1, *rounds.values())):
        products.append(clock(gemm, cell.device))
        for name, count in rounds.items():
            if turn < count:
                seconds[name].append(clock(lambda name=name: problem.step(variants[name]), cell.device))
    for name, result in results.items():
        if result.milliseconds is not None:
            times = [1e3 * each for each in seconds[name]] or [result.milliseconds]
            note = result.note if seconds[name] else "one call"
            results[name] = replace(
                result, milliseconds=statistics.median(times), gemm_milliseconds=1e3 * statistics.median(products),
                repetitions=len(times), note=note,
            )  # fmt: skip
    return exact, results


def _rounds(result: Measured, device: str, repetitions: int) -> int:
    """How often to time a variant, given its first call: three times at least if it takes less than 3 s."""
    if result.milliseconds is None:
        return 0
    first = result.milliseconds / 1e3
    if device == "cpu" and first > 3:
        return int(first <= ONCE)
    return repetitions if device == "cuda" else min(repetitions, max(3, int(ONCE / max(first, 1e-3))))


def step_on_little(variant: Variant) -> None:
    """One call on a tiny problem, so that no library is loaded while memory is measured."""
    hidden, weight = (torch.randn(64, 32, requires_grad=True) for _ in range(2))
    variant.loss(hidden, weight, torch.arange(64), torch.arange(64)).backward()


def three_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """What no exact method can avoid: logits, and their gradient times both inputs."""

    def run() -> None:
        dz = torch.mm(hidden, weight.T)
        torch.mm(dz, weight)
        torch.mm(dz.T, hidden)

    return run


def matmul_rate(size: int = 8192) -> float:
    """bfloat16 operations per second of one large product on CUDA, the best of twenty."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = min(clock(lambda: left @ right, "cuda") for _ in range(21))
    return 2 * size**3 / seconds


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds: processor time of this process on the CPU, device time on CUDA."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    before = time.process_time()
    run()
    return time.process_time() - before


def peak_beyond(run: Callable[[], Tensor], device: str, *inputs: Tensor) -> tuple[int, Tensor]:
    """Peak bytes of one call beyond what it found, less the gradients it leaves; and its value."""
    for each in inputs:
        each.grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak resident size starts anew
        before = _status("/proc/self/status", "VmRSS")
        value = run()
        peak = _status("/proc/self/status", "VmHWM") - before
    return peak - sum(each.grad.nbytes for each in inputs), value


def set_allocator(*, keeps_memory: bool) -> None:
    """Whether glibc keeps freed buffers, as a training process's allocator would, or gives each back, so that the resident size is what
    is held. Does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt(mmap_threshold, 2**16)
    mallopt(mmap_max, 0 if keeps_memory else 2**16)
    mallopt(trim_threshold, 2**31 - 1 if keeps_memory else 2**16)


def free_bytes(device: str) -> int:
    """Memory to be had, less a reserve for other processes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _status("/proc/meminfo", "MemAvailable") - 2**30


def _status(path: str, field: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
