"""A torch module with named inputs, outputs and dynamic axes -> an ONNX file in float32, float16 or int8."""

import ast
import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.config import check_choice

OPSET = 18  # what torch's exporter writes without a conversion; onnxruntime has read it since 1.14
PRECISIONS = ("float32", "float16", "int8")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes a node's modules


@dataclass(frozen=True)
class OnnxGraph:
    """What to export. The module is called with the inputs in order and returns one tensor, or a tuple in output order."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]  # examples; a dynamic axis must be at least 2 long in them
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]  # input -> axis -> the name of its length; equal names are equal lengths
    sensitive: tuple[str, ...] = ()  # ends of names of modules whose linear layers int8 leaves in float32


def write_graph(graph: OnnxGraph, folder: Path, precision: str = "float32") -> Path:
    """Write folder / NAME.onnx (weights beyond 2 GB in a file beside it) and return its path.

    float16 needs a module that is in half precision already, see `halved`; int8 is made from float32 by onnxruntime: the
    matrices of linear layers per output channel, activations as they come, convolutions left alone.
    Raises ValueError for an unknown precision, or naming the package that is missing or the axis that the module has fixed.
    """
    check_choice("export", "precision", precision, PRECISIONS)
    check_packages()
    path = folder / f"{graph.name}.onnx"
    with _quiet(), torch.no_grad():
        program = trace(graph, strict=False)
        if fixed_axes(graph, program):
            program = trace_strictly(graph) or program
    check_dynamic(graph, program)
    divide_by_roots(program.model.graph)
    nodes = list(program.model.graph.all_nodes())
    spared = [node.name for node in nodes if _scope(node).endswith(graph.sensitive)]
    for node in nodes:
        node.metadata_props.clear()  # stack traces among them, with the paths of this machine
    program.save(path)
    if precision == "int8":
        quantise(path, spared)
    return path


def trace(graph: OnnxGraph, *, strict: bool) -> Any:
    """The graph as torch.onnx gives it.

    strict: torch reads the module's code instead of running it, which keeps len(tensor) a dynamic length.
    """
    lengths = {name: torch.export.Dim(name) for axes in graph.dynamic.values() for name in axes.values()}
    shapes = [{axis: lengths[name] for axis, name in graph.dynamic.get(key, {}).items()} for key in graph.inputs]
    module, given, dynamic = _Listed(graph.module.eval()), (list(graph.inputs.values()),), (shapes,)
    names = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
    if strict:
        module, given, dynamic = torch.export.export(module, given, dynamic_shapes=dynamic, strict=True), (), None
    return torch.onnx.export(module, given, dynamo=True, dynamic_shapes=dynamic, opset_version=OPSET, verbose=False, **names)


def trace_strictly(graph: OnnxGraph) -> Any | None:
    """`trace` with strict=True; None if torch cannot read the module's code."""
    try:
        return trace(graph, strict=True)
    except RuntimeError:  # dynamo's errors and torch.onnx's
        return None


def fixed_axes(graph: OnnxGraph, program: Any) -> list[str]:
    """Axes that should be dynamic and have the example's length: torch's exporter says nothing then."""
    return [
        f"axis {axis} ({name}) of {value.name}"
        for value in program.model.graph.inputs
        for axis, name in graph.dynamic.get(value.name, {}).items()
        if isinstance(value.shape[axis], int)
    ]


def check_dynamic(graph: OnnxGraph, program: Any) -> None:
    """Raise ValueError naming the axes that came out fixed."""
    fixed = fixed_axes(graph, program)
    if fixed:
        raise ValueError(
            f"{graph.name}: {', '.join(fixed)} came out fixed. The module takes that length as a number somewhere (a loop, "
            "len, int); write it with tensor operations."
        )


def divide_by_roots(graph: Any) -> None:
    """x * (1 / sqrt(y)), as torch writes a norm, becomes x / sqrt(y), in place: onnxruntime makes one operator of a norm
    written so."""
    for node in list(graph):
        root = node.inputs[0] if node.op_type == "Reciprocal" else None
        if root is None or root.producer() is None or root.producer().op_type != "Sqrt":
            continue
        for user, place in list(node.outputs[0].uses()):
            if user.op_type == "Mul":
                factor = user.inputs[1 - place]
                user.op_type = "Div"
                user.replace_input_with(0, factor)
                user.replace_input_with(1, root)
        if not node.outputs[0].uses():
            graph.remove(node, safe=True)


def quantise(path: Path, spared: Sequence[str] = ()) -> None:
    """Replace the weights of linear layers by int8, one scale per output channel; activations are scaled at run time.

    spared: names of nodes that stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    beside = path.with_name(path.name + ".data")  # the weights of a large model, found by this name in the model's folder
    with tempfile.TemporaryDirectory(dir=path.parent) as aside, _quiet():
        whole, is_large = Path(aside) / path.name, beside.exists()
        path.rename(whole)
        if is_large:
            beside.rename(whole.with_name(beside.name))
        quantize_dynamic(
            whole,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(spared),
            use_external_data_format=is_large,
        )


def halved(model: nn.Module) -> nn.Module:
    """A copy in float16. Buffers that no checkpoint holds stay as they are: they are tables of angles and frequencies,
    whose rounding would grow with the position."""
    model = copy.deepcopy(model)
    tables = [
        (module, name, getattr(module, name)) for module in model.modules() for name in module._non_persistent_buffers_set
    ]
    model.half()
    for module, name, table in tables:
        setattr(module, name, table)
    return model


def check_packages() -> None:
    """Raise ValueError naming what is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX export needs {', '.join(missing)}: pip install 'remask[export]' (or `make` in a checkout).")


def _scope(node: Any) -> str:
    """Dotted name of the module that a node was made in; "" where the exporter does not say."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))  # from the whole model down to the operator
    return scopes[-2] if len(scopes) > 1 else ""


class _Listed(nn.Module):
    """Takes its inputs as one list, so that any number of them can be named."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return self.module(*inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what exporter and quantiser say about themselves (other packages' operators, names of equal lengths), and
    operators that only torch has."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's fused inference operator has no ONNX counterpart
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(is_fast)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
