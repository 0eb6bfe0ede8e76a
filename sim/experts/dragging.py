"""Dragging an object over the table with the closed fingertips pressed into it, as with a plate that cannot be pinched."""

import numpy as np

from sim.boxes import Boxes, vertical_spans
from sim.environment import Body, Region, World
from sim.experts.geometry import DOWN, HOME_ROTATION, TIP_LENGTH, horizontal, ramp
from sim.experts.motion import CLOSE, named_solids, servo, solids, travel
from sim.experts.pinches import find_pinches
from sim.experts.spots import offsets_in

FLAT = 0.05  # m high at most: what can be dragged by fingertips pressed into it without falling over
HARD_TO_PINCH = 2.0  # cost of the best pinch of an upright object, beyond which it is dragged
PRESS = 0.006  # m, how far below the surface the finger tips are sent
HOVER = 0.02  # m, above the surface, where the hand waits until it is over the middle
SLIPPED = 0.03  # m, from the middle of the object, where the finger tips start anew
TURN = 0.1  # m, what a leg more of the way is worth avoiding
MAX_LEGS = 4
OUTSIDE = 0.012  # m, from the corner of an obstacle to where a way turns around it
ARRIVED = 0.008  # m, nearer than this a turning point is reached
LEAD = 0.045  # m, how far ahead of itself the hand is sent


def is_to_be_dragged(body: Body) -> bool:
    """Whether a body is flat and no good pinch of it from above exists."""
    if body.parts.top - body.parts.bottom > FLAT:
        return False
    shape = Boxes.single(body.half_extents) if body.shape is None else body.shape
    costs = find_pinches(shape, tuple((np.round(body.rotation_w.T @ DOWN) + 0.0).tolist())).cost
    return not len(costs) or float(costs[0]) > HARD_TO_PINCH


def drag_into(world: World, name: str, region: Region) -> np.ndarray:
    """Drag body `name` over the table until its origin is in the region, around what stands in the way."""
    body = world.bodies[name]
    surface = surface_height(body)
    offset = (body.origin_w - world.gripper_position_w) * [1.0, 1.0, 0.0]
    aside = float(np.linalg.norm(offset))
    gap = float(world.gripper_position_w[2]) - TIP_LENGTH - surface
    if gap < 0.5 * HOVER and aside < SLIPPED:
        to_go = np.array([*next_point(world, name, region), 0.0]) - body.origin_w * [1.0, 1.0, 0.0]
        go = (1.0 - ramp(gap, 0.002, 0.006)) * min(LEAD, float(np.linalg.norm(to_go)) + 0.01)
        step = go * horizontal(to_go) + np.array([0.0, 0.0, -PRESS - gap])
        return servo(world, world.gripper_position_w + step, HOME_ROTATION, CLOSE)
    down = 1.0 - ramp(aside, 0.008, 0.02)
    above = np.array([*body.origin_w[:2], surface + TIP_LENGTH + (1.0 - down) * HOVER - down * PRESS])
    if aside < SLIPPED:
        return servo(world, above, HOME_ROTATION, CLOSE)
    return travel(world, above, HOME_ROTATION, CLOSE, solids(world, without=(name,)))


def surface_height(body: Body) -> float:
    """Height of the body's upper surface at its origin, m."""
    return float(vertical_spans(body.parts, body.origin_w[None, :2])[1].max(initial=body.parts.bottom))


def next_point(world: World, name: str, region: Region) -> np.ndarray:
    """Where to drag body `name` next, [2] m: the end of the first leg of the shortest free way into the region.

    Ways turn at corners of the rectangles around what stands on the table, widened by the body's size. If no way is free,
    straight to the nearest point of the region.
    """
    start, middle = world.bodies[name].origin_w[:2], region.position_w[:2]
    low, high = rectangles(world, name)
    inside = ((start > low) & (start < high)).all(axis=1)
    low, high = shrunk(low[inside], high[inside], start, low[~inside], high[~inside])
    ends = middle + offsets_in(region, lambda half: 0.9 * half)[:, :2]
    wide = zip(low - OUTSIDE, high + OUTSIDE)
    corners = np.array([[x, y] for (x0, y0), (x1, y1) in wide for x in (x0, x1) for y in (y0, y1)]).reshape(-1, 2)
    nodes = np.concatenate([start[None], ends, corners])
    legs = np.linalg.norm(nodes[:, None] - nodes[None], axis=2) + TURN
    legs = np.where(is_free(nodes, nodes, low, high), legs, np.inf)
    left = np.full(len(nodes), np.inf)  # cheapest way from each node into the region
    left[1 : len(ends) + 1] = 0.3 * np.linalg.norm(ends - middle, axis=1)
    for _ in range(MAX_LEGS - 1):
        left = np.minimum(left, (legs + left).min(axis=1))
    cost = (legs[0] + left)[1:]
    far = np.linalg.norm(nodes[1:] - start, axis=1) > ARRIVED
    if not np.isfinite(cost[far]).any():
        return ends[int(np.argmin(np.linalg.norm(ends - start, axis=1)))]
    return nodes[1:][far][int(np.argmin(cost[far]))]


def shrunk(
    low: np.ndarray, high: np.ndarray, point: np.ndarray, others_low: np.ndarray, others_high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles (low, high) [K, 2] that hold a point, cut back at the side nearest to it; the others as they are."""
    low, high = low.copy(), high.copy()
    for index in range(len(low)):
        depths = np.concatenate([point - low[index], high[index] - point])
        side = int(np.argmin(depths))
        if side < 2:
            low[index, side] = point[side] + 1e-3
        else:
            high[index, side - 2] = point[side - 2] - 1e-3
    return np.concatenate([low, others_low]), np.concatenate([high, others_high])


def rectangles(world: World, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners (low, high), [K, 2] each, of what stands at the height of body `name`, widened by half the body's width."""
    body = world.bodies[name]
    radius = float(np.mean(body.half_extents[:2])) + 0.003
    low, high = [], []
    for key, other in named_solids(world).items():
        if key == name or other.parts.bottom > body.parts.top or other.parts.top < body.parts.bottom + 0.005:
            continue
        ends = np.array([other.parts.span(axis) for axis in np.eye(3)[:2]])
        low.append(ends[:, 0].min(axis=1) - radius)
        high.append(ends[:, 1].max(axis=1) + radius)
    return np.array(low).reshape(-1, 2), np.array(high).reshape(-1, 2)


def is_free(starts: np.ndarray, ends: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which straight lines from [A, 2] to [B, 2] meet no rectangle's inside: bool [A, B]."""
    if not len(low) or not len(ends):
        return np.ones((len(starts), len(ends)), bool)
    way = ends[None, :, None] - starts[:, None, None]
    way = np.where(np.abs(way) < 1e-9, 1e-9, way)
    crossings = np.stack([(edge + inward - starts[:, None, None]) / way for edge, inward in ((low, 1e-4), (high, -1e-4))])
    enter, leave = crossings.min(axis=0).max(axis=3), crossings.max(axis=0).min(axis=3)
    return ~((enter < leave) & (leave > 0.0) & (enter < 1.0)).any(axis=2)
