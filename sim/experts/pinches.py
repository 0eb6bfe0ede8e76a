"""Where a rigid shape can be pinched from a given side: candidates from its collision boxes alone, kept per shape."""

import functools
from dataclasses import dataclass

import numpy as np

from sim.boxes import Boxes, overlaps
from sim.experts.geometry import (
    FINGER_DEPTH,
    FINGER_HALF_WIDTH,
    MAX_OPENING,
    PAD_FAR,
    PAD_NEAR,
    PALM_HALF_LENGTH,
    PALM_HALF_WIDTH,
    PALM_NEAR,
    TIP_LENGTH,
    hand_boxes,
    hand_rotations,
    unit,
)

POINT_SPACING = 0.005  # m, of the points a shape is sampled with
SLICE_SPACING = 0.008  # m, between candidate positions across the finger axis
NUM_DIRECTIONS = 12  # finger axes tried, evenly over half a turn
RUN_GAP = 0.012  # m, free space that separates two pieces of material
PALM_MARGIN = 0.004  # m, between palm and object
FLOOR_MARGIN = 0.003  # m, between finger tips and what the object stands on
ENGAGED = 0.01  # m, height of material wanted between the pads
MAX_CANDIDATES = 120
SAME_PLACE, SAME_LINE = 0.014, np.cos(np.radians(20))  # m and cosine: pinches nearer to each other count as one
SAME_DEPTH = 0.006  # m


@dataclass(frozen=True, eq=False)
class Pinches:
    """M ways to pinch a shape, in its frame, sorted by cost."""

    position: np.ndarray  # [M, 3] m, grip site
    finger_axis: np.ndarray  # [M, 3]
    width: np.ndarray  # [M] m, of the material between the fingers
    cost: np.ndarray  # [M], 0 is a deep square grip at the middle of the shape


@functools.lru_cache(maxsize=512)
def find_pinches(shape: Boxes, approach: tuple[float, float, float]) -> Pinches:
    """Pinches of `shape` by an open hand that comes along `approach` (in the shape's frame, need not be normalised).

    The material between the pads fits the gripper, neither finger nor palm meets the shape on the straight way in, and
    the finger tips stay above the shape's lowest point as seen along the approach.
    """
    down = unit(np.array(approach))
    first = unit(np.eye(3)[int(np.argmin(np.abs(down)))] - down * down[int(np.argmin(np.abs(down)))])
    second = np.cross(down, first)
    points = shape.surface_points(POINT_SPACING)
    middle = points.mean(axis=0)
    found = []
    for angle in np.arange(NUM_DIRECTIONS) * np.pi / NUM_DIRECTIONS:
        axis = np.cos(angle) * first + np.sin(angle) * second
        lateral = np.cross(axis, down)
        found += pinches_along(points @ np.stack([axis, lateral, -down], axis=1), np.array([axis, lateral, -down]), middle)
    if not found:
        return Pinches(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0))
    found.sort(key=lambda pinch: pinch[3])
    columns = [np.array(column) for column in zip(*found)]
    free = ~meets(shape, columns[0], columns[1], down)
    columns = [column[free] for column in columns]
    kept = spread(columns[0], columns[1], down)
    return Pinches(*(column[kept] for column in columns))


def spread(positions: np.ndarray, finger_axes: np.ndarray, down: np.ndarray) -> list[int]:
    """Indices of pinches of which no two are nearly the same, the first ones preferred."""
    kept: list[int] = []
    depth = positions @ down
    for index, (position, axis) in enumerate(zip(positions, finger_axes)):
        near = np.linalg.norm(positions[kept] - position, axis=1) < SAME_PLACE
        near &= np.abs(depth[kept] - depth[index]) < SAME_DEPTH
        alike = np.abs(finger_axes[kept] @ axis) > SAME_LINE
        if not (near & alike).any():
            kept.append(index)
        if len(kept) == MAX_CANDIDATES:
            break
    return kept


def pinches_along(uvw: np.ndarray, axes: np.ndarray, middle: np.ndarray) -> list[tuple]:
    """Candidates (position, finger axis, width, cost) for one finger axis.

    uvw: points [P, 3] along the finger axis, across it, and upwards (against the approach); axes [3, 3]: those
    directions as rows in the shape's frame.
    """
    u, v, w = uvw.T
    lowest = w.min() + TIP_LENGTH + FLOOR_MARGIN
    centre = axes @ middle
    found = []
    num_slices = int((v.max() - v.min()) / 2 / SLICE_SPACING)
    for across in (v.max() + v.min()) / 2 + SLICE_SPACING * np.arange(-num_slices, num_slices + 1):
        strip = np.abs(v - across) < FINGER_HALF_WIDTH
        if not strip.any():
            continue
        under_palm = np.abs(v - across) < PALM_HALF_WIDTH
        top = w[strip].max()
        for depth in (PALM_NEAR + PALM_MARGIN, -0.018, -0.008):
            height = max(top + depth, lowest)
            slab = strip & (w > height + PAD_NEAR) & (w < height + PAD_FAR)
            for low, high in windows(np.sort(u[slab])):
                at = 0.5 * (low + high)
                covered = under_palm & (np.abs(u - at) < PALM_HALF_LENGTH)
                if w[covered].max() > height - PALM_NEAR - 0.002:
                    continue  # the palm would meet the shape first
                inside = slab & (u >= low - 1e-9) & (u <= high + 1e-9)
                engaged = w[inside].max() - w[inside].min()
                cost = 5.0 * edge_slopes(u[inside], v[inside] - across) + 4.0 * (high - low)
                cost += 100.0 * max(0.0, ENGAGED - engaged)
                cost += 8.0 * float(np.hypot(at - centre[0], across - centre[1]))
                cost += 40.0 * max(0.0, height - centre[2])
                found.append((np.array([at, across, height]) @ axes, axes[0], high - low, cost))
    return found


def windows(sorted_u: np.ndarray) -> list[tuple[float, float]]:
    """Pieces of material that fit between the fingers, alone or together with their neighbours: (low, high)."""
    if not len(sorted_u):
        return []
    breaks = np.flatnonzero(np.diff(sorted_u) > RUN_GAP)
    lows, highs = sorted_u[[0, *(breaks + 1)]], sorted_u[[*breaks, len(sorted_u) - 1]]
    pairs = [(low, high) for i, low in enumerate(lows) for high in highs[i:]]
    return [(low, high) for low, high in pairs if high - low < MAX_OPENING - 0.004]


def edge_slopes(u: np.ndarray, v: np.ndarray) -> float:
    """How far from square the two faces are that the pads meet: mean slope, 1 where half a pad meets nothing."""
    halves = [u[side] for side in (v < -0.002, v > 0.002)]
    if any(not len(half) for half in halves):
        return 1.0
    change = abs(halves[0].min() - halves[1].min()) + abs(halves[0].max() - halves[1].max())
    return min(1.0, change / (2 * FINGER_HALF_WIDTH))


def meets(shape: Boxes, positions: np.ndarray, finger_axes: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Which hands, fully open at the grip positions, would have met the shape on their way in: bool [M]."""
    rotations = hand_rotations(down, finger_axes)
    hands = hand_boxes(positions, rotations, MAX_OPENING)
    # Fingers with the palm's height above them: they sweep what lies above on the way in.
    sweep = np.repeat([0.06, 0.06, 0.0], len(positions))
    half = hands.half_extents + sweep[:, None] * [0, 0, 1]
    swept = Boxes(hands.position - sweep[:, None] * down, hands.rotation, half - 0.0005)
    return overlaps(swept, shape).any(axis=1).reshape(3, len(positions)).any(axis=0)
