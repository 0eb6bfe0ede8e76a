"""A graph against the module it came from: the same inputs through both, every output's distance within its limit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch

from multimodal.onnx_runner import OnnxRunner
from multimodal.onnx_writer import PACKAGES, OnnxGraph, write_graph

MAX_ABS = 1e-4  # float32: any output of a graph
COSINE = 0.999  # lower precisions: every output of a graph


@dataclass(frozen=True)
class GraphParity:
    """One output of one graph on one batch."""

    graph: str
    output: str
    batch: str  # random, or real: of a data set
    max_abs: float
    cosine: float


def write_graphs(graphs: Sequence[OnnxGraph], folder: Path, precision: str) -> dict[str, Any]:
    """Write each; name -> file, inputs and outputs with dtype and shape, as manifests hold them."""
    written = {}
    for graph in graphs:
        path = write_graph(graph, folder, precision)
        runner = OnnxRunner(path)
        ports = {"inputs": runner.inputs, "outputs": runner.outputs}
        written[graph.name] = {"file": path.name} | {kind: [asdict(port) for port in some] for kind, some in ports.items()}
    return written


@torch.inference_mode()
def compare_graph(
    graph: OnnxGraph, runner: OnnxRunner, values: Mapping[str, np.ndarray], batch: str
) -> tuple[list[GraphParity], dict[str, np.ndarray]]:
    """Distances of every output on one batch, and the module's own outputs, which the next graph is fed."""
    result = graph.module(*(torch.from_numpy(values[name]) for name in graph.inputs))
    tensors = result if isinstance(result, tuple) else (result,)
    wanted = {name: tensor.numpy() for name, tensor in zip(graph.outputs, tensors, strict=True)}
    got = runner.run({port.name: values[port.name].astype(port.dtype) for port in runner.inputs})
    return [GraphParity(graph.name, name, batch, *distance(wanted[name], got[name])) for name in graph.outputs], wanted


def distance(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Largest |difference| and cosine; a result that is not finite is infinitely far."""
    a, b = wanted.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    if a.shape != b.shape or not np.isfinite(b).all():
        return float("inf"), -1.0
    norm = np.sqrt((a @ a) * (b @ b))
    return float(np.abs(a - b).max(initial=0.0)), float(a @ b / norm) if norm > 0 else float(a @ a == b @ b)


def graph_failures(parts: Sequence[GraphParity], precision: str) -> list[str]:
    """What is beyond its limit, in words."""
    failed = []
    for part in parts:
        name = f"{part.graph}: {part.output} ({part.batch})"
        if precision == "float32" and not part.max_abs <= MAX_ABS:
            failed.append(f"{name} is {part.max_abs:.1e} off, allowed {MAX_ABS:.0e}")
        if precision != "float32" and not part.cosine >= COSINE:
            failed.append(f"{name} has cosine {part.cosine:.5f}, needed {COSINE}")
    return failed


def print_graphs(parts: Sequence[GraphParity], precision: str) -> None:
    """The worst output of every graph."""
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "worst output", "batch", "max |difference|", "lowest cosine", title=f"{precision} against torch")
    for name in dict.fromkeys(part.graph for part in parts):
        own = [part for part in parts if part.graph == name]
        worst = max(own, key=lambda part: part.max_abs)
        lowest = min(part.cosine for part in own)
        table.add_row(name, worst.output, worst.batch, f"{worst.max_abs:.1e}", f"{lowest:.6f}")
    Console().print(table)


def export_versions() -> dict[str, str | None]:
    """Of Python, torch and what writes graphs."""
    found: dict[str, str | None] = {"python": python_version()}
    for package in ("torch", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
