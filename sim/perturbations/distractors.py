"""Distractors: coloured shapes on the table that are drawn and are nothing else, so that the simulation stays as it was."""

import numpy as np

from sim.boxes import Boxes
from sim.environment import Environment
from sim.perturbations.effect import Effect, arm_of
from sim.rendering import Decoration, Renderer

MOST = 12
AROUND = 0.12  # m beyond the rectangle in which the things stand
GAP = 0.02  # m between a distractor and a thing, and below the gripper
SIZES = (0.015, 0.04)  # m, half the width of a shape
SHAPES = ("box", "sphere", "cylinder")
TRIES = 200


class Distractors(Effect):
    """Magnitude: how many. The shapes of a smaller number are among those of a larger one."""

    def __init__(self, magnitude: float) -> None:
        super().__init__(magnitude)
        self._renderer: Renderer | None = None

    def undo(self) -> None:
        if self._renderer is not None:
            self._renderer.decorations, self._renderer = (), None

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        self._renderer = arm_of(environment, "distractors").renderer
        self._renderer.decorations = draw_shapes(environment, generator)[: int(self.magnitude)]


def draw_shapes(environment: Environment, generator: np.random.Generator) -> list[Decoration]:
    """Up to MOST shapes beside the things and the hand, on what the lowest thing stands on, clear of goal regions too."""
    world = environment.world()
    boxes = [body.parts for body in world.bodies.values()] + [region.box for region in world.regions.values()]
    floor = min(body.parts.bottom for body in world.bodies.values())
    centres = np.array([body.position_w[:2] for body in world.bodies.values()])
    taken = [rectangle(box) for box in boxes]
    hand = world.gripper_position_w[:2]
    taken.append(np.array([hand - 0.05, hand + 0.05]))
    shapes: list[Decoration] = []
    for _ in range(TRIES):
        half = generator.uniform(*SIZES, 3)
        middle = generator.uniform(centres.min(axis=0) - AROUND, centres.max(axis=0) + AROUND)
        shape, turn, colour = generator.choice(SHAPES), generator.uniform(-np.pi, np.pi), generator.uniform(0.05, 1.0, 3)
        if shape == "sphere":
            half[:] = half[0]
        elif shape == "cylinder":
            half[1] = half[0]
        reach = np.hypot(half[0], half[1]) + GAP
        if any((middle + reach > low).all() and (middle - reach < high).all() for low, high in taken):
            continue
        taken.append(np.array([middle - reach, middle + reach]))
        cosine, sine = np.cos(turn), np.sin(turn)
        rotation = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])
        shapes.append(Decoration(str(shape), half, np.append(middle, floor + half[2]), rotation, np.append(colour, 1.0)))
        if len(shapes) == MOST:
            break
    return shapes


def rectangle(boxes: Boxes) -> np.ndarray:
    """Lowest and highest x and y of some boxes. [2, 2] m"""
    spans = [boxes.span(axis) for axis in np.eye(3)[:2]]
    return np.array([[low.min() for low, _ in spans], [high.max() for _, high in spans]])
