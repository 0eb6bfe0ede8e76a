"""Grasping: which pinch of an object suits the scene, the way to it, closing on it, noticing a miss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sim.boxes import Boxes, separations
from sim.environment import Body, World
from sim.experts.geometry import (
    DOWN,
    HOME_ROTATION,
    MAX_OPENING,
    PAD_FAR,
    PAD_HALF_WIDTH,
    PAD_NEAR,
    TIP_LENGTH,
    angles_between,
    comfortable,
    hand_rotations,
    overreach,
    tilted,
    ramp,
    swept_boxes,
)
from sim.experts.motion import CLOSE, OPEN, is_confined, let_go, servo, travel
from sim.experts.pinches import find_pinches

SIDES = np.array([1.0, 1.0, -1.0])[:, None]  # away from the robot, to its left, to its right
ROOM = 0.004  # m, wanted around fingers and palm at a grasp
# Directions a hand may come along to an object, straight down first: it leans away from what is over or beside it.
ANY_SIDE = (DOWN, *(tilted(side, np.radians(angle)) for angle in (60, 20) for side in np.eye(3)[[0, 1, 1]] * SIDES))
LEAN = 2.0  # cost of an approach per rad from the first one
CROWDED = 1.5  # crowding from which on other approaches are tried
DROPS = (0.0, 0.03, 0.06)  # m above its place, from which a body may be let go: into a basket without the hand
DROP_COST = 5.0  # of a drop, per m
BATCH = 8  # pinches, best first, that are tested against the scene together


@dataclass(frozen=True)
class Grasp:
    """One pinch in the world."""

    position_w: np.ndarray  # [3] m, where the grip site goes
    rotation_w: np.ndarray  # [3, 3] of the hand; its z axis is the approach
    width: float  # m, of the material between the fingers
    standoff: float  # m along the approach, at which the finger tips are clear of the object

    @property
    def approach_w(self) -> np.ndarray:
        return self.rotation_w[:, 2]


def choose_grasp(
    world: World,
    body: Body,
    others: Boxes,
    *,
    approaches: Sequence[np.ndarray] = ANY_SIDE,
    shift: np.ndarray | None = None,
    drops: Sequence[float] = DROPS,
    extra_cost: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Grasp:
    """The pinch of a body with the least cost: square and deep, small turn of the wrist, room for the hand.

    others: everything else. approaches: directions the hand may come along, the favourite first. shift: where the body is to be put, as an
    offset [3] m; the hand should have room there too. drops: heights above that place, m, from one of which the body may be let
    go instead. extra_cost: of grip positions [M, 3] -> [M]. The terms in the present pose keep the choice from flipping
    between two equally good ones.
    Raises ValueError if the hand cannot grasp the shape at all.
    """
    near = others[reachable(others, body, 0.35)]
    there = None if shift is None else others[reachable(others, body, 0.35, shift)].shifted(-shift)
    shape = Boxes.single(body.half_extents) if body.shape is None else body.shape
    best, best_cost, best_crowding = None, np.inf, np.inf
    for approach in approaches:
        if best_crowding < CROWDED:
            break  # the favourites leave room enough
        pinches = find_pinches(shape, tuple((np.round(body.rotation_w.T @ approach, 1) + 0.0).tolist()))
        if not len(pinches.cost):
            continue
        positions = pinches.position @ body.rotation_w.T + body.position_w
        axes = pinches.finger_axis @ body.rotation_w.T
        rotations = comfortable(hand_rotations(approach, axes), world.gripper_rotation_w)
        cost = pinches.cost + effort(world, positions, rotations)
        cost += LEAN * np.arccos(np.clip(approach @ approaches[0], -1.0, 1.0))
        if shift is not None:
            cost += 40.0 * overreach(world.shoulder_w, positions + shift, rotations)
        if extra_cost is not None:
            cost += extra_cost(positions)
        order = np.argsort(cost)
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            if cost[batch[0]] >= best_cost:
                break
            crowded = crowding(positions[batch], rotations[batch], near)
            if there is not None:
                crowded += least_crowding(positions[batch], rotations[batch], there, drops)
            total = cost[batch] + crowded
            least = int(np.argmin(total))
            if total[least] < best_cost:
                best_cost, best_crowding, chosen = total[least], crowded[least], batch[least]
                clear = body.parts.span(-approach)[1].max() + approach @ positions[chosen] + TIP_LENGTH + 0.012
                best = Grasp(positions[chosen], rotations[chosen], float(pinches.width[chosen]), float(clear))
    if best is None:
        raise ValueError(f"The hand finds no pinch: nothing of the body at {body.position_w} fits {MAX_OPENING} m.")
    return best


def effort(world: World, positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """What it takes to bring the hand to M poses: turn from home, turn and way from where it is; less where it is. [M]"""
    turn_home, turn = angles_between(rotations, HOME_ROTATION), angles_between(rotations, world.gripper_rotation_w)
    way = np.linalg.norm(positions - world.gripper_position_w, axis=1)
    there = np.exp(-((way / 0.03) ** 2) - (turn / 0.25) ** 2)
    stretch = overreach(world.shoulder_w, positions, rotations)
    return 0.5 * turn_home + 0.3 * turn + 4.0 * way + 40.0 * stretch - 1.0 * there


def reachable(boxes: Boxes, body: Body, distance: float, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Which boxes come within about `distance` of a (shifted) body: bool [N]."""
    centre = body.position_w + shift
    reach = distance + np.linalg.norm(boxes.half_extents, axis=1)
    return np.linalg.norm(boxes.position - centre, axis=1) < reach


