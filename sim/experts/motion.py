"""Moving the hand under OSC_POSE: one proportional step, travel above what lies in the way, leaving a narrow place.

Actions are float [7]: translation (0.05 m per unit), rotation vector in the world frame (0.5 rad per unit), gripper
-1 open / +1 close. At |translation| = 1 the Panda's hand moves 13 mm per control period at 20 Hz (measured), after four
periods of acceleration.
"""

from collections.abc import Collection

import numpy as np

from sim.boxes import Boxes, free_fall, free_rise, separations
from sim.environment import Body, World
from sim.experts.geometry import DOWN, MAX_OPENING, hand_at, ramp, rotation_vector

OPEN, CLOSE = -1.0, 1.0
METRES_PER_UNIT = 0.05  # OSC_POSE output_max, robosuite default controller
RADIANS_PER_UNIT = 0.5
MAX_SPEED = 1.0  # bound of |translation| in action units
MAX_TURN = 0.5  # bound of |rotation| in action units
POSITION_GAIN = 1.3  # commanded / remaining distance; above 1.5 the hand overshoots
ROTATION_GAIN = 0.8
CORRIDOR = 0.075  # m, half the width of the strip that must be clear below a travelling hand
ALIGNED = 0.012  # m, a hand this near above its goal goes straight down
SKIM = 0.005  # m, wanted below a hand that is not above its goal yet
CLEARANCE = 0.015  # m, between the lowest point of what travels and what it passes over


def servo(world: World, position_w: np.ndarray, rotation_w: np.ndarray | None, gripper: float) -> np.ndarray:
    """One proportional step of the grip site towards a pose; rotation None: keep the present one.

    Returns the action, float [7]; |translation| <= MAX_SPEED, |rotation| <= MAX_TURN.
    """
    translation = POSITION_GAIN * (position_w - world.gripper_position_w) / METRES_PER_UNIT
    translation = translation * min(1.0, MAX_SPEED / max(np.linalg.norm(translation), 1e-9))
    rotation = np.zeros(3)
    if rotation_w is not None:
        rotation = ROTATION_GAIN * rotation_vector(rotation_w @ world.gripper_rotation_w.T) / RADIANS_PER_UNIT
        rotation *= min(1.0, MAX_TURN / max(np.linalg.norm(rotation), 1e-9))
    return np.concatenate([translation, rotation, [gripper]])


def solids(world: World, without: Collection[str] = ()) -> Boxes:
    """Every collision box of the world but those of the bodies and joints named."""
    parts = [body.parts for name, body in named_solids(world).items() if name not in without]
    return Boxes.joined((*parts, world.scenery))


def named_solids(world: World) -> dict[str, Body]:
    """Bodies by name, and the moving parts of fixtures by the name of their joint."""
    return {**world.bodies, **{name: joint.link for name, joint in world.joints.items()}}


def highest_along(boxes: Boxes, start_w: np.ndarray, end_w: np.ndarray, radius: float) -> float:
    """Height of the highest box within `radius` of the horizontal line between two points; -inf if there is none."""
    if not len(boxes):
        return -np.inf
    along = np.linspace(0.0, 1.0, 9)[:, None]
    points = start_w[:2] + along * (end_w - start_w)[:2]
    (x_low, x_high), (y_low, y_high), (_, top) = (boxes.span(axis) for axis in np.eye(3))
    dx = np.maximum(np.maximum(x_low - points[:, :1], points[:, :1] - x_high), 0.0)
    dy = np.maximum(np.maximum(y_low - points[:, 1:], points[:, 1:] - y_high), 0.0)
    near = (np.hypot(dx, dy) < radius).any(axis=0)
    return float(top[near].max(initial=-np.inf))


def travel(
    world: World,
    position_w: np.ndarray,
    rotation_w: np.ndarray | None,
    gripper: float,
    obstacles: Boxes,
    carried: Boxes | None = None,
) -> np.ndarray:
    """One step towards a pose through the air: up over what lies between, across, then down.

    carried: boxes of the object in the hand: its lowest point must clear what the hand passes over, and it must not meet
    what hangs over it on its way up. Things are carried near the hand's middle, so its own width is not looked at.
    """
    here = world.gripper_position_w
    moving = [hand_at(here, world.gripper_rotation_w, world.gripper_width), *(() if carried is None else (carried,))]
    bottom = min(boxes.bottom for boxes in moving)
    offset = position_w - here
    distance = float(np.linalg.norm(offset[:2]))
    near = here + offset * min(1.0, 0.04 / max(distance, 1e-9))
    rise_here = highest_along(obstacles, here, near, CORRIDOR) + CLEARANCE - bottom
    rise = max(0.0, highest_along(obstacles, here, position_w, CORRIDOR) + CLEARANCE - bottom)
    far = ramp(distance, 0.03, 0.06)
    if far > 0.0 and rise > 0.0:
        aside = way_out(moving, obstacles, rise)
        if aside is not None:
            return servo(world, here + aside, None if carried is None else rotation_w, gripper)
    height = far * max(offset[2], rise) + (1.0 - far) * offset[2]
    if height < 0.0 and distance > ALIGNED:  # not onto something beside the place to go down at
        height = max(height, SKIM - min(free_fall(boxes, obstacles) for boxes in moving))
    go = 1.0 - far * max(ramp(rise_here, 0.003, 0.015), ramp(rise, 0.03, 0.08))
    target = here + np.array([go * offset[0], go * offset[1], height])
    return servo(world, target, rotation_w, gripper)


def way_out(moving: list[Boxes], obstacles: Boxes, rise: float) -> np.ndarray | None:
    """The shortest horizontal step after which all `moving` can go up by `rise` without meeting an obstacle: [3] m.

    None if nothing is in the way up, or if no step of at most 0.24 m helps.
    """
    if min(free_rise(boxes, obstacles) for boxes in moving) >= rise:
        return None
    for length in (0.03, 0.06, 0.09, 0.12, 0.16, 0.2, 0.24):
        steps = [length * np.array([np.cos(angle), np.sin(angle), 0.0]) for angle in np.arange(12) * np.pi / 6]
        free = [min(free_rise(boxes.shifted(step), obstacles) for boxes in moving) for step in steps]
        if max(free) >= rise:
            return steps[int(np.argmax(free))] * (1.0 + 0.01 / length)
    return None


def is_confined(world: World, obstacles: Boxes, margin: float = 0.012) -> bool:
    """Whether a tilted hand is within `margin` of an obstacle, so that it must not simply rise."""
    if world.gripper_rotation_w[:, 2] @ DOWN > 0.9:
        return False
    hand = hand_at(world.gripper_position_w, world.gripper_rotation_w, world.gripper_width)
    return bool((separations(hand, obstacles, margin) < margin).any())


def let_go(world: World) -> np.ndarray:
    """Open where the hand is; once open, draw back along the approach.

    A carton's roof can hook a finger tip: the hand draws back as soon as it is open, whatever still touches it.
    """
    touched = any(any(body.touches_fingers) for body in named_solids(world).values())
    if touched and world.gripper_width < 0.9 * MAX_OPENING:
        return servo(world, world.gripper_position_w, None, OPEN)
    return servo(world, world.gripper_position_w - 0.05 * world.gripper_rotation_w[:, 2], None, OPEN)
