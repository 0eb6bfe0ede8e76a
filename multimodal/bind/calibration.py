"""A calibrated encoder: the frozen one with a head behind it and adapters inside; saved as one folder, merged on request."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.adapters import NO_ADAPTERS, AdapterConfig, install, merged_state
from multimodal.bind.attacks import pgd_last
from multimodal.bind.ball import Ball
from multimodal.bind.interface import ModalityEncoder
from multimodal.bind.objectives import ObjectiveConfig, Targets, attacked_loss, clean_loss
from multimodal.bind.task import count_weights, trunk_of, weights_hash
from multimodal.checkpoint import load_checkpoint, load_weights, save_checkpoint
from multimodal.config import check_choice
from multimodal.training import LossTerms

FORMAT, HEADS = "remask-calibration-1", ("none", "linear", "mlp")


@dataclass(frozen=True)
class PlacementConfig:
    """Where the trainable weights are."""

    head: str = "linear"  # none | linear | mlp: on the embedding; both start as the identity
    head_width: int = 64  # of the mlp's hidden layer
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        check_choice("PlacementConfig", "head", self.head, HEADS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlacementConfig":
        """Inverse of `dataclasses.asdict`, lists taken for tuples."""
        adapters = dict(values["adapters"])
        adapters["lora_targets"] = tuple(adapters["lora_targets"])
        return cls(**{**values, "adapters": AdapterConfig(**adapters)})


@dataclass(frozen=True)
class InnerAttackConfig:
    """The attack of every training step: PGD through the whole calibrated encoder."""

    epsilon: float = 4.0  # 255ths, in the modality's unit
    steps: int = 5

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.steps < 1:
            raise ValueError(f"The inner attack has epsilon {self.epsilon}, {self.steps} steps; epsilon must be >= 0, steps >= 1.")


class ResidualHead(nn.Module):
    """z + down(gelu(up(z))), the identity at the start."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dimension, width), nn.Linear(width, dimension)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings + self.down(F.gelu(self.up(embeddings)))


class CalibratedEncoder(nn.Module):
    """A `ModalityEncoder`: a copy of the given one, frozen, with adapters in its trunk and a head on its embedding.

    At the start it embeds as the given encoder does. The trunk stays in eval mode, whatever train() says.
    """

    def __init__(self, encoder: ModalityEncoder, placement: PlacementConfig, seed: int = 0) -> None:
        super().__init__()
        self.placement = placement
        self.modality, self.dimension = encoder.modality, encoder.dimension
        self.box, self.logit_scale = encoder.box, encoder.logit_scale
        self._source = [encoder]  # in lists, so that a trunk is a submodule once, and the frozen one never
        self._encoder = [copy.deepcopy(encoder)]
        self.trunk = trunk_of(self._encoder[0]).eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapted = install(self.trunk, placement.adapters)
            self.head = _build_head(placement, self.dimension)

    def embed(self, inputs: Tensor) -> Tensor:
        embeddings = self._encoder[0].embed(inputs)
        return embeddings if isinstance(self.head, nn.Identity) else F.normalize(self.head(embeddings), dim=-1)

    forward = embed

    def train(self, mode: bool = True) -> "CalibratedEncoder":
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def source(self) -> ModalityEncoder:
        """The frozen encoder that was given."""
        return self._source[0]

    def merged(self) -> "CalibratedEncoder":
        """A calibrated encoder whose trunk holds the adapters' changes in its own weights: no cost at inference."""
        merged = CalibratedEncoder(self.source, replace(self.placement, adapters=NO_ADAPTERS))
        merged.trunk.load_state_dict(merged_state(self.trunk))
        merged.head.load_state_dict(self.head.state_dict())
        return merged.eval().requires_grad_(False)

    def shares(self, model_weights: int) -> str:
        """How much is trainable, against its tower and against a model of `model_weights` scalars."""
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        tower = count_weights(self) - trainable
        return (
            f"{self.modality}: {trainable} trainable weights, {trainable / tower:.2%} of its tower ({tower}), "
            f"{trainable / max(model_weights, 1):.2%} of the model ({model_weights})"
        )

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def _build_head(placement: PlacementConfig, dimension: int) -> nn.Module:
    if placement.head == "linear":
        head = nn.Linear(dimension, dimension)
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        return head
    return ResidualHead(dimension, placement.head_width) if placement.head == "mlp" else nn.Identity()


@dataclass(frozen=True)
class CalibrationLoss:
    """The loss step handed to the training loop: attack, then lower what the attack raised.

    A batch is (inputs [B, *shape], labels [B], frozen embeddings [B, D], partner embeddings [B, D] or None).
    """

    objective: ObjectiveConfig
    attack: InnerAttackConfig
    centers: Tensor

    def __call__(self, model: CalibratedEncoder, batch: tuple, generator: torch.Generator) -> LossTerms:
        inputs, labels, frozen, partner = batch
        temperature = self.objective.temperature
        scale = model.logit_scale if temperature is None else 1 / temperature
        targets = Targets(labels, frozen, self.centers.to(frozen), scale, partner)
        clean = model.embed(inputs)
        loss = clean_loss(clean, targets, self.objective)
        if self.objective.is_attacked:
            still = clean.detach()
            ball = Ball(inputs, model.box, model.box.radius(self.attack.epsilon))

            def raised(points: Tensor) -> Tensor:
                return attacked_loss(model.embed(points), still, targets, self.objective)

            points = pgd_last(raised, ball, steps=self.attack.steps, generator=generator)
            loss = loss + attacked_loss(model.embed(points), clean, targets, self.objective)
        drift = (clean.detach() - frozen).square().sum(1).mean()
        return LossTerms(loss.sum(), float(len(inputs)), {"drift": drift})


def save_calibration(folder: Path, model: CalibratedEncoder, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write the trainable weights alone; the encoder they belong to comes from its task."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: value for name, value in state.items() if name in names}
    of = {"modality": model.modality, "encoder": weights_hash(model.source)}
    config = {"format": FORMAT, **of, "placement": _plain(asdict(model.placement)), **facts}
    return save_checkpoint(folder, model_state=weights, config=config)


def load_calibration(folder: Path, encoder: ModalityEncoder) -> CalibratedEncoder:
    """The calibrated encoder of a folder. Raises ValueError if the folder is another's."""
    found = load_checkpoint(folder)
    if found.config.get("format") != FORMAT or found.config.get("modality") != encoder.modality:
        raise ValueError(
            f"{folder} holds {found.config.get('format')!r} for {found.config.get('modality')!r}; needed: {FORMAT!r} for "
            f"{encoder.modality!r}. Train one: vla calibrate train --modality={encoder.modality}."
        )
    wanted, given = found.config.get("encoder"), weights_hash(encoder)
    if wanted != given:
        raise ValueError(
            f"{folder} calibrates an encoder with weights {wanted}; this task's has {given}. Give the task that it was trained on "
            "(its model may have been trained on since), or calibrate again."
        )
    model = CalibratedEncoder(encoder, PlacementConfig.from_dict(found.config["placement"]))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_weights(model, found.state, folder, only=names)
    return model.eval()


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth, as YAML writes them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
