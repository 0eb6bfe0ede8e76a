"""Tiny checkpoints of every head, and their exports at the price of five graphs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from multimodal.images import ImageConfig
from multimodal.onnx_writer import OnnxGraph, write_graph
from tests.reaching import write_cache
from vla.action_head import HeadConfig
from vla.data import WindowMixture
from vla.model import VLA
from vla.onnx_graphs import STEP_KINDS
from vla.train import DatasetConfig, ModelConfig, TrainConfig, build_assets, open_windows


def write_checkpoint(folder: Path, data: Path, head: str, *, scale: float = 1.5) -> Path:
    """An untrained policy, its parameters away from the tame initialisation; all heads share the weights they have in common."""
    config = TrainConfig(
        dataset=DatasetConfig(root=data if data.exists() else write_cache(data)),
        model=ModelConfig(preset="debug", action_horizon=4, num_bins=31),
        head=HeadConfig(type=head),
        images=ImageConfig(crop=32),
    )
    assets = build_assets(config, WindowMixture(open_windows(config, held_out=False)))
    torch.manual_seed(0)
    model = VLA(replace(assets.model, slots="tokens"))
    shared = model.state_dict()
    if assets.model.slots != "tokens":
        model = VLA(assets.model)
        own = model.state_dict()
        model.load_state_dict({name: shared.get(name, value) for name, value in own.items()})
    weights = {name: value * scale if value.is_floating_point() else value for name, value in model.state_dict().items()}
    assets.save(folder, weights)
    return folder


class SharedGraphs:
    """`write_graph` that traces each kind of graph once and copies its file for policies with the same weights.

    Nothing is taken on trust: the gate compares every copy with the module it is said to come from.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.head = store, ""

    def of(self, head: str) -> Callable[[OnnxGraph, Path, str], Path]:
        self.head = head
        return self.write

    def write(self, graph: OnnxGraph, folder: Path, precision: str) -> Path:
        kind = STEP_KINDS[self.head] if graph.name == "step" else graph.name
        kept = self.store / f"{kind}-{precision}.onnx"
        if not kept.exists():
            write_graph(graph, self.store, precision).rename(kept)
        return Path(shutil.copy(kept, folder / f"{graph.name}.onnx"))
