"""Linear cross-entropy, forward and backward: time against the three products it cannot avoid, memory beyond what it returns.

CPU: one thread, a quarter of the rows supervised; every shape is a process of its own. Memory is the resident size's peak in one call,
freed buffers going back to the system at once. For the times they stay in the process, so that no call pays for pages. Time is
processor time, which other load stretches less than the clock; "GEMM" is the time of hidden @ weight.T, dz @ weight and dz.T @ hidden
on the supervised rows, in turn with the variants. A call of over 8 seconds is made once, one of over 3 twice. Finished shapes are
kept beside the output: an interrupted run goes on.

CUDA (picked where there is one): heads of published models, all rows supervised, everything in one process. The bound is
6 n V D operations at the rate of a large bfloat16 product, and the memory that the two gradients take.

    vla bench cross_entropy                                              the whole grid
    vla bench cross_entropy --rows 2048 --vocab 32000 --width 512        one shape
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from tests.benchmarks.harness import parser, report
from tests.benchmarks.loss_variants import Cell, Measured, build_variants, clock, matmul_rate, measure, three_products

# name -> V, D
HEADS = {"Qwen2.5-0.5B": (151936, 896), "OpenVLA": (32064, 4096), "Llama-3-8B": (128256, 4096), "Gemma-2-2B": (256000, 2304)}
CPU_COLUMNS = ["shape", "dtype", "variant", "ms", "calls", "GEMM ms", "GEMM share", "peak MiB", "of eager", "loss error", "note"]
CUDA_COLUMNS = [
    "shape", "dtype", "variant", "ms", "calls", "6nVD ms", "share of 6nVD", "GEMM share", "peak MiB", "bound MiB", "loss error", "note",
]  # fmt: skip
# One call in units of the three products on the supervised rows, float32 and bfloat16, for the estimate that is printed first.
TYPICAL = {
    "eager": (4.2, 4.7), "compacted eager": (1.1, 1.2), "torch, compacted": (1.1, 1.2), "torch in chunks, compacted": (3.1, 11.5),
    "ours, chunked": (1.05, 1.15), "ours, vocab_blocks": (1.7, 3.1),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments.add_argument("--rows", type=int, nargs="+", default=[2048, 8192], help="N")
    arguments.add_argument("--vocab", type=int, nargs="+", default=[32000, 152000], help="V (CPU)")
    arguments.add_argument("--width", type=int, nargs="+", default=[512, 1024], help="D (CPU)")
    arguments.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS), help="V and D (CUDA)")
    arguments.add_argument("--supervised", type=float, default=None, help="share of rows; 0.25 on the CPU, 1 on CUDA")
    arguments.add_argument("--dtypes", nargs="+", default=None, choices=["float32", "bfloat16"])
    arguments.add_argument("--skip", nargs="*", default=[], help="variants to leave out")
    arguments.add_argument("--part", default="", help=argparse.SUPPRESS)  # cell and variants as JSON: a process of its own
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.part:
        print(run_part(json.loads(options.part), options.repetitions))
        return 0
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cross_entropy-{device}-torch{torch.__version__.split('+')[0]}"
    output = options.output or Path("outputs") / "bench" / f"{name}.json"
    parts = output.with_suffix("")
    parts.mkdir(parents=True, exist_ok=True)
    cells = list(cuda_cells(options) if device == "cuda" else cpu_cells(options))
    variants = [variant for variant in build_variants(device) if variant not in options.skip]
    if device == "cpu":
        print(estimate(cells, variants, parts), flush=True)
    rate = matmul_rate() if device == "cuda" else None
    rows = []
    for cell in cells:
        exact, results = part(parts, cell, variants, options)
        for variant, result in results.items():
            rows.append(cuda_row(cell, variant, result, exact, rate) if rate else cpu_row(cell, variant, result, exact, results))
            print(*(f"{value:.4g}" if isinstance(value, float) else value for value in rows[-1]), sep=" | ", flush=True)
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": options.threads, "rate": rate}
    report(name, CUDA_COLUMNS if rate else CPU_COLUMNS, rows, output, torch=torch.__version__, **facts)
    return 0


def cpu_cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Small shapes first."""
    for rows in options.rows:
        for vocab in options.vocab:
            for width in options.width:
                for dtype in options.dtypes or ("float32", "bfloat16"):
                    yield Cell(str(vocab), rows, vocab, width, dtype, options.supervised or 0.25, "cpu")


def cuda_cells(options: argparse.Namespace) -> Iterator[Cell]:
    for head in options.heads:
        for rows in options.rows:
            for dtype in options.dtypes or ("bfloat16",):
                yield Cell(head, rows, *HEADS[head], dtype, options.supervised or 1.0, "cuda")


