"""Placing a held object: carry it above what is in the way, lower it until it stands, let go, draw the hand back."""

from dataclasses import dataclass

import numpy as np

from sim.boxes import Boxes, free_fall
from sim.environment import Body, World
from sim.experts.geometry import DOWN, MAX_OPENING, hand_at, hand_rotation, horizontal, ramp
from sim.experts.motion import CLOSE, OPEN, servo, solids, travel
from vla.rotations import rotation_about

TOUCH = 0.004  # m, an object this near to what is below it is let go
DEEP = 0.5  # m, a drop beyond which all drops are alike: above nothing it is endless


@dataclass(frozen=True)
class Place:
    """Where an object should end up."""

    position_w: np.ndarray  # [3] m, where the origin of the object's frame goes; the height is where it is carried, then it sinks
    tolerance: float  # m, horizontal error at which the fingers may open
    yaw: float = 0.0  # rad, by which the object is to be turned about the vertical
    yaw_tolerance: float = 0.1  # rad


def carry_and_place(world: World, name: str, place: Place) -> np.ndarray:
    """Carry the held body `name` up, over, and down to its place; open the fingers there."""
    body = world.bodies[name]
    offset = place.position_w - body.origin_w
    distance = float(np.linalg.norm(offset[:2]))
    others = solids(world, without=(name,))
    rotation = level(world, place.yaw)
    if distance > place.tolerance + 0.03:
        return travel(world, world.gripper_position_w + offset, rotation, CLOSE, others, carried=body.parts)
    sink = room_below(world, body, others)
    if distance < place.tolerance and abs(place.yaw) < place.yaw_tolerance and sink < TOUCH:
        return servo(world, world.gripper_position_w, None, OPEN)
    off = ramp(distance, place.tolerance, place.tolerance + min(0.03, 2.0 * place.tolerance))
    over = 1.0 - max(off, ramp(abs(place.yaw), place.yaw_tolerance, 3.0 * place.yaw_tolerance))
    step = np.array([offset[0], offset[1], -over * max(0.0, sink - 0.5 * TOUCH)])
    return servo(world, world.gripper_position_w + step, rotation, CLOSE)


def room_below(world: World, body: Body, others: Boxes) -> float:
    """How far the held body can sink until it, or the opening hand, meets something, at most DEEP. m"""
    hand = hand_at(world.gripper_position_w, world.gripper_rotation_w, MAX_OPENING)
    return min(free_fall(body.parts, others), free_fall(hand, others) - TOUCH, DEEP)


def level(world: World, yaw: float) -> np.ndarray:
    """The hand's rotation to hold on to: straight down if it is nearly so, turned by `yaw` about the vertical."""
    rotation = world.gripper_rotation_w
    if rotation[:, 2] @ DOWN > 0.9:
        rotation = hand_rotation(DOWN, horizontal(rotation[:, 1]))
    return rotation_about(-DOWN, yaw) @ rotation
