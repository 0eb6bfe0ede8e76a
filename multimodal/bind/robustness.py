"""Zero-shot accuracy and cross-modal retrieval, clean and attacked: what survives every attack, sample by sample."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.bind.attack_losses import (
    SHARPNESS,
    AttackLoss,
    dlr_loss,
    feature_loss,
    margin_loss,
    rank_loss,
    scaled_cross_entropy,
    targeted_margin_loss,
)
from multimodal.bind.attacks import Attacked, apgd
from multimodal.bind.ball import Ball
from multimodal.bind.classifier import Classifier, center_logits
from multimodal.bind.interface import ModalityEncoder
from multimodal.bind.intervals import Share
from multimodal.bind.reference_attacks import REDUCED, AutoAttackConfig, autoattack, foolbox_pgd

NAIVE = "naive"  # what a weak evaluation would have said; never part of the worst case


@dataclass(frozen=True)
class AttackSuite:
    """Which attacks judge a classifier, and how long they look."""

    steps: int = 40  # of our own Auto-PGD runs
    restarts: int = 1
    targets: int = 3  # classes of the targeted margin, likeliest first
    auto: AutoAttackConfig = REDUCED
    foolbox: bool = True
    feature: bool = True  # feature matching towards the nearest other centers

    def run(
        self,
        model: Classifier,
        inputs: Tensor,
        labels: Tensor,
        radius: float,
        seed: int,
        transfer: Classifier | None = None,
        flags: list[str] | None = None,
    ) -> dict[str, Tensor]:
        """Who survives: attack -> bool [B], "worst" for all of them together but `naive`.

        transfer: the frozen classifier; points that fool it are tried on the model. flags: takes AutoAttack's warnings.
        A sample that is wrong to begin with has survived nothing.
        """
        box, generator = model.encoder.box, torch.Generator().manual_seed(seed)
        ball = Ball(inputs, box, radius)

        def run(loss: AttackLoss) -> Attacked:
            return apgd(loss, ball, steps=self.steps, restarts=self.restarts, generator=generator)

        with torch.no_grad():
            clean_logits = model(inputs)
        clean = clean_logits.argmax(1) == labels
        survived = {"clean": clean, NAIVE: clean & naive_survivors(model, ball, labels, generator)}
        survived["noise"] = ~noise_fools(model, ball, labels, generator)
        if transfer is not None:
            points = apgd(scaled_cross_entropy(transfer, labels, inputs), ball, steps=self.steps, generator=generator).points
            survived["transfer"] = ~fools(model, points, labels)
        survived["apgd-ce"] = ~run(scaled_cross_entropy(model, labels, inputs)).fooled
        survived["apgd-margin"] = ~run(margin_loss(model, labels)).fooled
        if clean_logits.shape[1] >= 3:
            survived["apgd-dlr"] = ~run(dlr_loss(model, labels)).fooled
        ranked = clean_logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
        for place in range(min(self.targets, clean_logits.shape[1] - 1)):
            survived[f"apgd-target-{place + 1}"] = ~run(targeted_margin_loss(model, labels, ranked[:, place])).fooled
        if self.feature:
            wanted = model.centers[ranked[:, 0]]
            wanted = wanted if wanted.ndim == 2 else wanted[:, 0]
            survived["feature"] = ~run(feature_loss(model.encoder.embed, wanted, model, labels)).fooled
        if self.auto.attacks:
            reference = autoattack(model, inputs, labels, box, radius, self.auto, seed)
            survived["autoattack"] = reference.survived
            if flags is not None:
                flags.extend(reference.flags)
        if self.foolbox:
            survived["foolbox"] = foolbox_pgd(model, inputs, labels, box, radius, steps=self.steps, seed=seed).survived
        survived = {name: clean & values for name, values in survived.items()}
        survived["worst"] = torch.stack([values for name, values in survived.items() if name != NAIVE]).all(0)
        return survived


QUICK = AttackSuite(steps=10, targets=1, foolbox=False, auto=AutoAttackConfig(("apgd-ce", "square"), steps=10, targets=1, queries=50))


@torch.no_grad()
def fools(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """bool [B]"""
    return model(points).argmax(1) != labels


def noise_fools(model: nn.Module, ball: Ball, labels: Tensor, generator: torch.Generator, draws: int = 5) -> Tensor:
    """Whether any of some random points of the ball fools the model: bool [B]."""
    return torch.stack([fools(model, ball.random_point(generator), labels) for _ in range(draws)]).any(0)


def naive_survivors(model: Classifier, ball: Ball, labels: Tensor, generator: torch.Generator, steps: int = 10) -> Tensor:
    """The weak evaluation of published code: cross-entropy on logits of cosines / 100, fixed step = radius, last point only."""
    if ball.radius == 0:
        return ~fools(model, ball.center, labels)
    points = ball.random_point(generator)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        flat = model(points) / (100 * model.scale)
        gradient = torch.autograd.grad(nn.functional.cross_entropy(flat, labels, reduction="sum"), points)[0]
        points = ball.ascend(points.detach(), gradient, ball.radius)
    return ~fools(model, points, labels)


@dataclass(frozen=True)
class Retrieval:
    """Recall at k of a query modality in a gallery of another, attacked on the query's side."""

    recall: Mapping[int, Share]


def retrieve(
    encoder: ModalityEncoder,
    inputs: Tensor,
    gallery: Tensor,
    *,
    steps_of_255: float,
    attack_steps: int,
    seed: int,
    ranks: tuple[int, ...] = (1, 5, 10),
) -> Retrieval:
    """Query i's own item is gallery row i; gallery [N, D] clean unit vectors of the other modality.

    Each rank has its own attack, which pushes that many other items past the own one; a query that some attack pushed out
    at rank k counts as missed there.
    """
    ranks = tuple(rank for rank in ranks if rank < len(gallery))
    labels = torch.arange(len(gallery), device=gallery.device)
    logits = lambda points: center_logits(encoder.embed(points), gallery, SHARPNESS)  # noqa: E731
    ball = Ball(inputs, encoder.box, encoder.box.radius(steps_of_255))
    generator = torch.Generator().manual_seed(seed)
    points = [inputs]
    if ball.radius > 0:
        for rank in ranks:
            points.append(apgd(rank_loss(logits, labels, rank), ball, steps=attack_steps, generator=generator).points)
    hit = {rank: torch.ones(len(gallery), dtype=torch.bool, device=gallery.device) for rank in ranks}
    for candidate in points:
        with torch.no_grad():
            values = logits(candidate)
        better = (values > values.gather(1, labels[:, None])).sum(1)
        for rank in ranks:
            hit[rank] &= better < rank
    return Retrieval({rank: Share(int(values.sum()), len(values)) for rank, values in hit.items()})


def share_of(survived: Tensor) -> Share:
    return Share(int(survived.sum()), len(survived))
