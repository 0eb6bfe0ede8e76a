"""Laws of the scripted experts: bounded labels for any state, grasps that fit, recovery, and success in simulation."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sim.boxes import overlaps
from sim.environment import Body, Region, World
from sim.experts import articulated, measure
from sim.experts.geometry import HOME_FINGER_AXIS, TIP_LENGTH, angle_between_lines, swept_boxes, tilted
from sim.experts.grasping import Grasp, choose_grasp
from sim.experts.inserting import TILTS, entrance, spot_under
from sim.experts.motion import CLOSE, MAX_SPEED, MAX_TURN, OPEN, solids
from sim.experts.programs import GoalExpert, NoisyExpert, build_expert
from sim.experts.spots import place_in, spot_on
from sim.libero import find_assets
from sim.seeds import start
from sim.suites import build_environment
from tests.point_world import build_point_world, point_expert
from tests.worlds import TOP_DOWN, basket, box, build_oven, door, drawer, random_rotation, world_with

def grasp_of(world: World, name: str) -> Grasp:
    return choose_grasp(world, world.bodies[name], solids(world, without=(name,)))


def finger_axis(grasp: Grasp) -> np.ndarray:
    return grasp.rotation_w[:, 1]


@pytest.mark.parametrize("goal", [(("lifted", "a"),), (("on", "a", "b"),), (("in", "a", "b"),)])
def test_any_state_has_a_bounded_label(goal):
    generator = np.random.default_rng(0)
    for _ in range(40):
        bodies = {
            name: Body(
                generator.uniform(-0.3, 0.3, 3),
                random_rotation(generator),
                generator.uniform(0.005, 0.035, 3),
                tuple(generator.random(2) < 0.5),
            )
            for name in ("a", "b")
        }
        width = generator.uniform(0, 0.08)
        regions = {"b": Region(bodies["b"].position_w, bodies["b"].rotation_w, bodies["b"].half_extents)}
        place = generator.uniform(-0.3, 0.3, 3)
        world = World(place, random_rotation(generator), width, bodies, goal, (False,), regions if goal[0][0] == "in" else {})
        check_label(world)


def check_label(world: World) -> np.ndarray:
    """The expert's action at a state, which has no memory and keeps to its bounds."""
    action = GoalExpert().action(world)
    np.testing.assert_array_equal(GoalExpert().action(world), action)
    assert action.shape == (7,) and action.dtype == np.float32
    assert np.linalg.norm(action[:3]) <= MAX_SPEED + 1e-6
    assert np.linalg.norm(action[3:6]) <= MAX_TURN + 1e-6
    assert action[6] in (-1.0, 1.0)
    return action