def crowding(positions: np.ndarray, rotations: np.ndarray, obstacles: Boxes) -> np.ndarray:
    """Cost of what is in or near the way of the fingers, of their closing and of the palm at M poses of the hand: [M].

    For fingers and palm each 0 with more than ROOM to spare, 3 when something is as deep inside, and more the deeper.
    """
    if not len(obstacles):
        return np.zeros(len(positions))
    room = separations(swept_boxes(positions, rotations), obstacles).min(axis=1).reshape(2, -1)
    return (3.0 * np.clip(0.5 - 0.5 * room / ROOM, 0.0, 1.0) + 50.0 * np.maximum(0.0, -ROOM - room)).sum(axis=0)


def least_crowding(positions: np.ndarray, rotations: np.ndarray, obstacles: Boxes, drops: Sequence[float]) -> np.ndarray:
    """Cost of letting go at M poses, or by one of `drops` (m) above them where that gives the hand room: [M].

    Without the drop a hand would rather pinch the last centimetre of a bottle than reach into a basket with it.
    """
    costs = [DROP_COST * drop + crowding(positions + [0.0, 0.0, drop], rotations, obstacles) for drop in drops]
    return np.min(costs, axis=0)


def is_between_pads(world: World, body: Body) -> bool:
    """Whether some of the body lies between the two pads."""
    across = np.linspace(-0.45, 0.45, 5) * world.gripper_width
    grid = np.meshgrid([-PAD_HALF_WIDTH, 0.0, PAD_HALF_WIDTH], across, np.linspace(PAD_NEAR, PAD_FAR, 4), indexing="ij")
    points = np.stack(grid, axis=-1).reshape(-1, 3) @ world.gripper_rotation_w.T + world.gripper_position_w
    return bool(body.parts.contain(points, margin=0.003).any())


def is_held(world: World, body: Body) -> bool:
    """Both fingers touch the body, and some of it lies between them (not under a closed gripper or at its outside)."""
    return all(body.touches_fingers) and is_between_pads(world, body)


def reach_and_grasp(world: World, body: Body, grasp: Grasp, obstacles: Boxes) -> np.ndarray:
    """Travel to a funnel before the grasp, go in when aligned, close; back out and reopen after a miss.

    The hand may err by the slack between pads and object. A gripper that has begun to close keeps closing within twice the
    tolerance, so that small disturbances do not make it start again. obstacles: what the hand must not meet on its way.
    """
    approach = grasp.approach_w
    error = grasp.position_w - world.gripper_position_w
    along = float(error @ approach)
    aside = float(np.linalg.norm(error - along * approach))
    turn = float(angles_between(grasp.rotation_w, world.gripper_rotation_w))
    tolerance = float(np.clip(0.5 * (MAX_OPENING - grasp.width), 0.006, 0.012))
    missed = world.gripper_width < 0.5 * grasp.width and not (any(body.touches_fingers) and is_between_pads(world, body))
    patience = 2.0 if world.gripper_width < 0.9 * MAX_OPENING else 1.0
    at_grasp = aside < patience * tolerance and abs(along) < patience * 0.008 and turn < patience * 0.12
    if at_grasp and not missed:
        return servo(world, grasp.position_w, grasp.rotation_w, CLOSE)
    if np.linalg.norm(error) > grasp.standoff + 0.03 and is_confined(world, obstacles):
        return let_go(world)
    too_narrow = float(world.gripper_width < grasp.width + 0.004)
    misaligned = max(ramp(aside, tolerance - 0.002, 0.03), ramp(turn, 0.1, 0.25), too_narrow)
    back = misaligned * grasp.standoff + max(0.0, aside - 0.03)
    return travel(world, grasp.position_w - back * approach, grasp.rotation_w, OPEN, obstacles)
