"""Checks that a robustness figure must pass before anybody should believe it, as one pass / fail block.

After Carlini et al. (arXiv 1902.06705), Athalye et al. (1802.00420), Pintor et al. (2106.09947) and, for the binarisation
test, Zimmermann et al. (2206.13991). A model whose gradients are masked passes some of them and fails others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.bind.attack_losses import dlr_loss, margin_loss, scaled_cross_entropy, targeted_margin_loss
from multimodal.bind.attacks import apgd, pgd, worst_of
from multimodal.bind.ball import Ball
from multimodal.bind.classifier import Classifier
from multimodal.bind.interface import Box
from multimodal.bind.reference_attacks import AutoAttackConfig, autoattack, plane_shape, square_fits
from multimodal.bind.robustness import noise_fools

REQUIRED = (
    "epsilon 0 equals clean",
    "whole box leaves chance at most",
    "monotone in epsilon",
    "monotone in steps",
    "monotone in restarts",
    "white-box <= transfer <= noise",
    "Square beats no white-box attack",
    "no zero gradients",
    "scale of logits changes nothing",
    "binarisation test",
)
BINARISATION = 0.95  # share of certain adversarial examples that the attack must find


@dataclass(frozen=True)
class Check:
    """One of them."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class SanityBlock:
    """All of them, in order. Raises ValueError if one is missing, so that no report leaves any out."""

    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        names = tuple(check.name for check in self.checks)
        if names != REQUIRED:
            raise ValueError(f"The sanity block holds {list(names)}; a report needs {list(REQUIRED)}. Run sanity_checks.")

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def markdown(self) -> str:
        failed = [check.name for check in self.checks if not check.passed]
        head = "All sanity checks passed." if not failed else f"SANITY FAILED ({', '.join(failed)}): do not trust the figures below."
        return "\n".join([head, "", *(f"- {'pass' if c.passed else 'FAIL'}: {c.name} ({c.found})" for c in self.checks)])


@dataclass(frozen=True)
class SanityConfig:
    """How thoroughly the checks look."""

    epsilon: float = 4.0  # 255ths, at which attacks are compared
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    restarts: tuple[int, ...] = (1, 2, 4)
    queries: int = 300  # of Square
    binarised: int = 32  # samples of the binarisation test
    tolerance: float = 0.01  # share of samples by which a curve may rise, at least one sample


def sanity_checks(
    model: Classifier, frozen: Classifier, inputs: Tensor, labels: Tensor, config: SanityConfig = SanityConfig(), seed: int = 0
) -> SanityBlock:
    """Run every check on samples inputs [B, *shape]; frozen: the model that transferred attacks are made on."""
    run = _Runs(model, frozen, inputs, labels, config, seed)
    return SanityBlock((
        run.epsilon_zero(), run.whole_box(), run.monotone_epsilon(), run.monotone_steps(), run.monotone_restarts(), run.order(),
        run.square(), run.gradients(), run.scale(), run.binarisation(),
    ))  # fmt: skip


