"""Laws of single skills: what a hand does after a miss, above nothing, under something, along a joint, around an obstacle."""

from dataclasses import replace

import numpy as np
import pytest

from sim.boxes import UP, Boxes, free_rise
from sim.environment import Joint, Region, World
from sim.experts import articulated, dragging, motion
from sim.experts.geometry import hand_at
from sim.experts.goals import pursue
from sim.experts.grasping import Grasp, is_held, reach_and_grasp
from sim.experts.motion import CLOSE, OPEN, solids
from sim.experts.placing import Place, carry_and_place
from tests.worlds import TOP_DOWN, box, drawer, turned, world_with


@pytest.mark.parametrize("touches", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("beside", [0.006, 0.012, 0.02])
def test_a_hand_that_closed_beside_a_wall_reopens_whatever_it_touches(touches, beside):
    wall = box((0.0, 0.0, 0.03), (0.04, 0.0015, 0.03), touches=touches)
    grasp = Grasp(np.array([0.0, 0.0, 0.045]), TOP_DOWN, 0.003, 0.06)
    world = world_with(gripper=(0.0, beside, 0.045), width=0.0, wall=wall)
    assert reach_and_grasp(world, wall, grasp, solids(world, without=("wall",)))[6] == OPEN


def test_a_hand_that_is_closing_on_a_wall_goes_on_closing():
    wall = box((0.0, 0.0, 0.03), (0.04, 0.0015, 0.03), touches=(True, False))
    grasp = Grasp(np.array([0.0, 0.0, 0.045]), TOP_DOWN, 0.003, 0.06)
    for width in (0.06, 0.02, 0.003):
        world = world_with(gripper=(0.0, 0.0, 0.045), width=width, wall=wall)
        assert reach_and_grasp(world, wall, grasp, solids(world, without=("wall",)))[6] == CLOSE


@pytest.mark.parametrize("aside", [0.0, 0.03, 0.2])
def test_what_is_held_over_nothing_has_a_label(aside):
    held = box((0.0, 0.0, 0.3), (0.02, 0.02, 0.02), touches=(True, True))
    world = world_with(width=0.04, held=held)
    action = carry_and_place(world, "held", Place(np.array([aside, 0.0, 0.0]), 0.01))
    assert np.isfinite(action).all() and action[6] == CLOSE


def test_what_stands_is_let_go_and_what_hangs_is_lowered_first():
    table = box((0.0, 0.0, -0.05), (0.5, 0.5, 0.05))
    for height, gripper in ((0.0, OPEN), (0.08, CLOSE)):
        held = box((0.0, 0.0, 0.02 + height), (0.02, 0.02, 0.02), touches=(True, True))
        world = world_with(gripper=(0.0, 0.0, 0.03 + height), width=0.04, held=held, table=table)
        action = carry_and_place(world, "held", Place(np.zeros(3), 0.01))
        assert action[6] == gripper and (gripper == OPEN or action[2] < -0.5)


def test_a_hand_under_a_shelf_leaves_it_sideways_before_it_rises():
    shelf = box((0.0, 0.0, 0.45), (0.1, 0.4, 0.01))  # above palm and fingers of a hand 0.3 m high
    wall = box((0.0, 0.5, 0.2), (0.5, 0.02, 0.3))  # to be passed over
    world = world_with(gripper=(0.06, 0.0, 0.3), shelf=shelf, wall=wall)
    others = solids(world)
    goal = np.array([0.06, 0.7, 0.3])
    action = motion.travel(world, goal, TOP_DOWN, OPEN, others)
    assert action[0] > 0.3 and abs(action[2]) < 1e-6, "towards the nearer edge of the shelf, on the level"
    hand = hand_at(world.gripper_position_w, TOP_DOWN, world.gripper_width)
    step = motion.way_out([hand], others, rise=0.3)
    assert free_rise(hand, others) < 0.3 <= free_rise(hand.shifted(step), others)
    free = world_with(gripper=(0.3, 0.0, 0.3), shelf=shelf, wall=wall)
    up = motion.travel(free, goal + [0.24, 0.0, 0.0], TOP_DOWN, OPEN, solids(free))
    assert up[2] > 0.5, "nothing above: straight up"


def knob(value: float = 0.0) -> World:
    """A stove's knob: a bar that turns about the vertical through its own middle."""
    link = box((0.2, 0.0, 0.03), (0.02, 0.006, 0.015), yaw=value)
    targets = {"turnon": (0.5, np.inf), "turnoff": (-np.inf, 0.0)}
    joint = Joint("hinge", value, (-0.1, 1.5), UP, np.array([0.2, 0.0, 0.0]), link, "stove", targets)
    stove = box((0.2, 0.0, 0.0), (0.1, 0.1, 0.01))
    return replace(world_with(goal=(("turnon", "stove"),), stove=stove), joints={"knob": joint}, achieved=(False,))


def test_a_held_knob_is_turned_about_its_own_axis():
    world = knob()
    joint = world.joints["knob"]
    assert articulated.is_knob(joint) and not articulated.is_knob(replace(joint, anchor_w=np.array([0.1, 0.0, 0.0])))
    held = replace(joint, link=replace(joint.link, touches_fingers=(True, True)))
    at = replace(world, gripper_position_w=np.array([0.2, 0.0, 0.03]), gripper_width=0.012, joints={"knob": held})
    assert is_held(at, held.link)
    action = pursue(at)
    assert np.abs(action[:3]).max() < 1e-6 and action[5] > 0.1 and action[6] == CLOSE
    back = pursue(replace(at, goal=(("turnoff", "stove"),), joints={"knob": replace(held, value=1.0)}))
    assert back[5] < -0.1


def test_a_held_handle_is_taken_along_its_slide_and_a_held_door_around_its_hinge():
    world = drawer(0.05)
    lower = world.joints["lower"]
    held = replace(world, gripper_position_w=lower.link.position_w)
    assert np.allclose(articulated.follow(held, lower, -1.0)[:3] @ [1, 0, 0], 0.0)
    assert articulated.follow(held, lower, -1.0)[1] < -0.5 and articulated.follow(held, lower, 1.0)[1] > 0.5
    hinge = Joint("hinge", 0.0, (-2.0, 0.0), UP, np.zeros(3), lower.link, "oven", {"close": (-0.01, np.inf)})
    for angle in np.radians([0, 60, 150]):
        here = replace(world, gripper_position_w=turned(angle) @ np.array([0.2, 0.0, 0.1]))
        step = articulated.follow(here, hinge, 1.0)[:3]
        after = here.gripper_position_w + 0.05 / motion.POSITION_GAIN * step
        assert np.linalg.norm(after[:2]) == pytest.approx(0.2, abs=1e-6), "the handle's distance from the hinge stays"
        assert np.cross(here.gripper_position_w, after)[2] > 0.0


def plates(*obstacles: tuple[float, float]) -> tuple[World, Region]:
    """A flat plate at the origin, a region 0.4 m away along y, and posts between."""
    bodies = {f"post_{index}": box((x, y, 0.1), (0.02, 0.02, 0.1)) for index, (x, y) in enumerate(obstacles)}
    world = world_with(plate=box((0.0, 0.0, 0.01), (0.08, 0.08, 0.01)), **bodies)
    return world, Region(np.array([0.0, 0.4, 0.0]), np.eye(3), np.array([0.04, 0.04, 0.01]))


def test_a_plate_is_dragged_straight_where_it_can_and_around_a_post_where_not():
    world, region = plates()
    assert np.allclose(dragging.next_point(world, "plate", region), region.position_w[:2], atol=0.04)
    world, region = plates((0.0, 0.2))
    place, visited = np.zeros(2), []
    for _ in range(6):
        there = replace(world, bodies={**world.bodies, "plate": box((*place, 0.01), (0.08, 0.08, 0.01))})
        place = dragging.next_point(there, "plate", region)
        visited.append(place)
        if region.box.contain(np.array([[*place, 0.0]])).any():
            break
    assert region.box.contain(np.array([[*place, 0.0]])).any() and len(visited) > 1
    ways = np.concatenate([np.linspace(a, b, 50) for a, b in zip([np.zeros(2), *visited], visited)])
    assert np.linalg.norm(np.maximum(np.abs(ways - [0.0, 0.2]) - 0.02, 0.0), axis=1).min() > 0.07, "the plate clears the post"


def test_free_legs_are_those_whose_points_lie_in_no_rectangle():
    generator = np.random.default_rng(0)
    low = generator.uniform(-1.0, 0.7, (4, 2))
    high = low + generator.uniform(0.1, 0.5, (4, 2))
    points = generator.uniform(-1.2, 1.4, (25, 2))
    free = dragging.is_free(points, points, low, high)
    for a, start in enumerate(points):
        for b, end in enumerate(points):
            way = start + np.linspace(0.0, 1.0, 400)[:, None] * (end - start)
            inside = ((way[:, None] > low + 2e-3) & (way[:, None] < high - 2e-3)).all(axis=2).any()
            touched = ((way[:, None] > low - 2e-3) & (way[:, None] < high + 2e-3)).all(axis=2).any()
            assert not (free[a, b] and inside) and (free[a, b] or touched)


def test_boxes_in_no_ones_way_change_no_step():
    world = world_with(gripper=(0.0, 0.0, 0.3))
    far = Boxes(np.array([[2.0, 2.0, 0.1]]), np.eye(3)[None], np.full((1, 3), 0.05))
    goal = np.array([0.2, 0.1, 0.2])
    steps = [motion.travel(world, goal, TOP_DOWN, OPEN, boxes) for boxes in (Boxes.joined(()), far)]
    np.testing.assert_array_equal(*steps)
