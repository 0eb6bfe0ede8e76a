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

Law = dict[str, tuple[float, float]]  # name -> error, allowed


def interpret(every: bool) -> Law:
    """Relative errors of the value, the statistics and the gradients of both Triton backends."""
    from multimodal.kernels import triton_kernels

    triton_kernels.LARGEST_BLOCK = 16
    laws: Law = {}
    for law in (fixed_shapes, drawn_shapes, statistics, gradchecks, edges, error_budget, confident_tokens, gradient_filter):
        laws |= law(every)
    return laws


def backends(dtype_bytes: int, vocab: int, **tile: int) -> dict[str, dict[str, Any]]:
    """Both backends in small blocks: chunks of seven rows, blocks of sixteen columns; tiles of sixteen by sixteen."""
    from multimodal.kernels.triton_recompute import TILES, Recompute, Tiles

    small = Tiles(**{"rows": 16, "columns": 16, "depth": 16, "slab": 32, "warps": 4, "stages": 1} | tile)
    return {
        "triton": {"backend": "triton", "logits_bytes": 7 * vocab * dtype_bytes},
        "triton_recompute": {"backend": Recompute(tiles=dict.fromkeys(TILES, small), splits=2)},
    }


def compare(law: str, features: dict[str, Any], dtype: Any, allowed: float, *, seed: int = 0, depth: int = 16, **shape: int) -> Law:
    """Value and gradients of both backends against the float64 reference; `depth` of D per multiplication."""
    from tests.test_linear_cross_entropy import loss_and_gradients, problem, relative_error

    hidden, weight, targets, options = problem(features, dtype=dtype, seed=seed, **shape)
    wide = {name: value.double() if name == "bias" else value for name, value in options.items()}
    truth = loss_and_gradients(hidden.double(), weight.double(), targets, {**wide, "backend": "reference"})
    laws: Law = {}
    for name, choice in backends(dtype.itemsize, shape["vocab"], depth=depth, slab=max(32, depth)).items():
        got = loss_and_gradients(hidden, weight, targets, {**options, **choice})
        laws[f"{name}: {law}"] = max(map(relative_error, got, truth)), allowed
    return laws


def fixed_shapes(every: bool) -> Law:
    """Three ragged blocks in every dimension at D > 512; half types; the options one by one."""
    import torch

    from tests.test_linear_cross_entropy import FEATURES

    laws = compare("float32, D > 512", {"label_smoothing": 0.1}, torch.float32, 2e-6, depth=256, rows=36, vocab=37, width=520)
    # a bfloat16 store truncates in the interpreter: twice the rounding of a device
    laws |= compare("bfloat16", {}, torch.bfloat16, 1.5e-2, rows=20, vocab=37, width=40)
    laws |= compare("float16", {}, torch.float16, 2e-3, rows=20, vocab=37, width=40)
    for feature in FEATURES if every else ("softcap", "range", "soft"):
        laws |= compare(feature, FEATURES[feature], torch.float64, 1e-12, rows=18, vocab=37, width=20)
    return laws


def drawn_shapes(every: bool) -> Law:
    """Hypothesis draws options and shapes: at least three blocks of rows, of columns and of D, the last one cut, D > 512."""
    import torch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from tests.test_linear_cross_entropy import FEATURES

    worst: Law = {}

    @given(
        rows=st.integers(33, 60).filter(lambda kept: kept % 16), vocab=st.integers(33, 80).filter(lambda columns: columns % 16),
        width=st.integers(513, 600), feature=st.sampled_from(sorted(FEATURES)), seed=st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=30 if every else 3, deadline=None, database=None)
    def draw(rows: int, vocab: int, width: int, feature: str, seed: int) -> None:
        slim = (1, vocab - 1) if feature == "slice" else None
        features = {**FEATURES[feature], **({"vocab_range": slim} if slim else {})}
        found = compare("drawn shapes", features, torch.float64, 1e-10, depth=256, rows=rows + 1, vocab=vocab, width=width, seed=seed)
        for name, (error, allowed) in found.items():
            assert error <= allowed, (name, error)
            worst[name] = max(error, worst.get(name, (0.0, 0.0))[0]), allowed

    draw()
    return worst


