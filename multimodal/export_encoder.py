"""An encoder, its calibrated head and merged adapters -> one ONNX graph, behind a gate (`vla export --encoder.factory`).

    encoder   inputs [B, *shape] in the box -> embedding [B, dimension], unit vectors, float32

A module of images becomes an encoder by `TowerEncoder`. Adapters that are parametrizations (torch.nn.utils.parametrize) are
merged in a copy: the graph holds the weights that the layers read, and the gate compares it with the module as it was.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from multimodal.bind.interface import Box, ModalityEncoder, check_inputs
from multimodal.checkpoint import replaced_folder
from multimodal.onnx_compare import GraphParity, compare_graph, export_versions, graph_failures, print_graphs, write_graphs
from multimodal.onnx_encoder import EncoderManifest, load_onnx_encoder
from multimodal.onnx_folder import check_new_folder, file_hashes
from multimodal.onnx_writer import OPSET, OnnxGraph, check_packages, halved


@dataclass(frozen=True)
class EncoderExport:
    """What to export; a factory named on the command line returns one."""

    encoder: ModalityEncoder  # in eval mode
    examples: Tensor  # valid inputs [B, *shape]; the gate compares embeddings of these
    head: nn.Module | None = None  # calibrated: embedding [B, dimension] -> [B, any width]
    source: Mapping[str, Any] = field(default_factory=dict)  # for the manifest: checkpoint, data, results


class TowerEncoder(nn.Module):
    """A ModalityEncoder made of any module of images: its class vector, or the mean of its tokens or feature map."""

    def __init__(
        self, tower: nn.Module, box: Box, dimension: int, *, modality: str = "image", logit_scale: float = 100.0,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0), std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        """tower: [B, 3, H, W], normalised by mean and std -> [B, D], [B, P, D] or [B, D, h, w]. dimension: D."""
        super().__init__()
        self.tower, self.box, self.dimension = tower, box, dimension
        self.modality, self.logit_scale = modality, logit_scale
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, 3, H, W] in the box -> unit vectors [B, dimension]."""
        found = self.tower((inputs - self.mean) / self.std)
        if found.ndim > 2:
            found = found.mean(1) if found.ndim == 3 else found.flatten(2).mean(2)
        return F.normalize(found, dim=-1)