def states_of(world: World, count: int, *, near: np.ndarray) -> Iterator[World]:
    """The world with its hand at random poses within 0.25 m of a point, more or less open, touching this and that."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        touched = {
            name: replace(body, touches_fingers=tuple(generator.random(2) < 0.5)) for name, body in world.bodies.items()
        }
        joints = {
            name: replace(joint, link=replace(joint.link, touches_fingers=tuple(generator.random(2) < 0.5)))
            for name, joint in world.joints.items()
        }
        rotation = TOP_DOWN if generator.random() < 0.5 else random_rotation(generator)
        place, width = near + generator.uniform(-0.25, 0.25, 3), generator.uniform(0, 0.08)
        yield replace(
            world, bodies=touched, joints=joints, gripper_position_w=place, gripper_rotation_w=rotation, gripper_width=width
        )


@pytest.mark.parametrize("name", ["oven", "drawer", "filled drawer", "door", "door ajar", "plate"])
def test_any_state_of_the_hand_near_a_fixture_has_a_bounded_label(name):
    oven, inside = build_oven(roof=0.1)
    cup = box((0.0, -0.1, 0.4), (0.03, 0.03, 0.05))
    plate, table = box((0.1, 0.0, 0.01), (0.1, 0.1, 0.01)), Region(np.array([0.0, 0.3, 0.0]), np.eye(3), np.array([0.1, 0.1, 0.01]))
    worlds = {
        "oven": replace(world_with(goal=(("in", "cup", "room"),), oven=oven, cup=cup), regions={"room": inside}, achieved=(False,)),
        "drawer": replace(drawer(0.05), goal=(("in", "bowl", "room"),), achieved=(False,)),
        "filled drawer": replace(drawer(0.15), goal=(("in", "bowl", "room"), ("close", "room")), achieved=(True, False)),
        "door": door(0.1),
        "door ajar": door(1.0),
        "plate": replace(world_with(goal=(("on", "plate", "place"),), plate=plate), regions={"place": table}, achieved=(False,)),
    }
    world = worlds[name]
    middle = next(iter(world.bodies.values())).position_w
    for state in states_of(world, 12, near=middle):
        check_label(state)


def test_grasp_closes_along_the_side_that_fits():
    world = world_with(box=box((0, 0, 0.01), (0.021, 0.041, 0.009)))
    grasp = grasp_of(world, "box")
    assert np.allclose(np.abs(finger_axis(grasp)), [1, 0, 0], atol=0.02) and grasp.width == pytest.approx(0.042, abs=0.004)
    assert grasp.position_w[2] - TIP_LENGTH > 0.0  # the finger tips stay above what the box lies on


@pytest.mark.parametrize("yaw", np.radians([-80, -50, -40, -10, 10, 40, 50, 80]))
def test_cube_is_grasped_with_the_smallest_turn(yaw):
    grasp = grasp_of(world_with(box=box((0, 0, 0.02), (0.02, 0.02, 0.02), yaw)), "box")
    assert angle_between_lines(finger_axis(grasp), HOME_FINGER_AXIS) < np.radians(45.1)


def test_fingers_avoid_a_neighbour():
    cube, neighbour = box((0, 0, 0.02), (0.02, 0.02, 0.02)), box((0, 0.055, 0.025), (0.025, 0.025, 0.025))
    grasp = grasp_of(world_with(box=cube, neighbour=neighbour), "box")
    assert np.allclose(np.abs(finger_axis(grasp)), [1, 0, 0], atol=0.02)


def test_missed_grasp_reopens_and_rises():
    at_grasp = grasp_of(world_with(box=box((0, 0, 0.02), (0.02, 0.02, 0.02))), "box").position_w
    closed_on_nothing = world_with(at_grasp, width=0.0, box=box((0, 0, 0.02), (0.02, 0.02, 0.02)))
    action = GoalExpert().action(closed_on_nothing)
    assert action[6] == OPEN and action[2] > 0.3


def test_unknown_goal_says_which_programs_exist():
    with pytest.raises(ValueError, match="lifted"):
        GoalExpert().action(world_with(goal=(("polish", "stove"),), box=box((0, 0, 0), (0.1, 0.1, 0.1))))


def test_noise_disturbs_motion_and_never_the_label():
    world = world_with(box=box((0.1, 0, 0.02), (0.02, 0.02, 0.02)))
    executed, label = NoisyExpert(GoalExpert(), 0.2, seed=1).act(world)
    again, _ = NoisyExpert(GoalExpert(), 0.2, seed=1).act(world)
    assert np.array_equal(label, GoalExpert().action(world)) and np.array_equal(executed, again)
    assert not np.allclose(executed[:6], label[:6]) and executed[6] == label[6]


def test_lift_succeeds_and_is_stored(tmp_path, capsys):
    path = tmp_path / "lift.json"
    assert measure.main(["--suite=robosuite_lift", "--episodes=2", f"--output={path}"]) == 0
    results = json.loads(path.read_text())
    assert results["all"]["successes"] == 2 and results["all"]["max_steps"] <= 45
    assert "2/2" in capsys.readouterr().out


def test_lift_recovers_from_a_dropped_cube():
    environment = build_environment("robosuite_lift")
    environment.reset(0, start("validation", 0))
    expert, held = build_expert(environment, 0), 0
    for _ in range(150):
        world = environment.world()
        held += all(world.bodies["cube"].touches_fingers)
        action = expert.action(world)
        if 1 <= held <= 2:  # let go as soon as it is held
            action[6] = OPEN
        if environment.step(action):
            break
    else:
        pytest.fail("the cube was never lifted again")
    environment.close()


def test_attempts_depend_on_neither_workers_nor_interruptions(tmp_path):
    def attempts(name: str, **changes) -> list[tuple]:
        settings = dict(tasks=[0, 1], episodes=3, max_steps=40, output=tmp_path / f"{name}.json", **changes)
        rows = measure.measure(measure.MeasureConfig("libero_object", **settings), build=build_point_world, expert=point_expert)
        return [(row.task, row.index, row.success, row.steps) for row in rows[1]]

    first = attempts("one")
    assert [row[:2] for row in first] == [(task, index) for task in (0, 1) for index in range(3)]
    rows = (tmp_path / "one.rows.jsonl").read_text().splitlines(keepends=True)
    stored = json.loads(rows[2]) | {"steps": 999}  # a resumed run takes what is stored
    (tmp_path / "two.rows.jsonl").write_text("".join(rows[:2]) + json.dumps(stored) + "\n")
    resumed = attempts("two", workers=2)
    assert [row for row in resumed if row[3] != 999] == [row for row in first if row[:2] != (stored["task"], stored["index"])]
    with pytest.raises(ValueError, match="noise was 0.0, is 0.1"):
        attempts("two", noise=0.1)


def test_what_is_held_inside_the_basket_is_let_go_before_the_next_thing_is_fetched():
    walls, room = basket()
    first = box(room.position_w - [0, 0, 0.03], (0.02, 0.02, 0.02), touches=(True, True))
    second = box((0.2, -0.2, 0.02), (0.02, 0.02, 0.02))
    goal = (("in", "first", "room"), ("in", "second", "room"))
    bodies = {"first": first, "second": second, "basket": walls}
    held = World(first.position_w, TOP_DOWN, 0.04, bodies, goal, (True, False), {"room": room})
    action = GoalExpert().action(held)
    assert action[2] < 0.0 or action[6] == OPEN, "down, or let go; not off to the second thing"
    assert np.abs(action[:2]).max() < 0.2
    alone = World(first.position_w + [0, 0, 0.3], TOP_DOWN, 0.078, bodies, goal, (True, False), {"room": room})
    assert GoalExpert().action(alone)[1] < -0.3, "towards the second thing"


def test_two_things_on_one_region_leave_room_for_each_other():
    stove = Region(np.array([0.0, 0.0, 0.02]), np.eye(3), np.array([0.075, 0.075, 0.002]), owner="stove")
    top = box((0.0, 0.0, 0.01), (0.09, 0.09, 0.01))
    first, second = box((0.2, 0.2, 0.06), (0.04, 0.07, 0.06)), box((-0.2, 0.2, 0.06), (0.04, 0.07, 0.06))
    goal = (("on", "first", "stove"), ("on", "second", "stove"))
    world = world_with(goal=goal, first=first, second=second, stove=top)
    world = replace(world, regions={"stove": stove})
    spot = spot_on(world, stove, "first")
    assert np.linalg.norm(spot[:2]) > 0.04, "not in the middle, where the second would not fit beside it"
    there = replace(world, bodies={**world.bodies, "first": box((*spot[:2], 0.08), (0.04, 0.07, 0.06))})
    other = spot_on(there, stove, "second")
    assert abs(spot - other)[0] > 0.08 or abs(spot - other)[1] > 0.14
    alone = replace(world, goal=goal[:1])
    assert np.linalg.norm(spot_on(alone, stove, "first")[:2]) < 1e-6


def test_a_roofed_region_is_entered_through_its_open_side():
    oven, inside = build_oven(roof=0.1)
    world = world_with(oven=oven, cup=box((0.0, -0.1, 0.4), (0.03, 0.03, 0.05)))
    assert np.allclose(entrance(world, inside), [0, 1, 0])
    spot = spot_under(world, inside, world.bodies["cup"], np.array([0.0, 1.0, 0.0]))
    floor = oven.position_w[2] - 0.09
    assert abs(spot[0] - 0.1) < 0.01 and 0.2 < spot[1] < 0.4 and 0.0 < spot[2] - 0.05 - floor < 0.03
    open_above = replace(oven, shape=oven.shape[np.array([0, 2, 3, 4])])
    assert entrance(replace(world, bodies={**world.bodies, "oven": open_above}), inside) is None


def test_a_hand_that_reaches_under_a_roof_meets_nothing_there():
    oven, inside = build_oven(roof=0.07)
    cup, inward = box((0.0, -0.1, 0.46), (0.03, 0.03, 0.06)), np.array([0.0, 1.0, 0.0])
    world = world_with(oven=oven, cup=cup)
    shift = spot_under(world, inside, cup, inward) - cup.origin_w
    grasp = choose_grasp(
        world, cup, oven.parts, approaches=[tilted(inward, tilt) for tilt in TILTS], shift=shift, drops=(0.0,)
    )
    there = swept_boxes((grasp.position_w + shift)[None], grasp.rotation_w[None])
    assert not overlaps(there, oven.parts).any()
    from_above = choose_grasp(world, cup, oven.parts, approaches=[tilted(inward, tilt) for tilt in TILTS], shift=shift)
    there = swept_boxes((from_above.position_w + shift)[None], from_above.rotation_w[None])
    assert overlaps(there, oven.parts).any(), "the law says something: a hand that may drop the cup through the roof would"


def test_a_drawer_is_filled_where_no_handle_hangs_over_it():
    world = drawer(0.15)
    room = world.regions["room"]
    place = place_in(world, room, "bowl")
    assert place.yaw == 0.0
    spot = place.position_w
    assert spot[2] == room.position_w[2], "moved on the level only, whichever way the region's own axes point"
    assert spot[1] + 0.05 < 0.181 and spot[1] - 0.05 > 0.074, "between the handle above and the drawer's own front"


def test_the_hand_that_pushes_a_drawer_leans_less_with_a_rack_behind_it():
    downwards = [
        -articulated.roomiest(world, "lower", *articulated.contact_point(world.joints["lower"], np.array([0.0, 1.0, 0.0])))[2]
        for world in (drawer(0.15), drawer(0.15, rack_at=-0.12), drawer(0.15, rack_at=-0.5))
    ]
    assert downwards[1] > downwards[0] + 0.2 and downwards[2] == downwards[0]


def test_a_door_is_pulled_at_first_and_pushed_from_behind_once_ajar():
    assert GoalExpert().action(door(0.1))[6] == OPEN, "the hand comes open, to take hold"
    ajar = door(1.0)
    assert GoalExpert().action(ajar)[6] == CLOSE, "closed fingers push"
    joint = ajar.joints["hinge"]
    outward = articulated.outward_direction(ajar, joint)
    contact, _ = articulated.contact_point(joint, outward)
    assert (contact - joint.link.position_w) @ outward < 0.0, "from the side of the oven"


@pytest.mark.skipif(find_assets() is None, reason="LIBERO's assets are not on this machine (set REMASK_LIBERO_ASSETS)")
def test_libero_flat_box_goes_into_the_basket():
    environment = build_environment("libero_object")
    config = measure.MeasureConfig("libero_object", tasks=[1], episodes=1)
    attempt = measure.attempt(environment, build_expert, config, measure.Job(1, 0))
    environment.close()
    assert attempt.success and attempt.steps <= 110