def statistics(every: bool) -> Law:
    """The four statistics themselves, under a range and a temperature per row."""
    from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
    from tests.test_linear_cross_entropy import FEATURES, problem, relative_error

    laws: Law = {}
    hidden, weight, targets, options = problem({**FEATURES["range"], "temperature": "rows"}, rows=18, vocab=50, width=3)
    for name, choice in backends(8, 50).items():
        want, got = (
            linear_cross_entropy(hidden, weight, targets, **options, return_stats=True, **each)
            for each in ({"backend": "reference"}, choice)
        )
        laws[f"{name}: statistics"] = max(map(relative_error, got[:4], want[:4])), 1e-12
    return laws


def gradchecks(every: bool) -> Law:
    """float64 gradcheck of hidden, weight and bias, for the loss under an option and for every statistic."""
    import torch

    from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
    from tests.test_linear_cross_entropy import FEATURES, problem

    laws: Law = {}
    cases = {**(FEATURES if every else {}), "stats": {**FEATURES["range"], "temperature": "rows"}}
    for case, features in cases.items():
        hidden, weight, targets, options = problem(features, rows=5, vocab=18, width=3)
        bias = options.pop("bias", None)
        options["return_stats"] = case == "stats"
        for name, choice in backends(8, 18).items():

            def outputs(
                hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                given: tuple[torch.Tensor, dict[str, Any]] = (targets, {**options, **choice}),
            ) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
                result = linear_cross_entropy(hidden, weight, given[0], bias=bias, **given[1])
                return result if isinstance(result, torch.Tensor) else result[:4]

            inputs = [None if each is None else each.clone().requires_grad_() for each in (hidden, weight, bias)]
            exact = torch.autograd.gradcheck(outputs, inputs, nondet_tol=1e-10, fast_mode=True, raise_exception=False)
            laws[f"{name}: float64 gradcheck, {case}"] = 0.0 if exact else 1.0, 0.5
    return laws


def edges(every: bool) -> Law:
    """One kept row with the last column as target; none kept; a frozen weight; the same bits twice."""
    import torch

    from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
    from tests.test_linear_cross_entropy import FEATURES, loss_and_gradients, problem, relative_error

    laws: Law = {}
    hidden, weight, targets, options = problem(FEATURES["soft"], rows=18, vocab=37, width=5)
    last, none = torch.full((18,), -100), torch.full((18,), -100)
    last[11] = 36
    for name, choice in backends(8, 37).items():
        truth = loss_and_gradients(hidden, weight, last, {"backend": "reference"})
        laws[f"{name}: one row, last column"] = max(map(relative_error, loss_and_gradients(hidden, weight, last, choice), truth)), 1e-12
        laws[f"{name}: no row"] = sum(float(each.abs().sum()) for each in loss_and_gradients(hidden, weight, none, choice)), 0.0
        twice = [loss_and_gradients(hidden, weight, targets, {**options, **choice}) for _ in range(2)]
        laws[f"{name}: deterministic"] = float(sum(not torch.equal(*pair) for pair in zip(*twice, strict=True))), 0.0
        alone = hidden.clone().requires_grad_()
        linear_cross_entropy(alone, weight, last, **choice).backward()
        laws[f"{name}: frozen weight"] = relative_error(alone.grad, truth[1]), 1e-12
    return laws


