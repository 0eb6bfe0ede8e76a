"""Sets of oriented boxes: moved, tested for overlap, looked at from above. numpy only.

Every collision geom of robosuite's and LIBERO's objects is a box or close to one, so this is all the geometry that the
experts need.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes in one frame. Compared and hashed by identity, so that results about one can be kept (lru_cache)."""

    position: np.ndarray  # [N, 3] m, centres
    rotation: np.ndarray  # [N, 3, 3], columns are the boxes' axes
    half_extents: np.ndarray  # [N, 3] m

    @staticmethod
    def single(half_extents: np.ndarray) -> "Boxes":
        """One box at the origin of its frame."""
        return Boxes(np.zeros((1, 3)), np.eye(3)[None], np.asarray(half_extents, float)[None])

    @staticmethod
    def joined(parts: Iterable["Boxes"]) -> "Boxes":
        """All boxes of several sets; an empty set if there are none."""
        parts = [Boxes(np.zeros((0, 3)), np.zeros((0, 3, 3)), np.zeros((0, 3))), *parts]
        fields = ("position", "rotation", "half_extents")
        return Boxes(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, which: np.ndarray | slice) -> "Boxes":
        return Boxes(self.position[which], self.rotation[which], self.half_extents[which])

    def moved(self, position: np.ndarray, rotation: np.ndarray) -> "Boxes":
        """The boxes, given in a frame that lies at `position` [3] with `rotation` [3, 3]."""
        return Boxes(self.position @ rotation.T + position, rotation @ self.rotation, self.half_extents)

    def shifted(self, offset: np.ndarray) -> "Boxes":
        return Boxes(self.position + offset, self.rotation, self.half_extents)

    def span(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest coordinate of each box along a unit vector, [N] each."""
        centre = self.position @ direction
        reach = np.einsum("nij,i->nj", self.rotation, direction)
        half = (np.abs(reach) * self.half_extents).sum(axis=1)
        return centre - half, centre + half

    @property
    def top(self) -> float:
        """Height of the highest point; -inf of no box."""
        return float(self.span(UP)[1].max(initial=-np.inf))

    @property
    def bottom(self) -> float:
        return float(self.span(UP)[0].min(initial=np.inf))

    def contain(self, points: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """Which of `points` [P, 3] lie in which box, or within `margin` of it: bool [P, N]."""
        local = np.einsum("nij,pni->pnj", self.rotation, points[:, None] - self.position)
        return (np.abs(local) <= self.half_extents + margin).all(axis=2)

    def surface_points(self, spacing: float) -> np.ndarray:
        """Points on a grid through each box, its faces included, at most `spacing` apart. [P, 3]"""
        clouds = []
        for position, rotation, half in zip(self.position, self.rotation, self.half_extents):
            counts = np.maximum(2, np.ceil(2 * half / spacing).astype(int) + 1)
            axes = [np.linspace(-extent, extent, count) for extent, count in zip(half, counts)]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
            clouds.append(grid @ rotation.T + position)
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))


def separations(first: Boxes, second: Boxes, within: float = 0.01) -> np.ndarray:
    """Largest gap along the 15 axes that can separate two boxes (Gottschalk et al. 1996): m [A, B].

    Positive: they are at least so far apart. Negative: they overlap, and moving one by so much would part them. Pairs whose
    bounding spheres are more than `within` apart are not looked at: inf.
    """
    gaps = np.full((len(first), len(second)), np.inf)
    between = second.position[None] - first.position[:, None]
    reach = np.linalg.norm(first.half_extents, axis=1)[:, None] + np.linalg.norm(second.half_extents, axis=1)
    a, b = np.nonzero((between * between).sum(axis=2) < (reach + within) ** 2)
    if len(a):
        relative = first.rotation[a].transpose(0, 2, 1) @ second.rotation[b]  # b's axes in a's
        offset = (between[a, b][:, None] @ first.rotation[a])[:, 0]  # in a's axes
        gaps[a, b] = pair_gaps(offset, relative, first.half_extents[a], second.half_extents[b])
    return gaps


def pair_gaps(offset: np.ndarray, relative: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Gaps [K] of K pairs: centre of b from a [K, 3], b's axes [K, 3, 3], both in a's axes; half extents a, b [K, 3]."""
    extent = np.abs(relative)
    gap = (np.abs(offset) - a - (extent * b[:, None]).sum(axis=2)).max(axis=1)
    along_b = np.abs((offset[:, :, None] * relative).sum(axis=1))
    gap = np.maximum(gap, (along_b - b - (extent * a[:, :, None]).sum(axis=1)).max(axis=1))
    j1, j2 = [1, 0, 0], [2, 2, 1]  # the other two axes of b, for each of its axes
    for i, i1, i2 in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        length = np.sqrt(np.maximum(1.0 - relative[:, i] ** 2, 0.0))
        distance = np.abs(offset[:, i2, None] * relative[:, i1] - offset[:, i1, None] * relative[:, i2])
        reach = a[:, i1, None] * extent[:, i2] + a[:, i2, None] * extent[:, i1]
        reach += b[:, j1] * extent[:, i][:, j2] + b[:, j2] * extent[:, i][:, j1]
        crossed = np.where(length > 1e-6, (distance - reach) / np.maximum(length, 1e-6), -np.inf)
        gap = np.maximum(gap, crossed.max(axis=1))
    return gap


def overlaps(first: Boxes, second: Boxes) -> np.ndarray:
    """Which boxes of two sets intersect: bool [A, B]."""
    return separations(first, second, within=0.0) < 0.0


def vertical_spans(boxes: Boxes, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where vertical lines through `xy` [P, 2] enter and leave each box: heights low, high [P, N].

    Lines that miss a box have low = inf, high = -inf.
    """
    start = np.concatenate([xy, np.zeros((len(xy), 1))], axis=1)
    origin = np.einsum("nij,pni->pnj", boxes.rotation, start[:, None] - boxes.position)
    slope = boxes.rotation[:, 2, :]  # of the vertical in each box's axes
    slope = np.where(np.abs(slope) < 1e-9, 1e-9, slope)
    ends = np.stack([(-boxes.half_extents - origin) / slope, (boxes.half_extents - origin) / slope])
    low, high = ends.min(axis=0).max(axis=2), ends.max(axis=0).min(axis=2)
    missed = low > high
    return np.where(missed, np.inf, low), np.where(missed, -np.inf, high)


def lines_through(boxes: Boxes, spacing: float) -> np.ndarray:
    """Positions [P, 2] of vertical lines about `spacing` apart over the rectangle around the boxes."""
    axes = []
    for axis in np.eye(3)[:2]:
        low, high = boxes.span(axis)
        first, last = low.min() + 1e-4, high.max() - 1e-4
        axes.append(np.linspace(first, last, max(2, int((last - first) / spacing) + 1)))
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def over_or_under(boxes: Boxes, others: Boxes) -> Boxes:
    """Those of `others` that vertical lines through `boxes` can meet."""
    meeting = np.ones(len(others), bool)
    for axis in np.eye(3)[:2]:
        (low, high), (other_low, other_high) = boxes.span(axis), others.span(axis)
        meeting &= (other_high >= low.min()) & (other_low <= high.max())
    return others[meeting]


def free_fall(falling: Boxes, obstacles: Boxes, spacing: float = 0.012) -> float:
    """How far `falling` can sink before it touches what is below it, in m; negative if it is in something.

    What lies wholly above the falling boxes does not count; inf above nothing.
    """
    obstacles = over_or_under(falling, obstacles)
    if not len(obstacles):
        return np.inf
    xy = lines_through(falling, spacing)
    bottom = vertical_spans(falling, xy)[0].min(axis=1)
    low, high = vertical_spans(obstacles, xy)
    supports = np.where(low < bottom[:, None], high, -np.inf).max(axis=1)
    return float((bottom - supports).min())


def free_rise(rising: Boxes, obstacles: Boxes, spacing: float = 0.012) -> float:
    """How far `rising` can go up before it touches what is above it, in m; inf below nothing.

    What it is in already, by more than 3 mm, does not count.
    """
    obstacles = over_or_under(rising, obstacles)
    if not len(obstacles):
        return np.inf
    xy = lines_through(rising, spacing)
    top = vertical_spans(rising, xy)[1].max(axis=1)
    room = vertical_spans(obstacles, xy)[0] - top[:, None]
    return float(room[(room > -0.003) & np.isfinite(top)[:, None]].min(initial=np.inf))
