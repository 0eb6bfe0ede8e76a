"""What a calibration lowers: seven terms on embeddings, each with a weight; the inner attack raises the same terms.

z = g(x + d) is the calibrated embedding of an attacked sample, z0 = f(x) the frozen one of the clean sample, c the centers,
t the temperature (the inverse of the logit scale, sharp). Formulas after arXiv 2505.11895's three objectives (its text gives
no weights, so these are ours), FARE (arXiv 2402.12336) and Mao, Mohri and Zhong (arXiv 2304.07288).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from multimodal.bind.classifier import center_logits

ATTACKED = ("cross_entropy", "l2", "info_nce", "consistency", "comp_sum")  # terms that read z


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms; 0 switches one off."""

    cross_entropy: float = 1.0  # -log softmax(<z, c> / t) of the label: fixed centers
    l2: float = 0.25  # ||z - z0||^2: clean to adversarial
    info_nce: float = 0.25  # -log softmax over the batch's z0 of the sample's own: clean against adversarial
    clean_anchor: float = 0.5  # ||g(x) - z0||^2: keeps the clean embedding where it was
    clean_cross_entropy: float = 4.0  # the label's again, of g(x): keeps clean accuracy (docs/log.md)
    consistency: float = 0.0  # 1 - <z, frozen embedding of the partner modality's clean sample>
    comp_sum: float = 0.0  # smooth adversarial comp-sum loss: clean loss + how far an attack moves the margins
    comp_sum_tau: float = 1.0  # 1: logistic; between 1 and 2: generalised cross-entropy
    comp_sum_smoothness: float = 0.1  # weight of the movement of the margins, which are as large as the logit scale
    nce_temperature: float = 0.1
    temperature: float | None = None  # of the centers' softmax; default: one over the encoder's logit scale

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in (*ATTACKED, "clean_anchor", "clean_cross_entropy")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"Objective weights are {weights}; they must be 0 or more, and one of them above 0.")
        if not 0 < self.comp_sum_tau < 2:
            raise ValueError(f"objective.comp_sum_tau is {self.comp_sum_tau}; expected a number in (0, 2).")

    @property
    def is_attacked(self) -> bool:
        """Some term reads attacked embeddings."""
        return any(getattr(self, name) for name in ATTACKED)


NAMED = {
    "ce": ObjectiveConfig(cross_entropy=1, l2=0, info_nce=0, clean_anchor=0, clean_cross_entropy=0),
    "l2": ObjectiveConfig(cross_entropy=0, l2=1, info_nce=0, clean_anchor=0, clean_cross_entropy=0),
    "nce": ObjectiveConfig(cross_entropy=0, l2=0, info_nce=1, clean_anchor=0, clean_cross_entropy=0),
    "comp_sum": ObjectiveConfig(cross_entropy=0, l2=0, info_nce=0, clean_anchor=0, clean_cross_entropy=0, comp_sum=1),
    "combined": ObjectiveConfig(),
    "robust": ObjectiveConfig(l2=0.5, info_nce=0.5, clean_cross_entropy=2.0),  # leans to robustness: some clean accuracy for more of it
    "gentle": ObjectiveConfig(clean_cross_entropy=12.0),  # the other way, for a sensor whose classes an attack makes truly alike
    "consistent": ObjectiveConfig(consistency=0.5),
}


@dataclass(frozen=True)
class Targets:
    """What the terms compare with, for one batch."""

    labels: Tensor  # int64 [B]
    frozen: Tensor  # [B, D], z0
    centers: Tensor  # [C, D] or [C, K, D]
    scale: float  # 1 / t
    partner: Tensor | None = None  # [B, D], frozen embeddings of another modality


def attacked_loss(embeddings: Tensor, clean: Tensor | None, targets: Targets, config: ObjectiveConfig) -> Tensor:
    """The weighted terms on attacked embeddings [B, D] -> [B]; `clean` [B, D]: g(x), read by comp_sum only.

    Raises ValueError if a term lacks its partner.
    """
    total = embeddings.new_zeros(len(embeddings))
    if config.cross_entropy:
        logits = center_logits(embeddings, targets.centers, targets.scale)
        total = total + config.cross_entropy * F.cross_entropy(logits, targets.labels, reduction="none")
    if config.l2:
        total = total + config.l2 * (embeddings - targets.frozen).square().sum(1)
    if config.info_nce:
        total = total + config.info_nce * info_nce(embeddings, targets.frozen, targets.labels, config.nce_temperature)
    if config.consistency:
        if targets.partner is None:
            raise ValueError("objective.consistency needs a second modality of the same samples: give --partner=MODALITY.")
        total = total + config.consistency * (1 - (embeddings * targets.partner).sum(1))
    if config.comp_sum:
        moved = margins(embeddings, targets) - margins(clean, targets)
        # the root of a sum of squares has no gradient at zero, where an attack begins
        total = total + config.comp_sum * config.comp_sum_smoothness * (moved.square().sum(1) + 1e-12).sqrt()
    return total


def clean_loss(clean: Tensor, targets: Targets, config: ObjectiveConfig) -> Tensor:
    """The weighted terms on clean calibrated embeddings [B, D] -> [B]."""
    total = config.clean_anchor * (clean - targets.frozen).square().sum(1)
    nll = F.cross_entropy(center_logits(clean, targets.centers, targets.scale), targets.labels, reduction="none")
    total = total + config.clean_cross_entropy * nll
    if config.comp_sum:
        order = config.comp_sum_tau - 1
        total = total + config.comp_sum * (nll if order == 0 else -torch.expm1(-order * nll) / order)
    return total


def info_nce(embeddings: Tensor, frozen: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Each attacked embedding against the batch's clean ones; others of its own class are no negatives. [B]"""
    scores = embeddings @ frozen.T / temperature
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = (labels[:, None] == labels[None]) & ~own
    return F.cross_entropy(scores.masked_fill(same, -torch.inf), torch.arange(len(labels), device=labels.device), reduction="none")


def margins(embeddings: Tensor, targets: Targets) -> Tensor:
    """The label's logit less every class's: [B, C] (its own is 0)."""
    logits = center_logits(embeddings, targets.centers, targets.scale)
    return logits.gather(1, targets.labels[:, None]) - logits


def named_objective(name: str) -> ObjectiveConfig:
    """Raises ValueError listing the names."""
    if name not in NAMED:
        weights = [field.name for field in fields(ObjectiveConfig)]
        raise ValueError(f"No objective {name!r}; there are {sorted(NAMED)}, or set the weights: {weights}.")
    return NAMED[name]
