"""Zero-shot accuracy and cross-modal retrieval, clean and attacked: what survives every attack, sample by sample."""

from collections.abc import Callable, Mapping
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

Attack = Callable[[Tensor], Tensor]  # rows of the batch, int64 [R] -> whether each is fooled, bool [R]

NAIVE = "naive"  # what a weak evaluation would have said; never part of the worst case
AUTOATTACK = "autoattack"


@dataclass(frozen=True)
class AttackSuite:
    """Which attacks judge a classifier, and how long they look."""

    steps: int = 40  # of our own Auto-PGD runs
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

        `naive` and AutoAttack see every sample, so their figures are their own. Each of the others sees what AutoAttack and
        those before it left, and its figure is what is left after it: the last one's is "worst", as if each had seen all.
        transfer: the frozen classifier; points that fool it are tried on the model. flags: takes AutoAttack's warnings.
        A sample that is wrong to begin with has survived nothing. Radius 0 attacks nothing.
        """
        with torch.no_grad():
            clean_logits = model(inputs)
        clean = clean_logits.argmax(1) == labels
        if radius == 0:
            return dict.fromkeys(("clean", NAIVE, AUTOATTACK, "worst"), clean)
        ball, generator = Ball(inputs, model.encoder.box, radius), torch.Generator().manual_seed(seed)
        naive = clean & naive_survivors(model, ball, labels, generator)
        reference = autoattack(model, inputs, labels, ball.box, radius, self.auto, seed)
        if flags is not None:
            flags.extend(reference.flags)
        left = clean & reference.survived
        survived = {"clean": clean, NAIVE: naive, AUTOATTACK: left}
        for name, attack in self.attacks(model, ball, labels, clean_logits, generator, seed, transfer).items():
            rows = left.nonzero()[:, 0]
            if len(rows):
                left = left.index_put((rows,), ~attack(rows))
            survived[name] = left
        return survived | {"worst": left}

    def attacks(
        self,
        model: Classifier,
        ball: Ball,
        labels: Tensor,
        clean_logits: Tensor,
        generator: torch.Generator,
        seed: int,
        transfer: Classifier | None = None,
    ) -> dict[str, Attack]:
        """All but AutoAttack, cheapest first.

        Random points are drawn for the whole ball, so that a sample's do not depend on who else is left; foolbox draws its own.
        """
        ranked = clean_logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
        inputs = ball.center

        def search(loss: AttackLoss, rows: Tensor) -> Attacked:
            start = ball.random_point(generator)[rows]
            return apgd(loss, ball.rows(rows), steps=self.steps, generator=generator, start=start)

        def transferred(rows: Tensor) -> Tensor:
            points = search(scaled_cross_entropy(transfer, labels[rows], inputs[rows]), rows).points
            return fools(model, points, labels[rows])

        def foolbox(rows: Tensor) -> Tensor:
            found = foolbox_pgd(model, inputs[rows], labels[rows], ball.box, ball.radius, steps=self.steps, seed=seed)
            return ~found.survived

        losses = {
            "apgd-ce": lambda rows: scaled_cross_entropy(model, labels[rows], inputs[rows]),
            "apgd-margin": lambda rows: margin_loss(model, labels[rows]),
        }
        if ranked.shape[1] >= 3:
            losses["apgd-dlr"] = lambda rows: dlr_loss(model, labels[rows])
        for place, to in enumerate(ranked.T[: min(self.targets, ranked.shape[1] - 1)]):
            losses[f"apgd-target-{place + 1}"] = lambda rows, to=to: targeted_margin_loss(model, labels[rows], to[rows])
        if self.feature:
            near = model.centers[ranked[:, 0]]
            near = near if near.ndim == 2 else near[:, 0]
            losses["feature"] = lambda rows: feature_loss(model.encoder.embed, near[rows], model, labels[rows])
        found: dict[str, Attack] = {"noise": lambda rows: noise_fools(model, ball, labels, generator, rows=rows)}
        found |= {} if transfer is None else {"transfer": transferred}
        found |= {name: lambda rows, loss=loss: search(loss(rows), rows).fooled for name, loss in losses.items()}
        return found | ({"foolbox": foolbox} if self.foolbox else {})


QUICK = AttackSuite(steps=10, targets=1, foolbox=False, auto=AutoAttackConfig(("apgd-ce", "square"), steps=10, targets=1, queries=50))


@torch.no_grad()
def fools(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """bool [B]"""
    return model(points).argmax(1) != labels


def noise_fools(
    model: nn.Module, ball: Ball, labels: Tensor, generator: torch.Generator, draws: int = 5, rows: Tensor | slice = slice(None)
) -> Tensor:
    """Whether any of some random points of the ball fools the model: bool [R], of these rows."""
    return torch.stack([fools(model, ball.random_point(generator)[rows], labels[rows]) for _ in range(draws)]).any(0)


def naive_survivors(model: Classifier, ball: Ball, labels: Tensor, generator: torch.Generator, steps: int = 10) -> Tensor:
    """The weak evaluation of published code: cross-entropy on logits of cosines / 100, fixed step = radius, last point only."""
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
