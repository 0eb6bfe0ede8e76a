"""Putting an object under a roof, as into a microwave or a shelf: held from the entrance's side, moved in level, let go."""

import numpy as np

from sim.boxes import UP, Boxes, free_fall, free_rise, overlaps, vertical_spans
from sim.environment import Body, Region, World
from sim.experts.geometry import hand_at, ramp, tilted
from sim.experts.grasping import choose_grasp, is_held, reach_and_grasp
from sim.experts.motion import CLOSE, OPEN, servo, solids, travel
from sim.experts.placing import DEEP

TILTS = np.radians([60.0, 40.0, 20.0, 0.0])  # below the horizontal, of a hand that holds what it puts in
LOW_ROOF = 0.25  # m above a region, up to which something counts as its roof
WAY_IN = 0.15  # m in front of a region, that must be free for it to be entered there
OUTSIDE = 0.025  # m, between the object and the entrance where it is lined up
HEIGHT = 0.012  # m, above the floor, at which an object is moved in
TOUCH = 0.006  # m, an object this near to the floor is let go
LANE = 0.015  # m, an object this near to the line through the entrance moves in
ARRIVED = 0.01  # m
STOPPED = 0.008  # m, a hand with a wall so near ahead of it goes no further


def entrance(world: World, region: Region) -> np.ndarray | None:
    """The horizontal direction in which a roofed region is entered, unit vector [3]; None if it is open above.

    A region that moves with a drawer is open above once the drawer is. Of several open sides the one that faces the robot.
    """
    if region.owner is None or region.joint is not None:
        return None
    walls = world.bodies[region.owner].parts
    core = Boxes(region.position_w[None], region.rotation_w[None], 0.5 * region.half_extents[None])
    if free_rise(core, walls) > LOW_ROOF:
        return None
    sides = [sign * axis for axis in region.rotation_w.T if abs(axis @ UP) < 0.3 for sign in (1.0, -1.0)]
    reach = [float(np.abs(region.rotation_w.T @ side) @ region.half_extents) for side in sides]
    ways = [swept(core, -side, extent + WAY_IN) for side, extent in zip(sides, reach)]
    free = [side for side, way in zip(sides, ways) if not overlaps(way, walls).any()]
    if not free:
        return None
    away = region.position_w if world.shoulder_w is None else region.position_w - world.shoulder_w
    return max(free, key=lambda side: float(side @ away))


def swept(box: Boxes, direction: np.ndarray, length: float) -> Boxes:
    """The volume that one box passes as it moves along one of its axes."""
    half = box.half_extents + 0.5 * length * np.abs(box.rotation[0].T @ direction)
    return Boxes(box.position + 0.5 * length * direction, box.rotation, half)


def put_under(world: World, name: str, region: Region, inward: np.ndarray) -> np.ndarray:
    """Put body `name` into a region that is entered along `inward`."""
    body = world.bodies[name]
    spot = spot_under(world, region, body, inward)
    if is_held(world, body):
        return move_in(world, name, region, spot, inward)
    others = solids(world, without=(name,))
    approaches = [tilted(inward, tilt) for tilt in TILTS]
    grasp = choose_grasp(world, body, others, approaches=approaches, shift=spot - body.origin_w, drops=(0.0,))
    return reach_and_grasp(world, body, grasp, others)


def spot_under(world: World, region: Region, body: Body, inward: np.ndarray) -> np.ndarray:
    """Where the origin of a body goes: midway between the walls, wholly inside if it fits, HEIGHT above the floor. [3] m"""
    walls, side = world.bodies[region.owner].parts, np.cross(UP, inward)
    middle, ends = region.position_w, {}
    for axis in (inward, side):
        free = [wall_distance(walls, region, sign * axis) for sign in (1.0, -1.0)]
        near, far = (float(end @ axis) for end in (middle - free[1] * axis, middle + free[0] * axis))
        low, high = (float(end) for end in (body.parts.span(axis)[0].min(), body.parts.span(axis)[1].max()))
        ends[tuple(axis)] = 0.5 * (near + far) - (0.5 * (low + high) - body.origin_w @ axis)
    at = ends[tuple(inward)] * inward + ends[tuple(side)] * side
    below = vertical_spans(walls, middle[None, :2])[1][0]
    floor = float(below[below < middle[2]].max(initial=middle[2] - region.half_extents[2]))
    return np.array([at[0], at[1], floor + HEIGHT + body.origin_w[2] - body.parts.bottom])


def wall_distance(walls: Boxes, region: Region, direction: np.ndarray) -> float:
    """From the middle of a region to the nearest wall in a horizontal direction, at most as far as the region reaches. m"""
    extent = float(np.abs(region.rotation_w.T @ direction) @ region.half_extents)
    distances = np.linspace(0.0, extent, 25)
    inside = walls.contain(region.position_w + distances[:, None] * direction).any(axis=1)
    return float(distances[int(np.argmax(inside))]) if inside.any() else extent


def move_in(world: World, name: str, region: Region, spot: np.ndarray, inward: np.ndarray) -> np.ndarray:
    """One step of a hand that holds body `name`: before the entrance, in, down, open.

    A hand that the walls stop lets go there, if the body is in the region by then.
    """
    body, here, walls = world.bodies[name], world.gripper_position_w, world.bodies[region.owner].parts
    offset = spot - body.origin_w
    along = float(offset @ inward)
    aside = offset - along * inward
    others = solids(world, without=(name,))
    hand = hand_at(here, world.gripper_rotation_w, world.gripper_width)
    stopped = bool(overlaps(hand.shifted(STOPPED * inward), walls).any())
    if stopped and region.box.contain(body.origin_w[None]).any():
        along = 0.0
    if along < ARRIVED and np.linalg.norm(aside[:2]) < 2.0 * LANE:
        sink = min(free_fall(body.parts, others), DEEP)
        if sink < TOUCH:
            return servo(world, here, None, OPEN)
        return servo(world, here + along * inward - max(0.0, sink - 0.5 * TOUCH) * UP, world.gripper_rotation_w, CLOSE)
    front = float(body.parts.span(inward)[1].max() - body.origin_w @ inward)
    before = spot - (spot @ inward + front + OUTSIDE - walls.span(inward)[0].min()) * inward
    error = before - body.origin_w
    if along < float((spot - before) @ inward) + LANE and np.linalg.norm(aside) < 2.0 * LANE:
        go = 1.0 - ramp(float(np.linalg.norm(aside)), 0.5 * LANE, 1.5 * LANE)
        return servo(world, here + aside + go * along * inward, world.gripper_rotation_w, CLOSE)
    return travel(world, here + error, world.gripper_rotation_w, CLOSE, others, carried=body.parts)