def error_budget(every: bool) -> Law:
    """Error over that of eager in the same dtype, both against float64 (bfloat16 only on a device: its stores truncate here)."""
    import torch
    import torch.nn.functional as F

    from tests.test_linear_cross_entropy import loss_and_gradients, problem, relative_error

    laws: Law = {}
    for dtype in (torch.float32, torch.float16):
        hidden, weight, targets, _ = problem({}, rows=34, vocab=50, width=24, dtype=dtype)
        truth = loss_and_gradients(hidden.double(), weight.double(), targets, {"backend": "reference"})
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets)
        eager = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        for name, choice in backends(dtype.itemsize, 50).items():
            ours = loss_and_gradients(hidden, weight, targets, choice)
            over = max(
                relative_error(got, want) - 1e-7 - 1.05 * relative_error(same, want)
                for got, same, want in zip(ours, eager, truth, strict=True)
            )
            laws[f"{name}: {dtype} error beyond eager's"] = max(over, 0.0), 0.0
    return laws


def confident_tokens(every: bool) -> Law:
    """p(target) >= 0.99: the one-hot is folded before rounding.

    In bfloat16 a device owes 3e-3; here its gradients are truncated twice, up to 8e-3 each, still below a late fold (over 2e-2)."""
    import torch
    import torch.nn.functional as F

    from tests.test_linear_cross_entropy import loss_and_gradients, relative_error

    laws: Law = {}
    for dtype, allowed in ((torch.bfloat16, 1e-2), (torch.float16, 3e-3)):
        torch.manual_seed(0)
        weight = F.normalize(torch.randn(40, 48), dim=1).to(dtype)
        targets = torch.randint(0, 40, (30,))
        hidden = (14 * weight[targets].float() + 0.05 * torch.randn(30, 48)).to(dtype)
        exact = hidden.double() @ weight.double().T
        for name, choice in backends(dtype.itemsize, 40).items():
            logits = exact.to(dtype).double() if name == "triton" else exact  # a GEMM rounds its logits; a tile does not
            assert F.cross_entropy(logits, targets, reduction="none").neg().exp().min() >= 0.99
            dz = 2**10 * (logits.softmax(1) - F.one_hot(targets, 40))  # float16 wants its loss scaled up
            got = loss_and_gradients(hidden, weight, targets, {**choice, "normalizer": 2**-10})[1:]
            errors = map(relative_error, got, (dz @ weight.double(), dz.T @ hidden.double()))
            laws[f"{name}: confident tokens, {dtype}"] = max(errors), allowed
    return laws


def gradient_filter(every: bool) -> Law:
    """What the filter drops is small, depends on probabilities and not on the size of the loss, and is everything at last."""
    import torch

    from multimodal.kernels.triton_recompute import Recompute
    from tests.test_linear_cross_entropy import loss_and_gradients, relative_error

    torch.manual_seed(0)
    tiles = backends(8, 64)["triton_recompute"]["backend"].tiles
    weight, targets = torch.randn(64, 8, dtype=torch.float64), torch.randint(0, 16, (32,))
    hidden = 2 * weight[targets]
    hidden[:, 0], weight[:16, 0], weight[16:, 0] = 1.0, 0.0, -9.0  # columns of the other three tiles are worth less than the filter

    def gradients(epsilon: float, normalizer: float) -> list[torch.Tensor]:
        backend = Recompute(tiles=tiles, filter_epsilon=epsilon)
        return [normalizer * each for each in loss_and_gradients(hidden, weight, targets, {"backend": backend, "normalizer": normalizer})[1:]]

    exact, few, many = gradients(0.0, 32.0), gradients(2**-12, 32.0), gradients(2**-12, 2.0**25)
    dropped = max(map(relative_error, few, exact))
    assert dropped > 0, "nothing was filtered: the case is too easy"
    return {
        "triton_recompute: filtered gradient": (dropped, 2**-6),
        "triton_recompute: the filter knows no scale": (max(map(relative_error, many, few)), 1e-12),
        "triton_recompute: an endless filter drops every tile": (sum(float(each.abs().sum()) for each in gradients(1e9, 32.0)), 0.0),
    }


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
            constants = {**flags, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SLAB": tile.slab, "FILTER": on}
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
