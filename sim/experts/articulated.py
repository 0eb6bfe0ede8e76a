"""Drawers, doors and knobs: grasp the moving part and take it along its joint, or push it with the closed fingers."""

import numpy as np

from sim.boxes import UP, Boxes, overlaps
from sim.environment import Joint, World
from sim.experts.geometry import (
    DOWN,
    TIP_LENGTH,
    angles_between,
    comfortable,
    hand_rotation,
    horizontal,
    ramp,
    tilted,
    unit,
    wrist_at,
)
from sim.experts.grasping import choose_grasp, is_held, reach_and_grasp
from sim.experts.motion import CLOSE, servo, solids, travel
from vla.rotations import rotation_about

PULL_TILTS = np.radians([45.0, 20.0, 0.0])  # below the horizontal, of a hand that takes a handle
PUSH_TILTS = np.radians([40.0, 65.0, 85.0])  # below the horizontal, of a hand that pushes a drawer; the first with room
SLIDE_MARGIN, HINGE_MARGIN = 0.008, 0.12  # m, rad: beyond the value that counts
LEAD = 0.03  # m, how far ahead of itself the hand is sent along the joint's path: friction alone holds a handle
BEFORE = 0.05  # m, in front of what is to be pushed
SUNK = 0.045  # m, the finger tips may be so far inside the box around what they push: a door's mesh is thinner than its box
AJAR = 0.6  # rad, beyond which a door is pushed open from behind rather than pulled
OUTERMOST = 0.03  # m, a handle lies this near to the outermost point of the part it moves


def wanted_value(joint: Joint, predicate: str) -> float:
    """The joint value to go to, somewhat inside what `predicate` asks and within the limits.

    Raises ValueError if the joint knows no such predicate.
    """
    if predicate not in joint.targets:
        raise ValueError(f"A joint of {joint.owner!r} cannot be made {predicate!r}; it knows {sorted(joint.targets)}.")
    low, high = joint.targets[predicate]
    margin = SLIDE_MARGIN if joint.kind == "slide" else HINGE_MARGIN
    value = low + margin if np.isfinite(low) else high - margin
    return float(np.clip(value, *joint.limits))


def move_joint(world: World, name: str, predicate: str) -> np.ndarray:
    """Bring joint `name` to where `predicate` ("open", "close", "turnon", "turnoff") holds."""
    joint = world.joints[name]
    sign = np.sign(wanted_value(joint, predicate) - joint.value) or 1.0
    if is_knob(joint):
        return take_along(world, name, sign, approaches=(DOWN,))
    outward = outward_direction(world, joint)
    direction = sign * moving_direction(joint)
    if direction @ outward < 0.0 or (is_ajar(joint) and not is_held(world, joint.link)):
        return push(world, name, direction)
    approaches = [tilted(-outward, tilt) for tilt in PULL_TILTS]
    return take_along(world, name, sign, approaches, outward)


def is_ajar(joint: Joint) -> bool:
    """Whether a door stands so far open that the hand fits behind it."""
    if joint.kind != "hinge" or "close" not in joint.targets:
        return False
    low, high = joint.targets["close"]
    return not low - AJAR < joint.value < high + AJAR


def is_knob(joint: Joint) -> bool:
    """A hinge that turns something about its own middle, about the vertical."""
    offset = joint.link.position_w - joint.anchor_w
    across = offset - (offset @ joint.axis_w) * joint.axis_w
    return joint.kind == "hinge" and abs(joint.axis_w @ UP) > 0.9 and np.linalg.norm(across) < 0.03


def moving_direction(joint: Joint) -> np.ndarray:
    """Where the middle of the moving part goes as the joint's value grows: unit vector [3]."""
    if joint.kind == "slide":
        return joint.axis_w
    return unit(np.cross(joint.axis_w, joint.link.position_w - joint.anchor_w))


def outward_direction(world: World, joint: Joint) -> np.ndarray:
    """The side of the moving part that is accessible: along its motion, away from the body it belongs to. [3]"""
    direction = moving_direction(joint)
    if joint.kind == "hinge":  # a door swings outwards from where it is shut
        shut = joint.targets.get("close", (0.0, 0.0))
        return direction if joint.limits[1] > max(shut[0], 0.0) + 0.1 else -direction
    own, other = joint.link.parts.span(direction), world.bodies[joint.owner].parts.span(direction)
    return direction if own[1].max() - other[1].max() > other[0].min() - own[0].min() else -direction