class EmbeddingGraph(nn.Module):
    """Encoder and head as one module; its output has unit length in float32, whatever precision computes it."""

    def __init__(self, encoder: ModalityEncoder, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        if not isinstance(encoder, nn.Module):  # its modules count as ours: cast, copied and merged with the rest
            self.parts = nn.ModuleList(value for value in vars(encoder).values() if isinstance(value, nn.Module))

    def forward(self, inputs: Tensor) -> Tensor:
        kinds = [parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()]
        inputs = inputs.to(kinds[0]) if inputs.is_floating_point() and kinds else inputs
        embedding = self.encoder.embed(inputs)
        if self.head is not None:
            embedding = self.head(embedding)
        return F.normalize(embedding.float(), dim=-1)


@dataclass(frozen=True)
class EncoderParity:
    """What the gate measured."""

    precision: str
    graphs: tuple[GraphParity, ...]

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit, in words; [] if the export passes."""
        return graph_failures(self.graphs, self.precision)


def export_encoder(asked: EncoderExport, output: Path, precision: str = "float32") -> EncoderParity:
    """Write the folder if the gate passes. Raises ValueError saying what failed, and then leaves what was there."""
    check_packages()
    check_new_folder(output)
    check_export(asked)
    reference = EmbeddingGraph(asked.encoder, asked.head).eval()
    with replaced_folder(output) as folder:
        manifest = write_encoder(asked, reference, folder, precision)
        exported = load_onnx_encoder(folder)
        graph = encoder_graph(reference, asked.examples)
        batches = {"random": random_inputs(asked), "real": asked.examples, "one": asked.examples[:1]}
        parts = [
            row
            for name, inputs in batches.items()
            for row in compare_graph(graph, exported.graph, {"inputs": inputs.numpy()}, name)[0]
        ]
        parity = EncoderParity(precision, tuple(parts))
        print_graphs(parity.graphs, precision)
        if parity.failures:
            name = f"{asked.encoder.modality} encoder {type(asked.encoder).__name__}"
            raise ValueError(f"the {precision} export is not the {name}: {'; '.join(parity.failures)}.")
        replace(manifest, parity=asdict(parity)).save(folder)
    return parity


def write_encoder(asked: EncoderExport, reference: EmbeddingGraph, folder: Path, precision: str) -> EncoderManifest:
    """The graph and a manifest without parity; the folder exists."""
    merged, names = merge_adapters(reference)
    module = halved(merged) if precision == "float16" else merged
    graphs = write_graphs([encoder_graph(module, asked.examples)], folder, precision)
    with torch.no_grad():
        dimension = reference(asked.examples[:1]).shape[1]
    encoder = asked.encoder
    manifest = EncoderManifest(
        precision=precision,
        opset=OPSET,
        modality=encoder.modality,
        dimension=dimension,
        shape=list(asked.examples.shape[1:]),
        box=asdict(encoder.box),
        logit_scale=float(encoder.logit_scale),
        adapters=[*names, *([] if asked.head is None else [f"head {type(asked.head).__name__}"])],
        graphs=graphs,
        files=file_hashes(folder),
        source=dict(asked.source),
        versions=export_versions(),
        parity={},
    )
    manifest.save(folder)
    return manifest


def check_export(asked: EncoderExport) -> None:
    """Raise ValueError for what is no encoder in eval mode with at least two valid examples."""
    encoder = asked.encoder
    if not isinstance(encoder, ModalityEncoder):
        wanted = ("modality", "dimension", "box", "logit_scale", "embed")
        lacking = [name for name in wanted if not hasattr(encoder, name)]
        raise ValueError(
            f"{type(encoder).__name__} is no ModalityEncoder: it lacks {', '.join(lacking)} (multimodal/bind/interface.py). "
            "Wrap a module of images in multimodal.export_encoder.TowerEncoder."
        )
    if len(asked.examples) < 2:
        raise ValueError(f"The gate needs at least 2 examples; got {list(asked.examples.shape)}.")
    modules = [module for module in (encoder, asked.head) if isinstance(module, nn.Module)]
    if any(module.training for module in modules):
        raise ValueError(f"The {encoder.modality} encoder or its head is in training mode; call .eval() first.")
    check_inputs(encoder.box, encoder.modality, asked.examples)


def encoder_graph(module: EmbeddingGraph, examples: Tensor) -> OnnxGraph:
    return OnnxGraph("encoder", module, {"inputs": examples[:2]}, ("embedding",), {"inputs": {0: "batch"}})


def merge_adapters(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy whose parametrized weights are plain ones, and their names. The module stays as it is.

    Not parametrize.remove_parametrizations: that edits the layer's class, which copies of the layer share.
    """
    merged, names = copy.deepcopy(module), []
    for name, layer in list(merged.named_modules()):
        if not parametrize.is_parametrized(layer):
            continue
        weights = {part: getattr(layer, part).detach().clone() for part in layer.parametrizations}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for part, weight in weights.items():
            layer.register_parameter(part, nn.Parameter(weight, requires_grad=False))
            names.append(f"{name}.{part}")
    return merged, names


def random_inputs(asked: EncoderExport, count: int = 3) -> Tensor:
    """Uniform in the box where it is finite, else the examples' own values in another order."""
    box, examples, generator = asked.encoder.box, asked.examples, np.random.default_rng(0)
    shape = (count, *examples.shape[1:])
    if not np.isfinite([box.low, box.high]).all():
        return torch.from_numpy(generator.choice(examples.numpy().ravel(), shape))
    if not examples.is_floating_point():
        return torch.from_numpy(generator.integers(int(box.low), int(box.high) + 1, shape)).to(examples.dtype)
    return torch.from_numpy(generator.uniform(box.low, box.high, shape)).to(examples.dtype)
