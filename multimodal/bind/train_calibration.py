"""`vla calibrate train`: a task's encoder of one modality -> a calibration, on the one training loop."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.bind.calibration import (
    CalibratedEncoder,
    CalibrationLoss,
    InnerAttackConfig,
    PlacementConfig,
    save_calibration,
)
from multimodal.bind.interface import ModalityEncoder
from multimodal.bind.objectives import ObjectiveConfig, named_objective
from multimodal.bind.task import BindTask, count_weights, trunk_of
from multimodal.schedule import TrainingConfig
from multimodal.training import train


@dataclass(frozen=True)
class CalibrationTraining(TrainingConfig):
    """How a calibration optimises. Defaults of its own class, as a command line that gives one field drops an instance's."""

    steps: int | None = 300
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    weight_decay: float = 1e-4
    beta2: float = 0.999
    ema_decay: float = 0.0
    device: str = "cpu"


@dataclass(frozen=True)
class TrainCalibrationConfig:
    """Settings of `vla calibrate train`."""

    task: str | None = None  # "module:function" that returns a multimodal.bind.task.BindTask
    task_options: dict[str, Any] = field(default_factory=dict)  # what the function is called with
    modality: str = "image"
    partner: str | None = None  # modality whose clean embeddings the consistency term pulls towards
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    objective_name: str | None = None  # of multimodal/bind/objectives.py: ce, l2, .. robust; instead of single weights
    objective: ObjectiveConfig | None = None  # single weights; default: those of `combined`
    attack: InnerAttackConfig = field(default_factory=InnerAttackConfig)
    training: CalibrationTraining = field(default_factory=CalibrationTraining)
    output_dir: Path | None = None  # default: REMASK_HOME/runs/calibration
    resume: bool = False

    def __post_init__(self) -> None:
        if self.objective_name is not None and self.objective is not None:
            raise ValueError(f"objective_name is {self.objective_name!r}, and objective.* is given too; leave one of them out.")
        if self.objective_name is not None:
            named_objective(self.objective_name)

    @property
    def terms(self) -> ObjectiveConfig:
        """What the loss weighs."""
        return self.objective or named_objective(self.objective_name or "combined")


def calibrate(config: TrainCalibrationConfig, task: BindTask, output_dir: Path) -> Path:
    """Train and return the last checkpoint's calibration folder. Raises ValueError on a task or settings that do not fit."""
    encoder = task.check(config.modality)
    if config.terms.consistency and (config.partner is None or config.partner == config.modality):
        raise ValueError(
            f"The consistency term needs --partner, another modality than {config.modality!r}; this task has {sorted(task.encoders)}."
        )
    model = CalibratedEncoder(encoder, config.placement, seed=config.training.seed)
    if model.num_trainable == 0:
        raise ValueError("Nothing to train: give --placement.head, --placement.adapters.lora_rank or --placement.adapters.tune_norms.")
    print(model.shares(task_weights(task)))
    source = CalibrationBatches(task, config.modality, config.partner, config.training.batch_size, config.training.seed)
    loss = CalibrationLoss(config.terms, config.attack, task.centers[task.seen])

    def save(folder: Path, state: dict[str, Tensor]) -> Path:
        return save_calibration(folder, model, state, {"epsilon": config.attack.epsilon, "steps": config.training.steps})

    return train(model, loss, source, config.training, output_dir, save_model=save, resume=config.resume) / "policy"


def task_weights(task: BindTask) -> int:
    """Scalars of the whole model: every tower once, and the centers."""
    towers = {id(trunk): trunk for trunk in map(trunk_of, task.encoders.values())}
    return sum(map(count_weights, towers.values())) + task.centers.numel()


class CalibrationBatches:
    """Micro-batch `index` of the endless stream: every epoch its own permutation of the training samples.

    Labels are places among the task's seen classes.
    """

    def __init__(self, task: BindTask, modality: str, partner: str | None, batch_size: int, seed: int) -> None:
        bound = task.splits["train"]
        self.inputs, self.labels = bound.inputs[modality], torch.searchsorted(task.seen, bound.labels)
        self.frozen = embed_all(task.encoders[modality], self.inputs)
        self.partner = None if partner is None else embed_all(task.check(partner), bound.inputs[partner])
        self.batch_size, self.seed = min(batch_size, len(self.labels)), seed

    def __call__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        per_epoch = len(self.labels) // self.batch_size
        epoch, place = divmod(index, per_epoch)
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**31)
        rows = torch.randperm(len(self.labels), generator=generator)[place * self.batch_size : (place + 1) * self.batch_size]
        partner = None if self.partner is None else self.partner[rows]
        return self.inputs[rows], self.labels[rows], self.frozen[rows], partner


@torch.no_grad()
def embed_all(encoder: ModalityEncoder, inputs: Tensor, batch: int = 256) -> Tensor:
    """Embeddings of all inputs, [N, D]."""
    return torch.cat([encoder.embed(part) for part in inputs.split(batch)])
