"""Gradient attacks in any box: PGD (Madry et al., arXiv 1706.06083) and Auto-PGD (Croce and Hein, arXiv 2003.01690).

They train calibrations and attack what the library cannot (features, ranks, policies); the reference evaluation is
pyautoattack's (multimodal/bind/reference_attacks.py), and a test holds that both find the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.bind.attack_losses import AttackLoss
from multimodal.bind.ball import Ball

MOMENTUM, REDUCTION = 0.75, 0.75  # alpha and rho of the paper


@dataclass(frozen=True)
class Attacked:
    """Where an attack ended, per sample."""

    points: Tensor  # [B, *shape], in ball and box: where the margin was highest
    margin: Tensor  # [B]
    loss: Tensor  # [B], the highest loss that was met (not necessarily at `points`)

    @property
    def fooled(self) -> Tensor:
        return self.margin > 0


class _Best:
    """Keeps, per sample, the point with the highest margin and the highest loss."""

    def __init__(self, points: Tensor, loss: Tensor, margin: Tensor) -> None:
        self.points, self.margin, self.loss = points.clone(), margin.clone(), loss.clone()

    def take(self, points: Tensor, loss: Tensor, margin: Tensor) -> None:
        better = margin > self.margin
        self.points[better], self.margin[better] = points[better], margin[better]
        self.loss = torch.maximum(self.loss, loss)

    def attacked(self) -> Attacked:
        return Attacked(self.points, self.margin, self.loss)


def pgd(
    loss: AttackLoss, ball: Ball, *, steps: int, generator: torch.Generator, step_size: float | None = None, restarts: int = 1
) -> Attacked:
    """Fixed steps from random points of the ball; the best of all points met, the center among them.

    step_size: in the box's unit; default 2 radius / steps, which can cross the ball. With radius 0 the result is the center.
    """
    best = _start(loss, ball)
    size = 2 * ball.radius / max(steps, 1) if step_size is None else step_size
    for _ in range(restarts if ball.radius > 0 else 0):
        points = ball.random_point(generator)
        for _ in range(steps):
            gradient, value, margin = gradient_of(loss, points)
            best.take(points, value, margin)
            points = ball.ascend(points, gradient, size)
        best.take(points, *_values(loss, points))
    return best.attacked()


def pgd_last(loss: Callable[[Tensor], Tensor], ball: Ball, *, steps: int, generator: torch.Generator) -> Tensor:
    """The last point of one PGD run, as training takes it: no bookkeeping, one gradient a step. [B, *shape]"""
    points = ball.random_point(generator)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(points).sum(), points)[0]
        points = ball.ascend(points.detach(), gradient, 2 * ball.radius / steps)
    return points.detach()


def apgd(
    loss: AttackLoss,
    ball: Ball,
    *,
    steps: int,
    generator: torch.Generator,
    restarts: int = 1,
    start: Tensor | None = None,
) -> Attacked:
    """Auto-PGD: momentum, and the step of a sample halved at checkpoints where it oscillates or stands still.

    A halved sample goes on from its best point. start: [B, *shape], instead of a random point in the first restart.
    """
    best = _start(loss, ball)
    for restart in range(restarts if ball.radius > 0 else 0):
        first = start if start is not None and restart == 0 else ball.random_point(generator)
        _apgd_run(loss, ball, ball.project(first), steps, best)
    return best.attacked()


def _apgd_run(loss: AttackLoss, ball: Ball, points: Tensor, steps: int, best: _Best) -> None:
    per_sample = (-1, *[1] * (points.ndim - 1))
    size = torch.full((len(points),), 2 * ball.radius, device=points.device, dtype=points.dtype)
    gradient, value, margin = gradient_of(loss, points)
    best.take(points, value, margin)
    top, top_points, top_gradient = value.clone(), points.clone(), gradient.clone()
    top_before, was_halved = top.clone(), torch.ones_like(top, dtype=torch.bool)
    previous, last_value = points, value
    rises, since = torch.zeros_like(top), 0
    due = checkpoints(steps)
    for step in range(1, steps + 1):
        stepped = ball.ascend(points, gradient, size.view(per_sample))
        share = MOMENTUM if step > 1 else 1.0
        stepped = ball.project(points + share * (stepped - points) + (1 - share) * (points - previous))
        previous, points = points, stepped
        gradient, value, margin = gradient_of(loss, points)
        best.take(points, value, margin)
        rises, since = rises + (value > last_value), since + 1
        last_value = value
        higher = value > top
        top = torch.where(higher, value, top)
        top_points[higher], top_gradient[higher] = points[higher], gradient[higher]
        if step in due:
            oscillates = rises <= REDUCTION * since
            stands_still = ~was_halved & (top <= top_before)
            halve = oscillates | stands_still
            size = torch.where(halve, size / 2, size)
            points, gradient = points.clone(), gradient.clone()
            points[halve], gradient[halve] = top_points[halve], top_gradient[halve]
            was_halved, top_before = halve, top.clone()
            rises, since = torch.zeros_like(top), 0


def checkpoints(steps: int) -> set[int]:
    """Steps at which Auto-PGD judges its step size: shares 0, 0.22, then gaps that shrink by 0.03 down to 0.06 (section 3.2)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {max(1, int(share * steps)) for share in shares[1:] if share <= 1}


def gradient_of(loss: AttackLoss, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of each sample's loss at the points, the loss and the margin, all detached.

    Raises ValueError if the loss does not depend on the points differentiably, FloatingPointError if a gradient is not finite: an
    attack that follows it would be blind.
    """
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        value, margin = loss(points)
        if not value.requires_grad:
            raise ValueError("The loss has no gradient in the inputs: `embed` detaches, rounds or leaves torch somewhere; remove that.")
        gradient = torch.autograd.grad(value.sum(), points)[0]
    if not torch.isfinite(gradient).all():
        bad = (~torch.isfinite(gradient).flatten(1).all(1)).sum()
        raise FloatingPointError(f"{int(bad)} of {len(points)} input gradients are not finite; look for 0/0 or sqrt(0) in the encoder.")
    return gradient, value.detach(), margin.detach()


def _start(loss: AttackLoss, ball: Ball) -> _Best:
    return _Best(ball.center, *_values(loss, ball.center))


def _values(loss: AttackLoss, points: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return loss(points)


def worst_of(results: list[Attacked]) -> Attacked:
    """Per sample the attack with the highest margin; losses are of different kinds, so the margin stands for them."""
    points, margin = results[0].points.clone(), results[0].margin.clone()
    for result in results[1:]:
        better = result.margin > margin
        points[better], margin[better] = result.points[better], result.margin[better]
    return Attacked(points, margin, margin)
