"""The real simulators: starts repeat bit for bit; steps, states and pictures are robosuite's and LIBERO's own."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("robosuite")

from sim.environment import Environment
from sim.robosuite_env import Arm, import_robosuite, make_options, seeded_numpy
from sim.seeds import Start, start
from sim.suites import CAMERA_NAMES, build_environment

IMAGE_SIZE = 64
STILL = np.zeros(7)
CLOSE = np.array([0, 0, 0, 0, 0, 0, 1.0])

# Run by a fresh process: no answer on standard input, the digest of one start on standard output.
DIGEST_PROGRAM = """
import sys
from sim.seeds import start
from sim.suites import build_environment
from tests.test_environments import digest
suite, task, split, index = sys.argv[1:]
environment = build_environment(suite, image_size=64)
print(digest(environment, int(task), start(split, int(index))))
print("torch imported:", "torch" in sys.modules)
"""


def digest(environment: Environment, task: int, begin: Start) -> str:
    """Hash of the whole simulator state, proprioception and pictures at `begin` and five moving steps later."""
    seen = hashlib.sha256()
    environment.reset(task, begin)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    for action in (None, *actions):
        if action is not None:
            environment.step(action)
        data = environment._arm.data
        for array in (data.qpos, data.qvel, data.qacc_warmstart, data.ctrl, environment.state()):
            seen.update(array.tobytes())
    for image in environment.observe().images.values():
        seen.update(image.tobytes())
    return seen.hexdigest()


def digest_in_new_process(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", DIGEST_PROGRAM, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def lift():
    environment = build_environment("robosuite_lift", image_size=IMAGE_SIZE)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def stack():
    environment = build_environment("robosuite_stack", image_size=IMAGE_SIZE)
    yield environment
    environment.close()


def libero_environment(suite: str):
    pytest.importorskip("libero")
    from sim.libero import find_assets

    if find_assets() is None:
        pytest.skip("no LIBERO assets on this machine (set REMASK_LIBERO_ASSETS)")
    return build_environment(suite, image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def libero_object():
    environment = libero_environment("libero_object")
    yield environment
    environment.close()


def test_a_lift_start_is_the_same_after_other_episodes_and_in_another_process(lift):
    begin = start("validation", 3)
    first = digest(lift, 0, begin)
    for index in range(2):
        digest(lift, 0, start("train", index))
        for _ in range(5):
            lift.step(CLOSE)
    assert digest(lift, 0, begin) == first
    assert digest_in_new_process("robosuite_lift", "0", "validation", "3") == [first, "torch imported: False"]
    assert digest(lift, 0, start("validation", 4)) != first


def test_a_reset_leaves_numpys_global_generator_alone(lift):
    np.random.seed(5)
    expected = np.random.RandomState(5).uniform(size=3)
    lift.reset(0, start("train", 0))
    assert np.array_equal(np.random.uniform(size=3), expected)


@pytest.mark.parametrize("name", ["Lift", "Stack"])
def test_stepping_agrees_with_robosuite(name):
    """Bit for bit with robosuite's redundant mj_forward passes put back; to solver accuracy without them."""
    import mujoco

    robosuite = import_robosuite()
    with seeded_numpy(0):
        reference = robosuite.make(name, robots="Panda", **make_options())
    with seeded_numpy(0):
        ours = Arm(robosuite.make(name, robots="Panda", **make_options()), {})
    actions = np.random.default_rng(1).uniform(-1, 1, (20, 7))
    for repeat_passes in (True, False):
        with seeded_numpy(7):
            reference.reset()
        reference.robots[0].gripper.current_action = np.zeros(1)  # robosuite forgets it only with the model
        ours.reset(7)
        control, model, data = ours._control, ours.model, ours.data
        for index, action in enumerate(actions):
            observed = reference.step(action)[0]
            if not repeat_passes:
                ours.step(action)
                continue
            for substep in range(25):
                mujoco.mj_forward(model, data)
                if index or substep:  # robosuite's controller does not look before it has run once
                    mujoco.mj_forward(model, data)
                control._apply(action, new_goal=substep == 0)
                mujoco.mj_step(model, data)
        theirs = reference.sim.data._data
        if repeat_passes:
            assert np.array_equal(data.qpos, theirs.qpos) and np.array_equal(data.qvel, theirs.qvel)
        else:
            assert np.abs(data.qpos - theirs.qpos).max() < 1e-9
            assert np.abs(ours.state()[:3] - observed["robot0_eef_pos"]).max() < 1e-6
            assert np.abs(ours.state()[6:] - observed["robot0_gripper_qpos"]).max() < 1e-6


