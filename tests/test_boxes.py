"""Laws of the box geometry, each against dense sampling or against moving a little at a time."""

import numpy as np
import pytest

from sim.boxes import Boxes, free_fall, free_rise, overlaps, separations, vertical_spans
from tests.worlds import random_rotation


def drawn(generator: np.random.Generator, count: int, reach: float = 0.1) -> Boxes:
    """Boxes of 1 to 8 cm within `reach` (m) of the origin, turned at random."""
    rotations = np.stack([random_rotation(generator) for _ in range(count)])
    return Boxes(generator.uniform(-reach, reach, (count, 3)), rotations, generator.uniform(0.005, 0.04, (count, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_boxes_that_share_a_point_overlap_and_parted_ones_share_none(seed):
    generator = np.random.default_rng(seed)
    first, second = drawn(generator, 12), drawn(generator, 12)
    gaps = separations(first, second)
    shared = np.array([second.contain(first[[index]].surface_points(0.004)).any(axis=0) for index in range(len(first))])
    assert (gaps[shared] < 0.0).all() and not shared[gaps > 0.0].any() and 0 < shared.sum() < shared.size
    np.testing.assert_array_equal(overlaps(first, second), gaps < 0.0)


def test_a_separation_is_symmetric_and_what_parts_two_boxes():
    generator = np.random.default_rng(3)
    first, second = drawn(generator, 20), drawn(generator, 20)
    gaps = separations(first, second, within=1.0)
    np.testing.assert_allclose(gaps, separations(second, first, within=1.0).T, atol=1e-12)
    for a, b in zip(*np.nonzero(gaps < -1e-3)):  # moved by a little less in any direction they still overlap
        step = random_rotation(generator)[0] * -gaps[a, b] * 0.98
        assert overlaps(first[[a]].shifted(step), second[[b]])[0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_what_falls_freely_touches_then_and_not_before(seed):
    generator = np.random.default_rng(seed)
    falling, below = drawn(generator, 2).shifted(np.array([0, 0, 0.4])), drawn(generator, 6)
    fall = free_fall(falling, below, spacing=0.002)
    assert np.isfinite(fall) and fall > 0.0
    down = np.array([0.0, 0.0, -1.0])
    assert not overlaps(falling.shifted((fall - 0.006) * down), below).any()  # lines are 2 mm apart
    assert overlaps(falling.shifted((fall + 0.002) * down), below).any()
    assert free_fall(falling.shifted(0.05 * down), below, spacing=0.002) == pytest.approx(fall - 0.05, abs=1e-9)


def test_rising_is_falling_upside_down():
    generator = np.random.default_rng(5)
    rising, above = drawn(generator, 2), drawn(generator, 6).shifted(np.array([0, 0, 0.4]))
    over = np.diag([1.0, -1.0, -1.0])  # half a turn about x

    def flipped(boxes: Boxes) -> Boxes:
        return boxes.moved(np.zeros(3), over)

    assert free_rise(rising, above) == pytest.approx(free_fall(flipped(rising), flipped(above)), abs=1e-9)
    assert free_rise(above, rising) == np.inf and free_fall(rising, above) == np.inf


def test_a_vertical_line_is_inside_a_box_between_where_it_enters_and_leaves():
    generator = np.random.default_rng(6)
    boxes, xy = drawn(generator, 8), generator.uniform(-0.12, 0.12, (60, 2))
    low, high = vertical_spans(boxes, xy)
    heights = np.linspace(-0.25, 0.25, 101)
    for (x, y), enters, leaves in zip(xy, low, high):
        inside = boxes.contain(np.stack([np.full(101, x), np.full(101, y), heights], axis=1))
        between = (heights[:, None] > enters) & (heights[:, None] < leaves)
        np.testing.assert_array_equal(inside, between)
