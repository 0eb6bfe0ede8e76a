"""What a run needs to go on besides the policy: optimiser moments, raw weights, their average, position. No pickle.

A run folder holds `checkpoints/000100/policy` (what the caller's `save_model` wrote), `checkpoints/000100/training_state`
and the link `checkpoints/last`. Random numbers need no state: they are a function of the position (`seed_everything`).
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.checkpoint import load_weights, read_tensors, replaced_folder, write_tensors
from multimodal.schedule import ema_decay

_TENSORS, _POSITION = "state.safetensors", "position.json"


@dataclass(frozen=True)
class Position:
    """Where a run is; with the seed it fixes the next batch and every random number."""

    step: int = 0  # optimiser steps done
    elapsed: float = 0.0  # seconds of training so far, validation, checkpoints and pauses excluded


class WeightAverage:
    """Exponential moving average, in float32, of trainable parameters and of buffers such as batch-norm statistics.

    Averaged weights with the statistics of the latest ones would be a network that never ran.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = model.state_dict(keep_vars=True)
        self.parameters = {
            name: value
            for name, value in [*model.named_parameters(), *model.named_buffers()]
            if name in saved and value.is_floating_point() and (value.requires_grad or not isinstance(value, nn.Parameter))
        }
        self.average = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after optimiser step number `step` (from 0)."""
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_([*self.average.values()], current, 1 - ema_decay(step, self.decay))

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state with the averages in their dtype; tied names stay tied, frozen weights are the model's."""
        averaged = {(p.data_ptr(), p.shape): self.average[name].to(p.dtype) for name, p in self.parameters.items()}
        return {name: averaged.get((value.data_ptr(), value.shape), value) for name, value in model.state_dict().items()}


def save_training_state(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None,
    position: Position, settings: dict[str, Any],
) -> None:  # fmt: skip
    """Write everything into the existing `folder`; `settings` are what a resumed run must share.

    Frozen parameters are left out: whoever builds the model for a resumed run gives them as before.
    """
    changing = _changing(model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name in changing}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.average.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    write_tensors(folder / _TENSORS, tensors)
    (folder / _POSITION).write_text(json.dumps({**vars(position), "settings": settings}, indent=1))


def load_training_state(
    folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None,
    settings: dict[str, Any],
) -> Position:  # fmt: skip
    """Inverse of `save_training_state`. Raises ValueError if the run had other settings, another model or no average."""
    record = json.loads((folder / _POSITION).read_text())
    changed = [
        f"{name} was {record['settings'].get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if record["settings"].get(name) != value
    ]
    if changed:
        raise ValueError(f"{folder} belongs to a run with other settings: {'; '.join(changed)}. Restore them or start anew.")
    tensors = read_tensors(folder / _TENSORS)
    load_weights(model, _under("model.", tensors), folder, only=_changing(model))
    if average is not None:
        saved = _under("average.", tensors)
        if saved.keys() != average.average.keys():
            raise ValueError(f"{folder} holds averages of other weights than the model's trainable ones. Start anew.")
        for name, value in average.average.items():
            value.copy_(saved[name])
    state = optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _under("optimizer.", tensors).items():
        index, moment = name.split(".", 1)
        weight = weights[int(index)]
        if value.shape == weight.shape:  # in the weight's memory layout: another one rounds another way
            value = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**state, "state": moments})
    return Position(record["step"], record["elapsed"])


def _changing(model: nn.Module) -> set[str]:
    """Names of the model's state without its frozen parameters."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return model.state_dict().keys() - frozen


def read_position(folder: Path) -> Position:
    """Where the run of a training state stood. Raises FileNotFoundError if the folder holds none."""
    record = json.loads((folder / _POSITION).read_text())
    return Position(record["step"], record["elapsed"])


def write_run_checkpoint(
    run: Path, position: Position, save_policy: Callable[[Path], None], save_state: Callable[[Path], None], keep: int
) -> Path:
    """Write checkpoints/STEP whole or not at all, point `last` at it, drop all but the newest `keep`. Returns the folder."""
    folder = checkpoint_folder(run, position.step)
    checkpoints = folder.parent
    with replaced_folder(folder) as temporary:
        (temporary / "training_state").mkdir()
        save_state(temporary / "training_state")
        save_policy(temporary / "policy")
    link = checkpoints / ".last.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, checkpoints / "last")
    for old in sorted(path for path in checkpoints.iterdir() if path.name.isdecimal() and path != folder)[: -keep + 1 or None]:
        shutil.rmtree(old)
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:06d}"


def last_checkpoint(run: Path) -> Path | None:
    """The folder `checkpoints/last` points at, or None."""
    link = run / "checkpoints" / "last"
    return link.resolve() if link.exists() else None


def seed_everything(generator: torch.Generator, seed: int, index: int) -> None:
    """Set `generator` and the global torch, numpy and python generators from (seed, micro-batch index)."""
    torch_seed, global_seed, numpy_seed = (int(word) for word in np.random.SeedSequence([seed, index]).generate_state(3))
    generator.manual_seed(torch_seed)
    torch.manual_seed(global_seed)
    np.random.seed(numpy_seed)
    random.seed(numpy_seed)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
