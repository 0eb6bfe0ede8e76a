"""Laws of the scripted experts: bounded labels for any state, grasps that fit, recovery, and success in simulation."""

import json

import numpy as np
import pytest

from sim.environment import Body, Region, World
from sim.experts import measure
from sim.experts.geometry import HOME_FINGER_AXIS, TIP_LENGTH, angle_between_lines
from sim.experts.grasping import Grasp, choose_grasp
from sim.experts.motion import MAX_SPEED, MAX_TURN, OPEN, solids
from sim.experts.programs import GoalExpert, NoisyExpert, build_expert
from sim.libero import find_assets
from sim.seeds import start
from sim.suites import build_environment

TOP_DOWN = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])  # fingers along world y


def turned(yaw: float) -> np.ndarray:
    """Rotation about world z, [3, 3]."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def world_with(gripper=(0.0, 0.0, 0.3), width=0.078, goal=(("lifted", "box"),), **bodies: Body) -> World:
    return World(np.array(gripper), TOP_DOWN, width, bodies, goal)


def box(position, half_extents, yaw=0.0, touches=(False, False)) -> Body:
    return Body(np.array(position, float), turned(yaw), np.array(half_extents), touches)


def grasp_of(world: World, name: str) -> Grasp:
    return choose_grasp(world, world.bodies[name], solids(world, without=(name,)))


def finger_axis(grasp: Grasp) -> np.ndarray:
    return grasp.rotation_w[:, 1]


def random_rotation(generator: np.random.Generator) -> np.ndarray:
    matrix, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


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
        action = GoalExpert().action(world)
        np.testing.assert_array_equal(GoalExpert().action(world), action)  # no memory
        assert action.shape == (7,) and action.dtype == np.float32
        assert np.linalg.norm(action[:3]) <= MAX_SPEED + 1e-6
        assert np.linalg.norm(action[3:6]) <= MAX_TURN + 1e-6
        assert action[6] in (-1.0, 1.0)


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


@pytest.mark.skipif(find_assets() is None, reason="LIBERO's assets are not on this machine (set REMASK_LIBERO_ASSETS)")
def test_libero_flat_box_goes_into_the_basket():
    environment = build_environment("libero_object")
    config = measure.MeasureConfig("libero_object", tasks=[1], episodes=1)
    (attempt,) = measure.measure(environment, config)
    environment.close()
    assert attempt.success and attempt.steps <= 110