def test_frames_equal_robosuites_pixel_for_pixel(lift):
    """Geoms out of view are left out of the scene; nothing seen directly or in the floor's reflection may change."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    sim = lift._arm.environment.sim
    theirs = MjRenderContextOffscreen(sim, device_id=-1)
    theirs.vopt.geomgroup[0], theirs.vopt.geomgroup[1] = 0, 1
    lift.reset(0, start("train", 1))
    for action in np.random.default_rng(2).uniform(-1, 1, (3, 7)):
        for _ in range(8):
            lift.step(action)
        for camera in CAMERA_NAMES.values():
            theirs.gl_ctx.make_current()
            expected = sim.render(camera_name=camera, width=96, height=96)[::-1]
            assert np.array_equal(lift.render(camera, 96), expected), camera
    sim._render_context_offscreen = None


def test_stepping_draws_nothing(lift, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a camera was rendered")

    lift.reset(0, start("train", 0))
    monkeypatch.setattr(lift._arm._renderer, "frame", refuse)
    lift.step(STILL)
    lift.state()
    lift.world()


def test_the_gripper_closes_on_plus_one_and_a_new_episode_forgets_it(lift):
    lift.reset(0, start("train", 0))
    width = lift.world().gripper_width
    for _ in range(10):
        lift.step(CLOSE)
    assert lift.world().gripper_width < 0.005 < width
    lift.reset(0, start("train", 0))
    lift.step(-CLOSE)
    assert lift.world().gripper_width > width


def test_actions_move_the_gripper_along_the_world_axes(lift):
    for axis in range(3):
        lift.reset(0, start("train", 0))
        before = lift.world().gripper_position_w
        action = -CLOSE
        action[axis] = 0.5
        for _ in range(10):
            lift.step(action)
        moved = lift.world().gripper_position_w - before
        assert np.argmax(np.abs(moved)) == axis and moved[axis] > 0.05


def test_the_world_holds_the_cube_that_mujoco_holds(lift):
    lift.reset(0, start("train", 2))
    world, model, data = lift.world(), lift._arm.model, lift._arm.data
    cube = world.bodies["cube"]
    assert np.allclose(cube.half_extents, model.geom("cube_g0").size, atol=1e-9)
    assert np.allclose(cube.position_w, data.body("cube_main").xpos)
    fingers = [data.geom(f"gripper0_finger{finger}_pad_collision").xpos for finger in (1, 2)]
    closing = (fingers[1] - fingers[0]) / np.linalg.norm(fingers[1] - fingers[0])
    assert abs(closing @ world.gripper_rotation_w[:, 1]) > 0.99
    assert world.gripper_rotation_w[2, 2] < -0.9  # the approach points down


def test_stack_places_both_cubes_anew_for_each_start(stack):
    positions = []
    for index in range(3):
        stack.reset(0, start("train", index))
        positions.append([stack.world().bodies[name].position_w for name in ("cubeA", "cubeB")])
    assert np.ptp(np.array(positions), axis=0)[..., :2].min() > 1e-3
    assert not stack.step(STILL)


@pytest.mark.parametrize("suite", ["robosuite_can", "robosuite_door"])
def test_a_start_of_the_can_or_the_door_is_the_same_after_another_and_differs_from_it(suite):
    environment = build_environment(suite, image_size=IMAGE_SIZE)
    first, other = (digest(environment, 0, start("train", index)) for index in (0, 1))
    assert digest(environment, 0, start("train", 0)) == first != other
    environment.close()


def test_the_can_is_in_its_bin_by_its_place_alone_and_success_waits_for_the_hand():
    environment = build_environment("robosuite_can", image_size=IMAGE_SIZE)
    environment.reset(0, start("train", 0))
    assert environment.world().achieved == (False,)
    region, data = environment.world().regions["can_bin"], environment.arm.data
    address = environment.arm.model.joint("Can_joint0").qposadr[0]
    for away, success in ((0.02, False), (0.1, True)):
        environment.arm.data.qpos[address : address + 3] = region.position_w
        environment.arm.forward()
        hand = environment.arm.environment.robots[0].eef_site_id
        data.site_xpos[hand] = region.position_w + [0.0, 0.0, away]
        assert environment.world().achieved == (True,)
        assert environment.arm.environment._check_success() == success
    environment.arm.data.qpos[address : address + 3] = region.position_w + [0.0, 1.01 * region.half_extents[1], 0.0]
    environment.arm.forward()
    assert environment.world().achieved == (False,)
    environment.close()


def test_an_unknown_task_or_camera_is_named(lift):
    with pytest.raises(ValueError, match="allowed: 0 to 0"):
        lift.reset(1, start("train", 0))
    with pytest.raises(ValueError, match="agentview"):
        lift.render("overhead", 32)


def test_a_libero_start_is_the_same_after_other_episodes_and_in_another_process(libero_object):
    """The new process also shows that libero asks nothing (standard input is closed) and that no torch is imported."""
    begin = start("train", 11)
    first = digest(libero_object, 2, begin)
    digest(libero_object, 2, start("official", 3))
    assert digest(libero_object, 2, begin) == first
    assert digest_in_new_process("libero_object", "2", "train", "11") == [first, "torch imported: False"]


def test_an_official_libero_start_equals_liberos_own_loop(libero_object):
    """State, both pictures and the success signal of OffScreenRenderEnv, which rebuilds the model on reset."""
    from sim.libero import import_libero, libero_folder

    task, index = 2, 1
    libero_object.reset(task, start("train", 5))
    libero_object.reset(task, start("official", index))
    bddl = libero_folder() / "bddl_files" / "libero_object" / f"{libero_object._names[task]}.bddl"
    with seeded_numpy(start("official", index).seed):
        theirs = import_libero().OffScreenRenderEnv(
            bddl_file_name=str(bddl), camera_heights=IMAGE_SIZE, camera_widths=IMAGE_SIZE
        )
        theirs.reset()
    observed = theirs.set_init_state(libero_object._states[index])
    for _ in range(10):
        observed = theirs.step([0, 0, 0, 0, 0, 0, -1])[0]
    ours = libero_object.observe()
    assert np.abs(ours.state[:3] - observed["robot0_eef_pos"]).max() < 1e-6
    assert np.abs(ours.state[6:] - observed["robot0_gripper_qpos"]).max() < 1e-6
    for camera, name in CAMERA_NAMES.items():
        difference = ours.images[camera].astype(int) - observed[f"{name}_image"][::-1, ::-1]
        # the solver's other first guess may move an edge by less than a pixel's sample
        assert (difference != 0).mean() < 1e-3, camera
    theirs.close()


def test_libero_training_starts_are_spread_like_the_official_ones(libero_object):
    """Arm joints at the end of a reset deviate by what LIBERO's stored states deviate by (0.02 rad)."""
    libero_object.reset(2, start("train", 0))
    joints = libero_object._arm.environment.robots[0]._ref_joint_pos_indexes
    stored = libero_object._states[:, 1 + np.array(joints)]
    drawn = []
    for index in range(12):
        libero_object.reset(2, start("train", index))
        drawn.append(libero_object._arm.data.qpos[joints].copy())
    assert np.abs(np.mean(drawn, axis=0) - stored.mean(axis=0)).max() < 0.03
    assert 0.5 < np.std(drawn, axis=0).mean() / stored.std(axis=0).mean() < 1.5


def test_libero_world_names_the_goal_and_where_it_is(libero_object):
    libero_object.reset(2, start("train", 0))
    world = libero_object.world()
    ((predicate, thing, region),) = world.goal
    assert (predicate, region) == ("in", "basket_1_contain_region")
    inside = world.regions[region].position_w - world.bodies["basket_1"].position_w
    assert np.linalg.norm(inside[:2]) < 0.02
    assert 0.01 < world.bodies[thing].half_extents.max() < 0.1


def test_objects_stay_in_a_libero_drawer_that_the_last_episode_moved():
    """libero_spatial's task 4 samples a bowl into a cabinet's drawer, and the cabinet itself; the model is kept."""
    spatial = libero_environment("libero_spatial")
    for index in range(3):
        spatial.reset(4, start("train", index))
        bodies = spatial.world().bodies
        offset = bodies["akita_black_bowl_1"].position_w - spatial.world().regions["wooden_cabinet_1_top_region"].position_w
        assert np.abs(offset).max() < 0.02
    spatial.close()
