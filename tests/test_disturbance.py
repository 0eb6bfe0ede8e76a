"""Random starts and mishaps of demonstrations: under the seed, free and within reach, and never in the labels."""

import numpy as np
import pytest

from sim.boxes import separations
from sim.disturbance import (
    AROUND,
    LET_GO_STEPS,
    PUSH_STEPS,
    ROOM,
    ClumsyActor,
    begin_elsewhere,
    draw_pose,
)
from sim.environment import Body, World
from sim.experts.geometry import MAX_OPENING, hand_at, overreach
from sim.experts.motion import OPEN, solids
from sim.experts.programs import GoalExpert, NoisyExpert
from sim.seeds import start
from sim.suites import build_environment

TOP_DOWN = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])


def world_of_boxes(held: bool = False) -> World:
    """A table, a wall beside the hand, and a cube on the table or in the closed hand."""
    hand, width = np.array([0.0, 0.0, 0.2]), 0.04 if held else 0.078
    bodies = {
        "table": Body(np.array([0.0, 0.0, -0.05]), np.eye(3), np.array([0.5, 0.5, 0.05])),
        "wall": Body(np.array([0.0, 0.2, 0.2]), np.eye(3), np.array([0.5, 0.02, 0.2])),
        "cube": Body(hand if held else np.array([0.1, -0.1, 0.02]), np.eye(3), np.full(3, 0.02), (held, held)),
    }
    return World(hand, TOP_DOWN, width, bodies, (("lifted", "cube"),), (False,), shoulder_w=np.array([-0.5, 0.0, 0.3]))


class Closing:
    """sim.disturbance.Actor: stands still and closes the fingers."""

    ACTION = np.array([0, 0, 0, 0, 0, 0, 1.0], np.float32)

    def act(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        return self.ACTION, self.ACTION


def clumsy(seed: int, probability: float = 1.0) -> ClumsyActor:
    return ClumsyActor(Closing(), probability, seed)


def a_seed(is_push: bool) -> int:
    return next(seed for seed in range(100) if clumsy(seed).is_push == is_push)


def test_a_random_start_is_free_and_within_reach_and_follows_its_seed():
    world = world_of_boxes()
    drawn = []
    for seed in range(20):
        pose = draw_pose(world, np.random.default_rng(seed))
        again = draw_pose(world, np.random.default_rng(seed))
        assert np.array_equal(pose.position_w, again.position_w) and np.array_equal(pose.rotation_w, again.rotation_w)
        assert (np.abs(pose.position_w - world.gripper_position_w) <= AROUND).all()
        assert np.allclose(pose.rotation_w @ pose.rotation_w.T, np.eye(3)) and np.linalg.det(pose.rotation_w) > 0
        assert overreach(world.shoulder_w, pose.position_w[None], pose.rotation_w[None])[0] == 0.0
        hand = hand_at(pose.position_w, pose.rotation_w, MAX_OPENING)
        assert separations(hand, solids(world), within=ROOM).min(initial=np.inf) > ROOM
        drawn.append([*pose.position_w, pose.closing_steps])
    assert (np.ptp(drawn, axis=0) > [0.05, 0.05, 0.05, 4]).all()


def test_a_hand_walled_in_is_an_error_that_says_where():
    around = Body(np.array([0.0, 0.0, 0.2]), np.eye(3), np.full(3, 0.6))
    with pytest.raises(ValueError, match="No free pose"):
        draw_pose(World(np.array([0.0, 0.0, 0.2]), TOP_DOWN, 0.078, {"block": around}, ()), np.random.default_rng(0))


@pytest.mark.parametrize("is_push", [True, False])
def test_a_mishap_changes_what_is_executed_for_a_while_and_never_the_label(is_push):
    actor, world = clumsy(a_seed(is_push)), world_of_boxes(held=True)
    changed = 0
    for _ in range(100):
        executed, label = actor.act(world)
        np.testing.assert_array_equal(label, Closing.ACTION)
        assert executed.dtype == np.float32 and (np.abs(executed) <= 1.0).all()
        assert actor.intervenes != np.array_equal(executed, label)
        changed += actor.intervenes
        if not is_push and executed[6] != label[6]:
            assert executed[6] == OPEN and np.array_equal(executed[:6], label[:6])
    assert changed == (PUSH_STEPS if is_push else LET_GO_STEPS)


def test_an_empty_hand_is_never_made_to_let_go():
    actor, world = clumsy(a_seed(is_push=False)), world_of_boxes()
    for _ in range(100):
        executed, label = actor.act(world)
        np.testing.assert_array_equal(executed, label)


def test_mishaps_befall_the_share_of_episodes_asked_for():
    assert not any(clumsy(seed, 0.0).befalls for seed in range(200))
    assert all(clumsy(seed, 1.0).befalls for seed in range(200))
    befalls = [clumsy(seed, 0.3).befalls for seed in range(1000)]
    assert abs(np.mean(befalls) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)
    pushes = [clumsy(seed).is_push for seed in range(1000)]
    assert abs(np.mean(pushes) - 0.5) < 4 * np.sqrt(0.25 / 1000)


def test_the_expert_lifts_the_cube_from_elsewhere_and_after_each_mishap():
    pytest.importorskip("robosuite")
    environment = build_environment("robosuite_lift")
    for is_push in (True, False):
        seed = a_seed(is_push)
        environment.reset(0, start("train", seed))
        before = environment.world().gripper_position_w
        begin_elsewhere(environment, seed)
        begun = environment.world()
        assert np.linalg.norm(begun.gripper_position_w - before) > 0.03
        actor = ClumsyActor(NoisyExpert(GoalExpert(), 0.0, seed), 1.0, seed)
        for _ in range(150):
            executed, _ = actor.act(environment.world())
            if environment.step(executed):
                break
        else:
            pytest.fail(f"the cube was not lifted from training start {seed} (push: {is_push})")
    environment.close()