class _Runs:
    """The checks' common settings."""

    def __init__(self, model: Classifier, frozen: Classifier, inputs: Tensor, labels: Tensor, config: SanityConfig, seed: int) -> None:
        self.model, self.frozen, self.inputs, self.labels = model, frozen, inputs, labels
        self.config, self.seed, self.box = config, seed, model.encoder.box
        self.steps = max(config.steps)
        self.slack = max(1, int(config.tolerance * len(inputs)))
        with torch.no_grad():
            self.clean = model(inputs).argmax(1) == labels

    def ball(self, epsilon: float) -> Ball:
        return Ball(self.inputs, self.box, self.box.radius(epsilon))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def white_box(self, ball: Ball, model: nn.Module | None = None) -> Tensor:
        """Who survives cross-entropy, margin and targeted attacks: bool [B]."""
        model = self.model if model is None else model
        with torch.no_grad():
            ranked = model(self.inputs).scatter(1, self.labels[:, None], -torch.inf).argsort(1, descending=True)
        losses = [scaled_cross_entropy(model, self.labels, self.inputs), margin_loss(model, self.labels)]
        if ranked.shape[1] >= 3:
            losses.append(dlr_loss(model, self.labels))
            losses += [targeted_margin_loss(model, self.labels, ranked[:, place]) for place in range(2)]
        generator = self.generator()
        found = worst_of([apgd(loss, ball, steps=self.steps, generator=generator) for loss in losses])
        return self.clean & ~found.fooled

    def epsilon_zero(self) -> Check:
        """Our attacks, and the library's, which maps a box and a radius of 0 to its own and back."""
        ours = self.white_box(self.ball(0.0))
        config = AutoAttackConfig(("square",) if self.box.norm == "linf" else ("apgd-ce",), steps=self.steps, queries=10)
        theirs = autoattack(self.model, self.inputs, self.labels, self.box, 0.0, config, self.seed).survived
        passed = torch.equal(ours, self.clean) and torch.equal(theirs, self.clean)
        counts = int(ours.sum()), int(theirs.sum())
        return Check(REQUIRED[0], passed, f"{counts} (ours, library) of {int(self.clean.sum())} right ones stay")

    def whole_box(self) -> Check:
        height = self.box.high - self.box.low
        radius = height * (math.sqrt(self.inputs[0].numel()) if self.box.norm == "l2" else 1.0)
        survived = int(self.white_box(Ball(self.inputs, self.box, radius)).sum())
        classes = len(self.model.centers)
        return Check(REQUIRED[1], survived <= len(self.inputs) / classes, f"{survived} of {len(self.inputs)} survive, {classes} classes")

    def monotone_epsilon(self) -> Check:
        loss = lambda: scaled_cross_entropy(self.model, self.labels, self.inputs)  # noqa: E731
        curve = [
            int((self.clean & ~apgd(loss(), self.ball(epsilon), steps=self.steps, generator=self.generator()).fooled).sum())
            for epsilon in self.config.epsilons
        ]
        return Check(REQUIRED[2], _falls(curve, self.slack), f"survivors {curve} at {list(self.config.epsilons)} of 255")

    def monotone_steps(self) -> Check:
        ball, loss = self.ball(self.config.epsilon), scaled_cross_entropy(self.model, self.labels, self.inputs)
        curve = [int((self.clean & ~pgd(loss, ball, steps=n, generator=self.generator()).fooled).sum()) for n in self.config.steps]
        return Check(REQUIRED[3], _falls(curve, self.slack), f"survivors {curve} after {list(self.config.steps)} steps")

    def monotone_restarts(self) -> Check:
        ball, loss = self.ball(self.config.epsilon), margin_loss(self.model, self.labels)
        curve = [
            int((self.clean & ~pgd(loss, ball, steps=5, generator=self.generator(), restarts=n).fooled).sum())
            for n in self.config.restarts
        ]
        return Check(REQUIRED[4], _falls(curve, 0), f"survivors {curve} of {list(self.config.restarts)} restarts")

    def order(self) -> Check:
        ball = self.ball(self.config.epsilon)
        white = int(self.white_box(ball).sum())
        loss = scaled_cross_entropy(self.frozen, self.labels, self.inputs)
        points = apgd(loss, ball, steps=self.steps, generator=self.generator()).points
        with torch.no_grad():
            transfer = int((self.clean & (self.model(points).argmax(1) == self.labels)).sum())
        noise = int((self.clean & ~noise_fools(self.model, ball, self.labels, self.generator())).sum())
        passed = white <= transfer <= noise + self.slack
        return Check(REQUIRED[5], passed, f"survivors: white-box {white}, transfer {transfer}, noise {noise}")

    def square(self) -> Check:
        ball = self.ball(self.config.epsilon)
        left = self.white_box(ball).nonzero()[:, 0]
        if len(left) == 0:
            return Check(REQUIRED[6], True, "nobody survives the white-box attacks")
        if self.box.norm == "linf" or square_fits(plane_shape(self.inputs.shape[1:])):
            search = AutoAttackConfig(("square",), queries=self.config.queries)
            inputs, labels = self.inputs[left], self.labels[left]
            survived = autoattack(self.model, inputs, labels, self.box, ball.radius, search, self.seed).survived
            kind = f"Square, {self.config.queries} queries"
        else:
            survived = ~noise_fools(self.model, ball.rows(left), self.labels[left], self.generator(), draws=self.config.queries)
            kind = f"random search, {self.config.queries} queries (Square cannot tile these samples in l2)"
        beaten = int((~survived).sum())
        return Check(REQUIRED[6], beaten <= int(0.002 * len(self.inputs)), f"{kind} fools {beaten} of {len(left)} white-box survivors")

    def gradients(self) -> Check:
        zero = 0
        for points in (self.inputs, self.ball(self.config.epsilon).random_point(self.generator())):
            points = points.detach().clone().requires_grad_()
            value = margin_loss(self.model, self.labels)(points)[0]
            if not value.requires_grad:
                return Check(REQUIRED[7], False, "the logits do not depend on the inputs differentiably")
            gradient = torch.autograd.grad(value.sum(), points)[0].flatten(1)
            zero += int((~torch.isfinite(gradient).all(1) | (gradient == 0).all(1)).sum())
        return Check(REQUIRED[7], zero == 0, f"{zero} of {2 * len(self.inputs)} gradients are zero or not finite")

    def scale(self) -> Check:
        ball, counts = self.ball(self.config.epsilon), []
        for factor in (0.01, 1.0, 100.0):
            scaled = _Scaled(self.model, factor)
            ours = int(self.white_box(ball, scaled).sum())
            config = AutoAttackConfig(("apgd-ce",), steps=self.steps)
            theirs = int(autoattack(scaled, self.inputs, self.labels, self.box, ball.radius, config, self.seed).survived.sum())
            counts.append((ours, theirs))
        moved = max(abs(a - b) for row in counts for a, b in zip(row, counts[1], strict=True))
        return Check(REQUIRED[8], moved <= 1, f"survivors (ours, library) {counts} at 0.01, 1, 100")

    def binarisation(self) -> Check:
        rows = slice(0, self.config.binarised)
        found, by_chance, count = binarise(
            self.model.encoder.embed, self.inputs[rows], self.box, self.box.radius(self.config.epsilon), self.steps, self.generator()
        )
        tried = len(self.inputs[rows])
        if 2 * count < tried:
            return Check(REQUIRED[9], False, f"only {count} of {tried} samples could be binarised: their embeddings hardly move in the ball")
        passed = found >= BINARISATION * count and by_chance < found
        return Check(REQUIRED[9], passed, f"{found} of {count} certain adversarial examples found, {by_chance} by random search")


