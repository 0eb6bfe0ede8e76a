"""Skills of the scripted experts over OSC_POSE: reach and grasp from above, carry and place, retreat.

Every skill is a function of the `World` alone, so an expert can label any state, not only the states it visits itself.
Actions are float [7]: translation (0.05 m per unit), rotation vector in the world frame (0.5 rad per unit), gripper
-1 open / +1 close. At |translation| = 1 the Panda's hand moves 13 mm per control period at 20 Hz (measured), after four
periods of acceleration.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.environment import Body, World

OPEN, CLOSE = -1.0, 1.0
METRES_PER_UNIT = 0.05  # OSC_POSE output_max, robosuite default controller
RADIANS_PER_UNIT = 0.5
MAX_OPENING = 0.076  # m, what fits between the pads of the Panda gripper (0.08 m nominal)
TIP_LENGTH = 0.012  # m, finger tips reach this far below the grip site
PALM_DEPTH = 0.035  # m, the grip site may lie this deep below an object's top before the palm touches it
FINGER_MARGIN = 0.012  # m, half the thickness of a finger
HOME_FINGER_AXIS = np.array([0.0, 1.0, 0.0])  # world direction of the fingers in the home pose
MAX_SPEED = 1.0  # bound of |translation| in action units
MAX_TURN = 0.5  # bound of |rotation| in action units
POSITION_GAIN = 1.3  # commanded / remaining distance; above 1.5 the hand overshoots
ROTATION_GAIN = 0.8


@dataclass(frozen=True)
class Grasp:
    """A pinch from above."""

    position_w: np.ndarray  # [3] m, where the grip site goes
    finger_axis_w: np.ndarray  # [3] horizontal unit vector along which the fingers close
    width: float  # m, extent of the object along the finger axis
    hover_z: float  # m, grip-site height at which the finger tips clear the object


@dataclass(frozen=True)
class Placement:
    """Where an object should end up."""

    position_w: np.ndarray  # [3] m, where the centre of the object's underside goes
    clear_z: float  # m, the underside stays above this until it is over the place
    tolerance: float  # m, horizontal error at which the fingers may open
    lower: bool  # lower the object to `position_w` before opening, or drop it from above


def vertical_half_extent(body: Body) -> float:
    """Half the height in m of the body's collision box in its present rotation."""
    return float(np.abs(body.rotation_w[2]) @ body.half_extents)


def underside(body: Body) -> float:
    return float(body.position_w[2]) - vertical_half_extent(body)


def upside(body: Body) -> float:
    return float(body.position_w[2]) + vertical_half_extent(body)


def horizontal(vector: np.ndarray) -> np.ndarray:
    """The vector's horizontal part, normalised; the home finger axis if it has none."""
    flat = np.array([vector[0], vector[1], 0.0])
    length = np.linalg.norm(flat)
    return flat / length if length > 1e-6 else HOME_FINGER_AXIS


def angle_between_lines(first: np.ndarray, second: np.ndarray) -> float:
    """Angle in [0, pi/2] between two lines given by unit vectors."""
    return float(np.arccos(np.clip(abs(first @ second), 0.0, 1.0)))


def solid_names(world: World) -> list[str]:
    """The bodies that can be bumped into: all but the goal regions, which LIBERO calls `..._region`."""
    return [name for name in world.bodies if not name.endswith("_region")]


def plan_grasp(world: World, name: str) -> Grasp:
    """The pinch of body `name` that fits the gripper, has room for both fingers and turns the wrist least.

    Candidates close along the horizontal parts of the box axes; thin sides are preferred. The term in the present
    finger axis keeps the choice from flipping between two equally good axes (a cube turned by 45 degrees). A box too
    wide on every side gets the narrowest pinch.
    """
    body = world.bodies[name]
    top = upside(body)
    height = max(float(body.position_w[2]), top - PALM_DEPTH, underside(body) + TIP_LENGTH + 0.001)
    position = np.array([body.position_w[0], body.position_w[1], height])
    current = horizontal(world.gripper_rotation_w[:, 1])
    obstacles = [world.bodies[other] for other in solid_names(world) if other != name]
    best, best_cost = None, np.inf
    for axis in body.rotation_w.T:
        if np.linalg.norm(axis[:2]) < 0.7:
            continue
        direction = horizontal(axis)
        width = 2.0 * float(np.abs(body.rotation_w.T @ direction) @ body.half_extents)
        cost = (
            angle_between_lines(direction, HOME_FINGER_AXIS)
            + 0.3 * angle_between_lines(direction, current)
            + 10.0 * width
            + 3.0 * num_blocked_fingers(position, direction, obstacles)
            + 1000.0 * max(0.0, width - MAX_OPENING)
        )
        if cost < best_cost:
            best, best_cost = (direction, width), cost
    direction, width = best
    if direction @ current < 0.0:
        direction = -direction
    return Grasp(position, direction, width, hover_z=top + TIP_LENGTH + 0.012)


def num_blocked_fingers(position_w: np.ndarray, finger_axis_w: np.ndarray, obstacles: Sequence[Body]) -> int:
    """How many of the two open fingers (0.04 to 0.065 m from the grip site) would stand on or in another body."""
    blocked = 0
    for side in (-1.0, 1.0):
        tips = [position_w + side * reach * finger_axis_w - [0.0, 0.0, TIP_LENGTH] for reach in (0.042, 0.062)]
        blocked += any(
            np.max(np.abs(body.rotation_w.T @ (tip - body.position_w)) - body.half_extents) < FINGER_MARGIN
            for body in obstacles
            for tip in tips
        )
    return blocked


