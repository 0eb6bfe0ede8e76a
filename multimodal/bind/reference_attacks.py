"""The reference evaluation, through its libraries: AutoAttack (pyautoattack) and a second opinion (foolbox).

AutoAttack works in [0, 1] on [B, C, H, W]; a modality's box is mapped there affinely and back, and what comes back is projected
once more, so that rounding cannot leave ball or box. Images keep their shape, others are laid out in two dimensions, which
matters to Square's windows only.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multimodal.bind.attack_losses import SHARPNESS
from multimodal.bind.ball import Ball
from multimodal.bind.interface import Box

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True)
class AutoAttackConfig:
    """How long AutoAttack looks; the defaults are its standard version."""

    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
    steps: int = 100  # of APGD and FAB
    targets: int = 9  # classes that a targeted attack tries, at most all others
    queries: int = 5000  # of Square
    batch: int = 250

    def __post_init__(self) -> None:
        unknown = [name for name in self.attacks if name not in ATTACKS]
        if unknown or not self.attacks:
            raise ValueError(f"AutoAttackConfig.attacks has {unknown or 'nothing'}; allowed: {list(ATTACKS)}.")

    def for_classes(self, count: int) -> tuple[str, ...]:
        """The attacks that exist for so many classes: DLR needs 3, its targeted form 4 (AutoAttack's flags_doc)."""
        allowed = {"apgd-ce", "square"} | ({"apgd-dlr", "fab-t"} if count >= 3 else set()) | ({"apgd-t"} if count >= 4 else set())
        return tuple(name for name in self.attacks if name in allowed)


REDUCED = AutoAttackConfig(attacks=("apgd-ce", "apgd-t", "square"), steps=20, targets=3, queries=200)


@dataclass(frozen=True)
class ReferenceResult:
    """What AutoAttack found."""

    points: Tensor  # [B, *shape], in ball and box; the clean sample where nothing was found
    survived: Tensor  # bool [B]: classified right at `points`, judged in the modality's own unit
    flags: tuple[str, ...]  # warnings of its own checks


def autoattack(
    logits: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, box: Box, radius: float, config: AutoAttackConfig, seed: int = 0
) -> ReferenceResult:
    """AutoAttack within `radius` (box's unit) of inputs [B, *shape].

    Its cross-entropy is handed logits at one sharpness, by a single factor for the whole set, so that the scale of a
    model's logits changes nothing.
    """
    from pyautoattack import AutoAttack

    ball = Ball(inputs, box, radius)
    unit = _UnitBox(logits, inputs, box)
    attacks = config.for_classes(unit.num_classes)
    left_out = "square" in attacks and box.norm == "l2" and not square_fits(plane_shape(unit.shape))
    if left_out:
        attacks = tuple(name for name in attacks if name != "square")
    if not attacks:
        raise ValueError(f"None of {list(config.attacks)} can run here ({unit.num_classes} classes, {box.norm}); add apgd-ce.")
    with _quiet() as flags, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reference = AutoAttack(
            unit, attacks=list(attacks), device=inputs.device, eps=radius / (box.high - box.low), norm=_NORMS[box.norm],
            seed=seed, version="custom",
        )  # fmt: skip
        reference.verbose = False
        targets = min(config.targets, unit.num_classes - 1)
        for part in (reference.apgd, reference.apgd_targeted, reference.fab):
            part.n_iter = config.steps
            part.n_restarts = 1
        for part in (reference.apgd, reference.apgd_targeted):  # derived from the number of steps in its constructor
            part.n_iter_orig, part.n_iter_2 = config.steps, max(int(0.22 * config.steps), 1)
            part.n_iter_min, part.size_decr = max(int(0.06 * config.steps), 1), max(int(0.03 * config.steps), 1)
        reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = targets
        reference.square.n_queries = config.queries
        found, _ = reference.run_standard_evaluation(unit.enter(inputs), labels, batch_size=config.batch)
    points = ball.project(unit.leave(found))
    with torch.no_grad():
        survived = logits(points).argmax(1) == labels
    if left_out:
        flags.append(f"Square is left out: in l2 the library cannot tile samples of shape {list(unit.shape)}.")
    return ReferenceResult(points, survived, tuple(dict.fromkeys(flags)))


def foolbox_pgd(
    model: nn.Module, inputs: Tensor, labels: Tensor, box: Box, radius: float, *, steps: int = 40, seed: int = 0
) -> ReferenceResult:
    """foolbox's PGD in the modality's own box; `model` gives logits and is in eval mode."""
    import foolbox

    kind = foolbox.attacks.LinfPGD if box.norm == "linf" else foolbox.attacks.L2PGD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = foolbox.PyTorchModel(model, bounds=(box.low, box.high), device=inputs.device)
        found = kind(steps=steps)(wrapped, inputs, labels, epsilons=radius)[1] if radius > 0 else inputs
    points = Ball(inputs, box, radius).project(found)
    with torch.no_grad():
        return ReferenceResult(points, model(points).argmax(1) == labels, ())


class _UnitBox(nn.Module):
    """The classifier as AutoAttack wants it: [0, 1], four dimensions, logits of one sharpness."""

    def __init__(self, logits: Callable[[Tensor], Tensor], inputs: Tensor, box: Box) -> None:
        super().__init__()
        self.logits, self.box, self.shape = logits, box, inputs.shape[1:]
        with torch.no_grad():
            clean = logits(inputs)
        self.num_classes = clean.shape[1]
        self.factor = float(SHARPNESS / clean.std(1).median().clamp_min(1e-30))

    def forward(self, points: Tensor) -> Tensor:
        return self.factor * self.logits(self.leave(points))

    def enter(self, inputs: Tensor) -> Tensor:
        unit = (inputs - self.box.low) / (self.box.high - self.box.low)
        return unit.reshape(len(inputs), *plane_shape(self.shape)).contiguous()

    def leave(self, points: Tensor) -> Tensor:
        inputs = self.box.low + points.reshape(len(points), *self.shape) * (self.box.high - self.box.low)
        return self.box.clamp(inputs)


def plane_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, H, W] for a sample: images as they are, video's frames as channels, others as near to square as divides them."""
    if len(shape) == 3:
        return tuple(shape)
    if len(shape) == 4:
        return (shape[0] * shape[1], *shape[2:])
    size = math.prod(shape)
    side = next(side for side in range(math.isqrt(size), 0, -1) if size % side == 0)
    return 1, side, size // side


def square_fits(plane: tuple[int, int, int]) -> bool:
    """Whether Square's l2 tiles, of a fifth of the height, stay inside the plane (pyautoattack 0.2, square.py: it does not ask)."""
    _, height, width = plane
    tile = height // 5
    return tile > 0 and height == width and (height - 5 * tile) // 2 + height // tile * tile <= height


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """AutoAttack's warnings as a list, instead of on the screen."""
    logger = logging.getLogger("auto-attack")
    flags: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                flags.append(record.getMessage())

    handler, propagate = Keep(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield flags
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