class _Scaled(nn.Module):
    def __init__(self, model: Classifier, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * self.model(inputs)


def _falls(curve: Sequence[int], slack: int) -> bool:
    return all(later <= earlier + slack for earlier, later in zip(curve, curve[1:], strict=False))


def binarise(
    embed: Callable[[Tensor], Tensor], inputs: Tensor, box: Box, radius: float, steps: int, generator: torch.Generator, inner: int = 200
) -> tuple[int, int, int]:
    """Adversarial examples found by the attack, found by random search with as many queries, and samples that certainly have one.

    For each sample the last layer is replaced by a linear one that separates embeddings of `inner` points well inside the ball
    (class 0) from the embedding of one point on its surface (class 1): that point is an adversarial example, so an attack
    that does not find one is at fault, not the ball. The direction is Fisher's, the threshold half way between.
    """
    weights, offsets, kept = [], [], []
    with torch.no_grad():
        for row in range(len(inputs)):
            near = Ball(inputs[row].expand(inner, *inputs.shape[1:]), box, radius / 2)
            inside = embed(near.random_point(generator)).double()
            outside = embed(Ball(inputs[row : row + 1], box, radius).surface_point(generator)).double()[0]
            spread = (inside - inside.mean(0)).T @ (inside - inside.mean(0)) / inner
            spread = spread + 1e-4 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
            if not spread.diagonal().mean() > 0:
                continue  # the embedding does not move at all
            direction = torch.linalg.solve(spread, outside - inside.mean(0))
            direction = direction / direction.norm().clamp_min(1e-30)
            highest, outer = (inside @ direction).max(), outside @ direction
            if outer > highest:
                weights.append(direction)
                offsets.append((highest + outer) / 2)
                kept.append(row)
    if not kept:
        return 0, 0, 0
    weight, offset = torch.stack(weights), torch.stack(offsets)

    def loss(points: Tensor) -> tuple[Tensor, Tensor]:
        margin = (embed(points).double() * weight).sum(1) - offset
        return margin, margin

    ball = Ball(inputs[kept], box, radius)
    found = apgd(loss, ball, steps=steps, restarts=2, generator=generator).fooled
    with torch.no_grad():
        chance = torch.stack([loss(ball.random_point(generator))[1] > 0 for _ in range(2 * steps)]).any(0)
    return int(found.sum()), int(chance.sum()), len(kept)
