"""The moments of one episode that the corpus tells of: a start, usually rearranged, and what happens along a motion."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from sim.environment import Environment, World
from sim.experts.programs import Expert, GoalExpert, build_expert
from sim.experts.geometry import DOWN, MAX_OPENING, hand_rotation, horizontal
from sim.experts.motion import CLOSE, OPEN, servo
from sim.robosuite_env import OPEN_GRIPPER
from sim.scene_reader import SceneReader
from sim.scene_shuffle import shuffle
from sim.scene_state import Scene
from sim.seeds import Start

SHUFFLE_CHANCE = 0.8
SETTLE_STEPS = 6
MOTIONS = ("task", "another", "wander")
PERIODS_PER_TARGET = 25  # of a wandering hand


class Wander:
    """An expert of nothing: the hand goes to one random point above or beside a thing after another."""

    def __init__(self, names: tuple[str, ...], generator: np.random.Generator) -> None:
        self._names, self._generator, self._steps = names, generator, 0
        self._target, self._gripper = np.zeros(3), OPEN

    def action(self, world: World) -> np.ndarray:
        if self._steps % PERIODS_PER_TARGET == 0:
            body = world.bodies[self._names[self._generator.integers(len(self._names))]]
            offset = self._generator.uniform((-0.08, -0.08, 0.01), (0.08, 0.08, 0.2))
            self._target = np.array([*body.position_w[:2], body.parts.top]) + offset
            self._gripper = (OPEN, CLOSE)[self._generator.integers(2)]
        self._steps += 1
        upright = hand_rotation(DOWN, horizontal(world.gripper_rotation_w[:, 1]))
        return servo(world, self._target, upright, self._gripper).astype(np.float32)


class OtherGoal:
    """The scripted expert towards a goal that the task did not set."""

    def __init__(self, goal: tuple[tuple[str, ...], ...]) -> None:
        self._expert, self._goal = GoalExpert(), goal

    def action(self, world: World) -> np.ndarray:
        return self._expert.action(replace(world, goal=self._goal, achieved=(False,) * len(self._goal)))


def moments(
    environment: Environment, reader: SceneReader, *, task: int, start: Start, count: int, stride: int
) -> Iterator[tuple[int, Scene, dict[str, np.ndarray]]]:
    """`count` moments, `stride` control periods apart: (period, scene, images). A function of task and start.

    Raises ValueError if the environment has no such task.
    """
    generator = np.random.default_rng((start.seed, task))
    environment.reset(task, start)
    for _ in range(SETTLE_STEPS):
        environment.step(OPEN_GRIPPER)
    reader.note_uprights()
    if generator.random() < SHUFFLE_CHANCE:
        shuffle(environment, reader, generator)
    expert = choose_motion(environment, reader, task, generator)
    for period in range(count * stride):
        if period % stride == 0:
            yield period, *reader.read()
        environment.step(expert.action(environment.world()))


def choose_motion(environment: Environment, reader: SceneReader, task: int, generator: np.random.Generator) -> Expert:
    """The task's expert, the same towards another goal, or a wandering hand; wandering too where no program fits."""
    kind = MOTIONS[generator.integers(len(MOTIONS))]
    world = environment.world()
    expert: Expert = Wander(reader.names, generator)
    if kind == "task":
        expert = build_expert(environment, task)
    elif kind == "another":
        goals = other_goals(world, reader)
        expert = OtherGoal(goals[generator.integers(len(goals))]) if goals else expert
    try:
        expert.action(world)
    except ValueError:  # no program reaches the goal
        return Wander(reader.names, generator)
    return expert


def other_goals(world: World, reader: SceneReader) -> list[tuple[tuple[str, ...], ...]]:
    """Lifting each thing that fits between the fingers, and putting it into or onto others."""
    loose = [name for name in reader.names if not reader.is_fixture(name)]
    narrow = [name for name in loose if 2 * np.sort(world.bodies[name].half_extents)[1] < MAX_OPENING]
    containers = [name for name in world.regions if name.endswith("_contain_region")]
    goals = [(("lifted", name),) for name in narrow]
    goals += [(("in", name, region),) for name in narrow for region in containers if not region.startswith(name)]
    goals += [(("on", name, "plate_1"),) for name in narrow if "plate_1" in loose and name != "plate_1"]
    return goals
