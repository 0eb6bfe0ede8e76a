"""Linear cross-entropy, forward and backward: time against the three GEMMs it cannot avoid, memory against eager.

Variants: eager (F.cross_entropy of full logits), compacted eager (ignored rows dropped), native (torch's own
F.linear_cross_entropy, from torch 2.13 on, compacted), ours by backend. On the CPU, time is this process's processor time, so other
load costs less than it would on the clock; "GEMM" is hidden @ weight.T, dz @ weight, dz.T @ hidden on the supervised rows,
measured in the same turn. Memory is the peak beyond inputs and returned gradients.

    vla bench cross_entropy                         a small table on the CPU
    vla bench cross_entropy --device=cuda           the heads of published models
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from tests.benchmarks.harness import parser, report

# name -> V, D; rows on CUDA are all supervised
HEADS = {"Qwen2.5-0.5B": (151936, 896), "OpenVLA": (32064, 4096), "Llama-3-8B": (128256, 4096), "Gemma-2-2B": (256000, 2304)}
COLUMNS = ["shape", "dtype", "variant", "ms", "GEMM ms", "GEMM share", "peak MiB", "of eager", "loss error"]


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--rows", type=int, nargs="+", default=[2048], help="N")
    arguments.add_argument("--vocab", type=int, nargs="+", default=[32000], help="V (CPU)")
    arguments.add_argument("--width", type=int, nargs="+", default=[512, 1024], help="D (CPU)")
    arguments.add_argument("--supervised", type=float, default=None, help="share of rows; 0.25 on the CPU, 1 on CUDA")
    arguments.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16"])
    arguments.add_argument("--skip", nargs="*", default=[], help="variants to leave out")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    on_cpu = options.device == "cpu"
    shapes = [(str(vocab), vocab, width) for vocab in options.vocab for width in options.width]
    shapes = shapes if on_cpu else [(name, *shape) for name, shape in HEADS.items()]
    share = options.supervised or (0.25 if on_cpu else 1.0)
    rows = []
    for name, vocab, width in shapes:
        for count in options.rows:
            for dtype in options.dtypes or (["float32", "bfloat16"] if on_cpu else ["bfloat16"]):
                label = f"N {count}, V {name}, D {width}"
                for row in measure(count, vocab, width, getattr(torch, dtype), share, options):
                    rows.append([label, dtype, *row])
                    print(*(f"{value:.4g}" if isinstance(value, float) else value for value in rows[-1]), sep=" | ", flush=True)
    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    report("cross_entropy", COLUMNS, rows, options.output, device=device, torch=torch.__version__, threads=options.threads)
    return 0


def measure(count: int, vocab: int, width: int, dtype: torch.dtype, share: float, options: argparse.Namespace) -> list[list]:
    """One row per variant for hidden [count, width], weight [vocab, width]."""
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device=options.device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=options.device) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (count,), device=options.device)
    targets[torch.rand(count, device=options.device) >= share] = -100
    kept = (targets != -100).nonzero()[:, 0]
    truth = exact_loss(hidden.detach()[kept], weight.detach(), targets[kept])
    variants = {name: loss for name, loss in losses(kept, options.device).items() if name not in options.skip}
    seconds: dict[str, list[float]] = {name: [] for name in (*variants, "gemm")}
    peaks, errors = {}, {}
    gemm = three_products(hidden.detach()[kept], weight.detach())

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        hidden.grad = weight.grad = None
        value = loss(hidden, weight, targets)
        value.backward()
        return value.detach()

    set_mmap_threshold(2**16)  # so that a freed buffer leaves the process, and is not counted again
    for name, loss in variants.items():  # also the warm-up
        peaks[name], value = peak_beyond(lambda loss=loss: step(loss), options.device, hidden, weight)
        errors[name] = abs(float(value) - truth)
    set_mmap_threshold(2**25)  # glibc's own limit
    gemm()
    for _ in range(options.repetitions):
        for name, loss in variants.items():
            seconds[name].append(clock(lambda loss=loss: step(loss), options.device))
        seconds["gemm"].append(clock(gemm, options.device))
    base = statistics.median(seconds["gemm"])
    eager = peaks.get("eager", float("nan"))
    return [
        [name, 1e3 * (median := statistics.median(seconds[name])), 1e3 * base, base / median, peaks[name] / 2**20, peaks[name] / eager, errors[name]]
        for name in variants
    ]  # fmt: skip


def losses(kept: Tensor, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Variant -> loss(hidden, weight, targets)."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets),
        "compacted eager": lambda hidden, weight, targets: F.cross_entropy(hidden[kept] @ weight.T, targets[kept]),
    }
    if hasattr(F, "linear_cross_entropy"):
        chunked = torch.nn.LinearCrossEntropyOptions()
        found["native"] = lambda hidden, weight, targets: F.linear_cross_entropy(hidden[kept], weight, targets[kept], options=chunked)
    backends = ["chunked", "vocab_blocks"] + (["triton", "triton_recompute"] if device == "cuda" else [])
    for backend in backends:
        found[f"ours {backend}"] = lambda hidden, weight, targets, backend=backend: linear_cross_entropy(
            hidden, weight, targets, backend=backend
        )
    return found


def exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """The mean loss in float64 of the products in float32; a few rows at a time."""
    parts = []
    for i in range(0, len(hidden), 64):
        logits = hidden[i : i + 64].float() @ weight.float().T
        parts.append(F.cross_entropy(logits.double(), targets[i : i + 64], reduction="sum"))
    return float(sum(parts)) / len(hidden)


def three_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    dz = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device).to(hidden.dtype)

    def run() -> None:
        torch.mm(hidden, weight.T)
        torch.mm(dz, weight)
        torch.mm(dz.T, hidden)

    return run


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
        before = resident("VmRSS")
        value = run()
        peak = resident("VmHWM") - before
    return peak - sum(each.grad.nbytes for each in inputs), value


def set_mmap_threshold(size: int) -> None:
    """From which size on glibc gives a buffer pages of its own; does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, size)


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