def part(folder: Path, cell: Cell, variants: list[str], options: argparse.Namespace) -> tuple[float, dict[str, Measured]]:
    """The exact loss and the result of every variant on one cell; from its file if it is there."""
    path = part_path(folder, cell)
    if not path.exists():
        wanted = {"cell": asdict(cell), "variants": variants}
        if cell.device == "cuda":
            text = run_part(wanted, options.repetitions)
        else:
            command = [
                sys.executable, "-m", "tests.benchmarks.bench_cross_entropy", f"--part={json.dumps(wanted)}",
                f"--repetitions={options.repetitions}", f"--threads={options.threads}",
            ]  # fmt: skip
            text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        temporary = path.with_suffix(".part")
        temporary.write_text(text)
        temporary.rename(path)
    found = json.loads(path.read_text())
    return found["exact"], {name: Measured(**result) for name, result in found["results"].items() if name in variants}


def part_path(folder: Path, cell: Cell) -> Path:
    return folder / f"N{cell.rows}-V{cell.name}-D{cell.width}-{cell.dtype}-{cell.supervised:g}.json"


def run_part(wanted: dict, repetitions: int) -> str:
    """One cell's measurements as JSON."""
    exact, results = measure(Cell(**wanted["cell"]), wanted["variants"], repetitions)
    return json.dumps({"exact": exact, "results": {name: asdict(result) for name, result in results.items()}})


def cpu_row(cell: Cell, variant: str, result: Measured, exact: float, results: dict[str, Measured]) -> list:
    if result.milliseconds is None:
        return [str(cell), cell.dtype, variant, *["-"] * 7, result.note]
    eager = results["eager"].peak_bytes if "eager" in results else None
    return [
        str(cell), cell.dtype, variant, result.milliseconds, result.repetitions, result.gemm_milliseconds,
        result.gemm_milliseconds / result.milliseconds, result.peak_bytes / 2**20,
        result.peak_bytes / eager if eager else "-", abs(result.loss - exact), result.note,
    ]  # fmt: skip


def cuda_row(cell: Cell, variant: str, result: Measured, exact: float, rate: float) -> list:
    """Memory here includes the returned gradients, as its bound does; the modes of least memory may take 4 n D bytes and 2 % more."""
    if result.milliseconds is None:
        return [str(cell), cell.dtype, variant, *["-"] * 8, result.note]
    size = {"float32": 4, "bfloat16": 2}[cell.dtype]
    gradients = size * cell.width * (cell.rows + cell.vocab)
    bound = 6e3 * cell.rows * cell.supervised * cell.vocab * cell.width / rate
    note = result.note
    if variant in ("ours, vocab_blocks", "ours, triton_recompute"):
        allowed = 1.02 * gradients + 4 * cell.rows * cell.supervised * cell.width
        note = "within memory goal" if result.peak_bytes + gradients <= allowed else f"over memory goal {allowed / 2**20:.0f}"
    return [
        str(cell), cell.dtype, variant, result.milliseconds, result.repetitions, bound, bound / result.milliseconds,
        result.gemm_milliseconds / result.milliseconds, (result.peak_bytes + gradients) / 2**20, gradients / 2**20,
        abs(result.loss - exact), note,
    ]  # fmt: skip


def estimate(cells: list[Cell], variants: list[str], folder: Path) -> str:
    """How long what is missing will take, from the speed of one small product of each dtype."""
    seconds, missing = 0.0, 0
    per_operation = {}
    for dtype in ("float32", "bfloat16"):
        run = three_products(*(torch.randn(size, 512).to(getattr(torch, dtype)) for size in (256, 8000)))
        run()
        per_operation[dtype] = clock(run, "cpu") / (6 * 256 * 8000 * 512)
    for cell in cells:
        if part_path(folder, cell).exists():
            continue
        missing += 1
        products = 6 * cell.rows * cell.supervised * cell.vocab * cell.width * per_operation[cell.dtype]
        calls = [products * TYPICAL.get(variant, (2.0, 2.0))[cell.dtype == "bfloat16"] for variant in variants]
        times = [max(3, min(9, int(8 / call))) + 1 if call < 3 else int(call <= 8) for call in calls]
        seconds += 10 + 1.5 * products + sum(call * (1 + count) for call, count in zip(calls, times, strict=True)) + max(times) * products
    return f"{missing} shapes to measure, about {seconds / 60:.0f} minutes on an idle machine; parts in {folder}"


if __name__ == "__main__":
    raise SystemExit(main())
