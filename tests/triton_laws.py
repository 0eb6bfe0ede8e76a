"""Run in a process of its own (`python -m tests.triton_laws`): Triton reads TRITON_INTERPRET once, when a kernel is decorated.

`interpret` checks the kernels on the CPU against the float64 reference and prints {law: [error, allowed]}; `compile` builds them for
sm_90 without a device and prints {kernel: {registers, spilled, shared, wgmma}}. The last line of output is the JSON."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TILE = {"rows": 16, "columns": 16, "depth": 16, "slab": 32, "warps": 4, "stages": 1}
WIDE_TILE = {**TILE, "depth": 256, "slab": 256}


def interpret(every: bool) -> dict[str, tuple[float, float]]:
    """Relative errors of the value, the statistics and the gradients of both Triton backends."""
    import torch

    from multimodal.kernels import triton_kernels, triton_recompute
    from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
    from tests.test_linear_cross_entropy import FEATURES, loss_and_gradients, problem, relative_error

    triton_kernels.LARGEST_BLOCK = 16
    laws: dict[str, tuple[float, float]] = {}
    backends: dict[str, dict[str, Any]] = {"triton": {"logits_bytes": 3 * 37 * 8}, "triton_recompute": {}}

    def compare(law: str, features: dict[str, Any], dtype: torch.dtype, allowed: float, tile: dict[str, int], **shape: int) -> None:
        triton_recompute.TILES.update({name: triton_recompute.Tiles(**tile) for name in triton_recompute.TILES})
        hidden, weight, targets, options = problem(features, dtype=dtype, **shape)
        wide = {name: value.double() if name == "bias" else value for name, value in options.items()}
        truth = loss_and_gradients(hidden.double(), weight.double(), targets, {**wide, "backend": "reference"})
        for name, budget in backends.items():
            got = loss_and_gradients(hidden, weight, targets, {**options, **budget, "backend": name})
            laws[f"{name}: {law}"] = max(map(relative_error, got, truth)), allowed

    compare("float32, three ragged blocks, D > 512", {"label_smoothing": 0.1}, torch.float32, 2e-6, WIDE_TILE, rows=36, vocab=37, width=520)
    # a bfloat16 store truncates in the interpreter: twice the rounding of a device
    compare("bfloat16", {}, torch.bfloat16, 1.5e-2, TILE, rows=20, vocab=37, width=40)
    compare("float16", {}, torch.float16, 2e-3, TILE, rows=20, vocab=37, width=40)
    for feature in FEATURES if every else ("softcap", "range", "soft"):
        compare(feature, FEATURES[feature], torch.float64, 1e-12, TILE, rows=18, vocab=37, width=20)

    triton_recompute.TILES.update({name: triton_recompute.Tiles(**TILE) for name in triton_recompute.TILES})
    hidden, weight, targets, options = problem({**FEATURES["range"], "temperature": "rows"}, rows=4, vocab=18, width=3)
    for name, budget in backends.items():
        want, got = (
            linear_cross_entropy(hidden, weight, targets, **options, return_stats=True, backend=each) for each in ("reference", name)
        )
        laws[f"{name}: statistics"] = max(map(relative_error, got[:4], want[:4])), 1e-12

        def outputs(hidden: torch.Tensor, weight: torch.Tensor, name: str = name, budget: dict[str, Any] = budget) -> tuple[torch.Tensor, ...]:
            return linear_cross_entropy(hidden, weight, targets, return_stats=True, backend=name, **budget, **options)[:4]

        inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        exact = torch.autograd.gradcheck(outputs, inputs, nondet_tol=1e-10, fast_mode=True, raise_exception=False)
        laws[f"{name}: float64 gradcheck"] = 0.0 if exact else 1.0, 0.5

    kept = triton_recompute.Recompute(filter_epsilon=1e9)
    from multimodal.kernels import linear_cross_entropy as module

    original, module.build_backend = module.build_backend, lambda *_: kept
    filtered = loss_and_gradients(hidden, weight, targets, {})
    module.build_backend = original
    laws["triton_recompute: an endless filter drops every tile"] = float(filtered[1].abs().sum() + filtered[2].abs().sum()), 0.0
    return laws


POINTERS = {"targets_ptr": "*i64", "range_ptr": "*i64", "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "logits_ptr": "*bf16"}
FLOATS = ("softcap", "label_smoothing", "z_loss", "filter_epsilon")


def compile_for_hopper(every: bool) -> dict[str, dict[str, int]]:
    """Resources of every kernel for sm_90, bfloat16: plain cross-entropy, and with every option if `every`."""
    import triton.language as tl

    from multimodal.kernels import triton_kernels, triton_recompute

    names = ("HAS_BIAS", "HAS_CAP", "HAS_RANGE", "HAS_TEMPERATURE", "HAS_MEAN", "HAS_ENTROPY")
    resources = {}
    for kind, on in (("plain", False), ("every option", True))[: 2 if every else 1]:
        flags: dict[str, Any] = {**dict.fromkeys(names, on), "ACC": tl.float32, "WIDEN": False, "PRECISION": "ieee"}
        for mode, what in enumerate(("statistics", "known gradient", "loss gradient")):
            for block, warps in triton_kernels.WARPS:
                constants = {**flags, "MODE": mode, "BLOCK": block}
                resources[f"row {what} {block}, {kind}"] = _resources(triton_kernels.row_kernel, constants, warps, 3)
        for name, tile in triton_recompute.TILES.items():
            constants = {**flags, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SLAB": tile.slab}
            kernel = getattr(triton_recompute, f"{name}_kernel")
            resources[f"{name}, {kind}"] = _resources(kernel, constants, tile.warps, tile.stages)
    return resources


def _resources(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "gradient_ptr":
            return "*bf16" if "SLAB" in kernel.arg_names else "*fp32"
        if name.endswith("_ptr"):
            return POINTERS.get(name, "*fp32")
        return "fp32" if name in FLOATS else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = [index for index, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name in ("width", "row_stride", "split_size")]
    source = ASTSource(
        kernel, signature, {name: value for name, value in constants.items() if name in signature},
        {(index,): [["tt.divisibility", 16]] for index in aligned},
    )  # fmt: skip
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    dumper = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(built.asm["cubin"])
        binary.flush()
        text = subprocess.run([dumper, "--dump-resource-usage", binary.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{field}:(\d+)", text).group(1)) for field in ("REG", "STACK"))
    return {"registers": registers, "spilled": stack, "shared": built.metadata.shared, "wgmma": built.asm["ptx"].count("wgmma.mma_async")}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    action = {"interpret": interpret, "compile": compile_for_hopper}[sys.argv[1]]
    print(json.dumps(action("every" in sys.argv)))