def take_along(
    world: World, name: str, sign: float, approaches: list[np.ndarray], outward: np.ndarray | None = None
) -> np.ndarray:
    """Grasp the moving part, at its outermost end if there is one, and carry it along the joint's path."""
    joint = world.joints[name]
    if is_held(world, joint.link):
        return follow(world, joint, sign)
    others = solids(world, without=(name,))
    outermost = None if outward is None else joint.link.parts.span(outward)[1].max()

    def beside_handle(positions: np.ndarray) -> np.ndarray:
        return 0.0 if outward is None else 200.0 * np.maximum(0.0, outermost - positions @ outward - OUTERMOST)

    grasp = choose_grasp(world, joint.link, others, approaches=approaches, extra_cost=beside_handle)
    return reach_and_grasp(world, joint.link, grasp, others)


def follow(world: World, joint: Joint, sign: float) -> np.ndarray:
    """One step of a hand that holds the moving part, along the joint's path."""
    here, rotation = world.gripper_position_w, world.gripper_rotation_w
    if joint.kind == "slide":
        return servo(world, here + sign * LEAD * joint.axis_w, rotation, CLOSE)
    arm = here - joint.anchor_w
    across = np.linalg.norm(arm - (arm @ joint.axis_w) * joint.axis_w)
    turn = rotation_about(joint.axis_w, sign * min(0.3, LEAD / max(across, 1e-3)))
    return servo(world, joint.anchor_w + turn @ arm, turn @ rotation, CLOSE)


def push(world: World, name: str, direction: np.ndarray) -> np.ndarray:
    """Push the moving part along `direction` with the tips of the closed fingers."""
    joint = world.joints[name]
    contact, approaches = contact_point(joint, direction)
    approach = roomiest(world, name, contact - BEFORE * direction, approaches)
    across = horizontal(np.cross(UP, direction))
    rotation = comfortable(hand_rotation(approach, across)[None], world.gripper_rotation_w)[0]
    at_contact = contact - TIP_LENGTH * approach
    offset = at_contact - world.gripper_position_w
    ahead = float(offset @ direction)
    aside = float(np.linalg.norm(offset - ahead * direction))
    turn = float(angles_between(rotation, world.gripper_rotation_w))
    if -SUNK < ahead < BEFORE + 0.04 and aside < 0.03 and turn < 0.4:
        sideways = offset - ahead * direction
        slow = ramp(aside, 0.01, 0.03)
        return servo(world, world.gripper_position_w + sideways + (1.0 - slow) * LEAD * direction, rotation, CLOSE)
    before = at_contact - BEFORE * direction
    return travel(world, before, rotation, CLOSE, solids(world))


def roomiest(world: World, name: str, tip: np.ndarray, approaches: list[np.ndarray]) -> np.ndarray:
    """The first of the approaches that leaves the wrist room with the finger tips at a point; the last if none does. [3]"""
    others = solids(world, without=(name, world.joints[name].owner))
    for approach in approaches:
        rotation = hand_rotation(approach, horizontal(np.cross(UP, approach)))
        if not overlaps(wrist_at(tip - TIP_LENGTH * approach, rotation), others).any():
            return approach
    return approaches[-1]


def contact_point(joint: Joint, direction: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where to push the moving part along `direction`, and the approaches of the hand, the favourite first: [3], K of [3].

    A drawer: the middle of what stands out most, its handle. A door: its panel near the free edge, from above.
    """
    parts = joint.link.parts
    if joint.kind == "slide":
        handle = outermost_parts(parts, -direction)
        middle = handle.position.mean(axis=0)
        face = -handle.span(-direction)[1].max()
        return middle + (face - middle @ direction) * direction, [tilted(direction, tilt) for tilt in PUSH_TILTS]
    panel = parts[[int(np.argmax(parts.half_extents.prod(axis=1)))]]
    middle = panel.position[0]
    arm = middle - joint.anchor_w
    arm -= (arm @ UP) * UP
    face = -panel.span(-direction)[1].max()
    point = middle + 0.3 * arm
    point = point + (face - point @ direction) * direction
    return np.array([point[0], point[1], panel.top - 0.025]), [DOWN]


def outermost_parts(parts: Boxes, direction: np.ndarray) -> Boxes:
    """The parts that reach furthest along a direction, within 5 mm."""
    ends = parts.span(direction)[1]
    return parts[ends > ends.max() - 0.005]
