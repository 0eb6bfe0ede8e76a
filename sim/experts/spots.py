"""Where in a region to put an object: within reach, in the middle if it is free, beside what stands or will stand there."""

from collections.abc import Callable

import numpy as np

from sim.boxes import UP, Boxes, separations
from sim.environment import Body, Region, World
from sim.experts.geometry import HOME_ROTATION, overreach
from sim.experts.placing import Place
from vla.rotations import rotation_about

GRID = np.stack(np.meshgrid(*[np.linspace(-1.0, 1.0, 5)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
BORDER = 0.02  # m, from the border of a region to where the origin of an object that stands on it may be
BESIDE = 0.01  # m, wanted between two objects that stand on one region
LOOSE, TIGHT = 0.02, 0.006  # m, error at which an object is let down between walls: where there is room for it, and where not
TIGHT_TURN = 0.04  # rad
TURN = 0.02  # m, what a turn of 1 rad is worth avoiding
WAY_DOWN = 0.4  # m, above the middle of a region, from which an object is let down
NEAR = 0.05  # m around a region, within which an object takes room from it


def place_in(world: World, region: Region, name: str) -> Place:
    """Where to let body `name` down into a region with walls, how much to turn it before, and how exactly.

    Near the middle, as far towards the robot as reach demands, clear of the walls and of what hangs over the region (a drawer
    that is not fully out lies partly under the handles of those above); turned only where it does not fit as it is.
    """
    body = world.bodies[name]
    size = np.linalg.norm(body.half_extents[:2])
    offsets = offsets_in(region, lambda half: np.maximum(0.6 * half, half - size))
    spots, costs, yaws = region.position_w + offsets, [], (0.0, *alignments(region, body))
    for yaw in yaws:
        depths = walled(world, region, footprint(body, yaw), region.position_w + offsets)
        costs.append(effort(world, region, body, offsets) + 20.0 * depths + TURN * abs(yaw))
        if depths.min() == 0.0:
            break
    turned, chosen = np.unravel_index(int(np.argmin(costs)), np.shape(costs))
    spot, yaw = spots[chosen], yaws[turned]
    low, high = footprint(body, yaw)
    tight = walled(world, region, (low - LOOSE, high + LOOSE), spot[None])[0] > 0.0
    return Place(spot, LOOSE, yaw) if not tight else Place(spot, TIGHT, yaw, TIGHT_TURN)


def alignments(region: Region, body: Body) -> list[float]:
    """The turns about the vertical that lay a body's longest level axis along one of a region's level axes, smaller first: rad."""
    axes = level_axes(body.rotation_w)
    along = axes[:, int(np.argmax(body.half_extents[level_indices(body.rotation_w)]))]
    heading = np.arctan2(along[1], along[0])
    turns = [np.arctan2(axis[1], axis[0]) - heading for axis in level_axes(region.rotation_w).T]
    return sorted(((turn + 0.5 * np.pi) % np.pi - 0.5 * np.pi for turn in turns), key=abs)


def walled(world: World, region: Region, corners: tuple[np.ndarray, np.ndarray], spots: np.ndarray) -> np.ndarray:
    """How deep a rectangle (low, high) on its way down to M spots meets the fixture around the region: [M] m."""
    if region.owner is None:
        return np.zeros(len(spots))
    moving = (joint.link.parts for joint in world.joints.values() if joint.owner == region.owner)
    walls = Boxes.joined((world.bodies[region.owner].parts, *moving))
    low, high = corners
    half = np.array([*0.5 * (high - low), 0.5 * WAY_DOWN])
    middles = spots + np.array([*0.5 * (low + high), 0.5 * WAY_DOWN])
    columns = Boxes(middles, np.broadcast_to(np.eye(3), (len(spots), 3, 3)), np.broadcast_to(half, (len(spots), 3)))
    return np.maximum(0.0, -separations(columns, walls).min(axis=1))


def spot_on(world: World, region: Region, name: str) -> np.ndarray:
    """Where to stand body `name` on a region; free of what stands there, and so that what is still to come finds room. [3] m"""
    body = world.bodies[name]
    offsets = offsets_in(region, lambda half: np.maximum(half - BORDER, 0.0))
    cost = effort(world, region, body, offsets)
    goals = [names for _, *names in world.goal if len(names) == 2]
    coming = {other for other, place in goals if other != name and region is world.regions.get(place)}
    standing = [
        other for key, other in world.bodies.items() if key not in (name, region.owner) and stands_near(region, other)
    ]
    for other in standing:
        cost = cost + 20.0 * crowded(body, region.position_w + offsets, other, other.origin_w[None])[:, 0]
    for other in (world.bodies[key] for key in coming if key in world.bodies):
        if not any(other is each for each in standing):
            beside = crowded(body, region.position_w + offsets, other, region.position_w + offsets)
            cost = cost + 20.0 * beside.min(axis=1)
    return region.position_w + offsets[int(np.argmin(cost))]


def offsets_in(region: Region, room: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A grid of offsets [25, 3] m from the middle of a region along its two level axes.

    room: from the half extents [2] along those axes to how far the grid goes along each.
    """
    room_along = room(region.half_extents[level_indices(region.rotation_w)])
    return (GRID * room_along) @ level_axes(region.rotation_w).T


def level_indices(rotation_w: np.ndarray) -> np.ndarray:
    """Which two of a frame's axes are the more level ones, in their order."""
    return np.sort(np.argsort(np.abs(rotation_w.T @ UP), kind="stable")[:2])


def level_axes(rotation_w: np.ndarray) -> np.ndarray:
    """Those axes as columns: [3, 2]."""
    return rotation_w[:, level_indices(rotation_w)]


def effort(world: World, region: Region, body: Body, offsets: np.ndarray) -> np.ndarray:
    """Distance from the middle, and the stretch of the arm. [M]"""
    grips = region.position_w + offsets + np.array([0.0, 0.0, 2.0 * body.half_extents[2]])
    stretch = overreach(world.shoulder_w, grips, np.broadcast_to(HOME_ROTATION, (len(grips), 3, 3)))
    return 40.0 * stretch + np.linalg.norm(offsets, axis=1)


def stands_near(region: Region, body: Body) -> bool:
    """Whether a body stands on a region or takes room from it."""
    ahead, height = body.position_w - region.position_w, body.parts.bottom - region.position_w[2]
    reach = np.abs(region.rotation_w) @ region.half_extents + NEAR
    return bool(abs(height) < NEAR and (np.abs(ahead[:2]) < reach[:2]).all())


def crowded(body: Body, spots: np.ndarray, other: Body, other_spots: np.ndarray) -> np.ndarray:
    """How deep the rectangles around two bodies overlap, BESIDE included, with their origins at M and K spots: m [M, K]."""
    (low, high), (other_low, other_high) = footprint(body), footprint(other)
    first, second = spots[:, None, :2], other_spots[None, :, :2]
    depth = np.minimum(first + high, second + other_high) - np.maximum(first + low, second + other_low) + BESIDE
    return np.maximum(depth.min(axis=2), 0.0)


def footprint(body: Body, yaw: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x and y of a body's parts, [2] m each, seen from its origin, were it turned by `yaw` (rad)."""
    turned = rotation_about(UP, yaw)
    ends = np.array([body.parts.span(turned.T @ axis) for axis in np.eye(3)[:2]])  # [axis, low or high, part]
    origin = (turned @ body.origin_w)[:2]
    return ends[:, 0].min(axis=1) - origin, ends[:, 1].max(axis=1) - origin