def servo(world: World, position_w: np.ndarray, finger_axis_w: np.ndarray, gripper: float) -> np.ndarray:
    """One proportional step of the grip site towards a position, approach straight down, fingers along an axis.

    Returns the action, float [7]; |translation| <= MAX_SPEED, |rotation| <= MAX_TURN.
    """
    translation = POSITION_GAIN * (position_w - world.gripper_position_w) / METRES_PER_UNIT
    translation *= min(1.0, MAX_SPEED / max(np.linalg.norm(translation), 1e-9))
    approach = np.array([0.0, 0.0, -1.0])
    target = np.stack([np.cross(finger_axis_w, approach), finger_axis_w, approach], axis=1)
    current = world.gripper_rotation_w
    error = 0.5 * sum(np.cross(current[:, i], target[:, i]) for i in range(3))  # sin(angle) * axis, world frame
    rotation = ROTATION_GAIN * error / RADIANS_PER_UNIT
    rotation *= min(1.0, MAX_TURN / max(np.linalg.norm(rotation), 1e-9))
    return np.concatenate([translation, rotation, [gripper]])


def is_held(world: World, body: Body) -> bool:
    """Both fingers touch the body, and it lies between them (not under a closed gripper or against its outside)."""
    offset = world.gripper_rotation_w.T @ (body.position_w - world.gripper_position_w)
    reach = np.linalg.norm(body.half_extents)
    return all(body.touches_fingers) and abs(offset[1]) < 0.02 and np.linalg.norm(offset) < reach + 0.01


def ramp(value: float, low: float, high: float) -> float:
    """0 below low, 1 above high, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def reach_and_grasp(world: World, name: str) -> np.ndarray:
    """Approach through a funnel above the object, descend when aligned, close at the grasp; reopen after a miss.

    The hand may err by the slack between pads and object. A gripper that has begun to close keeps closing within twice
    the tolerance, so that small disturbances do not make it start again.
    """
    body = world.bodies[name]
    grasp = plan_grasp(world, name)
    error = grasp.position_w - world.gripper_position_w
    distance = float(np.linalg.norm(error[:2]))
    turn = angle_between_lines(horizontal(world.gripper_rotation_w[:, 1]), grasp.finger_axis_w)
    tolerance = float(np.clip(0.5 * (MAX_OPENING - grasp.width), 0.006, 0.012))
    missed = world.gripper_width < 0.5 * grasp.width and not any(body.touches_fingers)
    patience = 2.0 if world.gripper_width < 0.9 * MAX_OPENING else 1.0
    at_grasp = distance < patience * tolerance and abs(error[2]) < patience * 0.008 and turn < patience * 0.12
    if at_grasp and not missed:
        return servo(world, grasp.position_w, grasp.finger_axis_w, CLOSE)
    too_narrow = float(world.gripper_width < grasp.width + 0.004)
    misaligned = max(ramp(distance, tolerance - 0.002, 0.03), ramp(turn, 0.1, 0.25), too_narrow)
    height = grasp.position_w[2] + misaligned * (grasp.hover_z - grasp.position_w[2]) + max(0.0, distance - 0.03)
    return servo(world, np.array([*grasp.position_w[:2], height]), grasp.finger_axis_w, OPEN)


def path_clearance(world: World, name: str, goal_w: np.ndarray) -> float:
    """Height in m of the highest other body within 0.1 m of the horizontal line from body `name` to a goal.

    -inf if there is none.
    """
    start = world.bodies[name].position_w[:2]
    segment = goal_w[:2] - start
    squared_length = max(float(segment @ segment), 1e-9)
    highest = -np.inf
    for other in solid_names(world):
        body = world.bodies[other]
        along = float(np.clip((body.position_w[:2] - start) @ segment / squared_length, 0.0, 1.0))
        if other != name and np.linalg.norm(body.position_w[:2] - start - along * segment) < 0.1:
            highest = max(highest, upside(body))
    return highest


def carry_and_place(world: World, name: str, place: Placement) -> np.ndarray:
    """Carry the held body `name` up, over, and down to its place; open the fingers there."""
    body = world.bodies[name]
    offset = place.position_w - body.position_w
    distance = float(np.linalg.norm(offset[:2]))
    bottom = underside(body)
    drop = bottom - float(place.position_w[2])
    finger_axis = horizontal(world.gripper_rotation_w[:, 1])
    if distance < place.tolerance and (not place.lower or drop < 0.006):
        return servo(world, world.gripper_position_w, finger_axis, OPEN)
    clear_z = max(place.clear_z, path_clearance(world, name, place.position_w) + 0.01)
    over = 1.0 - ramp(distance, place.tolerance, place.tolerance + 0.03)
    height = clear_z + 0.01 if not place.lower else (1.0 - over) * (clear_z + 0.01) + over * place.position_w[2]
    go = ramp(bottom, clear_z - 0.07, clear_z) if distance > 0.04 else 1.0
    target = world.gripper_position_w + np.array([*(go * offset[:2]), height - bottom])
    return servo(world, target, finger_axis, CLOSE)


def retreat(world: World, name: str) -> np.ndarray:
    """Open and rise from body `name`; sink while it clings to a finger (a carton's roof can hook a finger tip)."""
    rise = -0.02 if any(world.bodies[name].touches_fingers) else 0.02
    target = world.gripper_position_w + np.array([0.0, 0.0, rise])
    return servo(world, target, horizontal(world.gripper_rotation_w[:, 1]), OPEN)
