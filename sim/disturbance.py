"""What demonstrations should show the way back from: a hand that begins elsewhere, is pushed, or lets go of what it carries.

Both follow an episode's seed alone and know no simulator: the hand is brought elsewhere by the experts' own motion, before
anything is recorded, and a mishap replaces a few executed actions while the labels stay the expert's.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sim.boxes import UP, separations
from sim.environment import Environment, World
from sim.experts.geometry import MAX_OPENING, angles_between, hand_at, overreach, unit
from sim.experts.grasping import is_held
from sim.experts.motion import CLOSE, OPEN, servo, solids, travel
from vla.rotations import rotation_about

START_STREAM, MISHAP_STREAM = 1, 2  # of an episode's seed; the placement and the noise have their own

AROUND = np.array([0.12, 0.18, 0.1])  # m, half sizes of the box around the hand in which it begins
TURN, TILT = 0.7, 0.25  # rad, the most that it begins turned about the vertical, and tilted
ROOM = 0.02  # m, between the hand and everything else
TRIES = 100
CLOSING = 10  # control periods that shut the gripper
MOVE_STEPS = 80  # control periods, after which the hand begins where it has come to

PUSH_STEPS = 6  # control periods: about 6 cm
LET_GO_STEPS = 8  # control periods: fully open from 3 on
PUSH_WITHIN = 60  # control periods from the start, in which a push falls
CARRIED_FOR = 20  # control periods of holding, the most after which the hand lets go


class Actor(Protocol):
    """What acts in an episode: `NoisyExpert`, or one that a mishap befalls."""

    def act(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), float32 [7] each, in [-1, 1]."""
        ...


@dataclass(frozen=True)
class HandPose:
    """Where a hand begins."""

    position_w: np.ndarray  # [3] m, grip site
    rotation_w: np.ndarray  # [3, 3]
    closing_steps: int  # control periods of closing, 0 open to CLOSING shut


def draw_pose(world: World, generator: np.random.Generator) -> HandPose:
    """A pose around the present one, within comfortable reach, where the open hand meets nothing.

    Raises ValueError if TRIES draws find none.
    """
    obstacles = solids(world)
    for _ in range(TRIES):
        position = world.gripper_position_w + AROUND * generator.uniform(-1.0, 1.0, 3)
        lean = rotation_about(unit(np.array([*generator.standard_normal(2), 0.0])), TILT * generator.random())
        rotation = lean @ rotation_about(UP, TURN * generator.uniform(-1.0, 1.0)) @ world.gripper_rotation_w
        if overreach(world.shoulder_w, position[None], rotation[None])[0] > 0.0:
            continue
        gaps = separations(hand_at(position, rotation, MAX_OPENING), obstacles, within=ROOM)
        if gaps.min(initial=np.inf) > ROOM:
            return HandPose(position, rotation, int(generator.integers(CLOSING + 1)))
    raise ValueError(f"No free pose of the hand within {AROUND} m of {world.gripper_position_w} in {TRIES} draws.")


def begin_elsewhere(environment: Environment, seed: int) -> None:
    """After a reset: bring the hand to a random pose and the fingers to a random opening, under `seed`."""
    pose = draw_pose(environment.world(), np.random.default_rng([seed, START_STREAM]))
    for _ in range(MOVE_STEPS):
        world = environment.world()
        away = np.linalg.norm(pose.position_w - world.gripper_position_w)
        if away < 0.01 and angles_between(pose.rotation_w, world.gripper_rotation_w) < 0.05:
            break
        environment.step(travel(world, pose.position_w, pose.rotation_w, OPEN, solids(world)))
    for _ in range(pose.closing_steps):
        environment.step(servo(environment.world(), pose.position_w, pose.rotation_w, CLOSE))


class ClumsyActor:
    """In a share of all episodes the hand is pushed once, or made to let go in mid carry; the labels stay the expert's own.

    Whether, which and when follows the seed. A hand that never holds anything is never made to let go.
    """

    def __init__(self, actor: Actor, probability: float, seed: int):
        """probability: of a mishap in the episode, 0 to 1."""
        generator = np.random.default_rng([seed, MISHAP_STREAM])
        self._actor = actor
        self.befalls = bool(generator.random() < probability)
        self.is_push = bool(generator.random() < 0.5)
        direction = unit(generator.standard_normal(3))
        self._push = np.array([*direction[:2], abs(direction[2])])  # never down into the table
        self._wait = int(generator.integers(PUSH_WITHIN if self.is_push else CARRIED_FOR))
        self._left = (PUSH_STEPS if self.is_push else LET_GO_STEPS) if self.befalls else 0
        self.intervenes = False  # whether the last action was the mishap's

    def act(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """See `Actor.act`."""
        executed, label = self._actor.act(world)
        self.intervenes = self._left > 0 and self._wait == 0
        if not self.intervenes:
            waits = self._left > 0 and (self.is_push or any(is_held(world, body) for body in world.bodies.values()))
            self._wait -= int(waits)
            return executed, label
        self._left -= 1
        executed = executed.copy()
        if self.is_push:
            executed[:3] = self._push
        else:
            executed[6] = OPEN
        return executed, label
