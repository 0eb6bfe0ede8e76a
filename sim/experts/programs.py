"""Task programs: from the goal predicates of a `World` to actions, by the skills."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from sim.environment import Body, Environment, World
from sim.experts import skills
from sim.experts.skills import Placement


class Expert(Protocol):
    """Labels states of one task."""

    def action(self, world: World) -> np.ndarray:
        """The clean action, float [7] in [-1, 1], for any state; the phase is inferred from `world`."""
        ...


def find_body(world: World, name: str) -> Body:
    if name not in world.bodies:
        raise ValueError(f"The goal names {name!r}, which the world lacks; it has {sorted(world.bodies)}.")
    return world.bodies[name]


def pick_and_place(world: World, name: str, place: Placement, *, arrived: bool) -> np.ndarray:
    """Grasp body `name` wherever it is, carry it to `place`, and leave it there once it has `arrived`."""
    body = find_body(world, name)
    if arrived:
        return skills.retreat(world, name)
    if skills.is_held(world, body):
        return skills.carry_and_place(world, name, place)
    return skills.reach_and_grasp(world, name)


def lift(world: World, name: str) -> np.ndarray:
    """Grasp body `name` and raise it."""
    body = find_body(world, name)
    if not skills.is_held(world, body):
        return skills.reach_and_grasp(world, name)
    up = world.gripper_position_w + np.array([0.0, 0.0, 0.1])
    return skills.servo(world, up, skills.horizontal(world.gripper_rotation_w[:, 1]), skills.CLOSE)


def place_in(world: World, name: str, region_name: str) -> np.ndarray:
    """Drop body `name` into an open container from above its rim.

    A region such as `basket_1_contain_region` belongs to the body whose name begins its own (`basket_1`): that
    body's rim must be cleared.
    """
    region = find_body(world, region_name)
    rim = max(
        skills.upside(body)
        for other, body in world.bodies.items()
        if other == region_name or (region_name.startswith(other) and other != name)
    )
    body = find_body(world, name)
    offset = np.abs(body.position_w - region.position_w)
    inside = bool((offset[:2] < region.half_extents[:2]).all())
    falling_or_in = inside and skills.underside(body) < rim + 0.1 and not skills.is_held(world, body)
    target = np.array([*region.position_w[:2], rim + 0.02])
    place = Placement(target, clear_z=rim + 0.02, tolerance=0.02, lower=False)
    return pick_and_place(world, name, place, arrived=falling_or_in)


def place_on(world: World, name: str, support_name: str) -> np.ndarray:
    """Set body `name` down on the middle of another body."""
    support = find_body(world, support_name)
    body = find_body(world, name)
    top = skills.upside(support)
    target = np.array([*support.position_w[:2], top])
    place = Placement(target, clear_z=top + 0.02, tolerance=0.008, lower=True)
    offset = np.linalg.norm(body.position_w[:2] - target[:2])
    arrived = offset < 0.02 and abs(skills.underside(body) - top) < 0.006 and world.gripper_width > 0.06
    return pick_and_place(world, name, place, arrived=arrived)


# Predicate -> program, called with the world and the predicate's arguments. A new predicate needs a line here.
PROGRAMS: dict[str, Callable[..., np.ndarray]] = {"lifted": lift, "in": place_in, "on": place_on}


class GoalExpert:
    """Reads the goal from the world it is shown, so one object serves every task whose predicate has a program."""

    def action(self, world: World) -> np.ndarray:
        """See `Expert.action`. Raises ValueError if no program reaches the goal."""
        if len(world.goal) != 1 or world.goal[0][0] not in PROGRAMS:
            raise ValueError(
                f"No scripted expert for the goal {world.goal}; there are programs for one predicate of "
                f"{sorted(PROGRAMS)}. Add one to sim/experts/programs.py, or choose another task."
            )
        predicate, *names = world.goal[0]
        return PROGRAMS[predicate](world, *names).astype(np.float32)


class NoisyExpert:
    """An expert whose executed motion is disturbed by correlated noise, while the label stays clean.

    The noise is a stationary first-order process, since the arm smooths white noise away. The gripper is not disturbed.
    """

    def __init__(self, expert: Expert, noise: float, seed: int, *, correlation: float = 0.7):
        """noise: standard deviation in action units of translation; a third of it on rotation."""
        self._expert, self._correlation = expert, correlation
        self._scale = noise * np.array([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 0])
        self._generator = np.random.default_rng(seed)
        self._disturbance = self._generator.standard_normal(7)

    def act(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """(executed, label), float32 [7] each, in [-1, 1]."""
        label = self._expert.action(world)
        executed = np.clip(label + self._scale * self._disturbance, -1.0, 1.0).astype(np.float32)
        fresh = np.sqrt(1.0 - self._correlation**2) * self._generator.standard_normal(7)
        self._disturbance = self._correlation * self._disturbance + fresh
        return executed, label


def build_expert(environment: Environment, task: int) -> Expert:
    """The expert of a task; whether its goal has a program shows at the first `action`, since a world carries the goal.

    Raises ValueError if the environment has no such task.
    """
    if not 0 <= task < environment.num_tasks:
        raise ValueError(f"No task {task}; the environment has 0 to {environment.num_tasks - 1}.")
    return GoalExpert()
