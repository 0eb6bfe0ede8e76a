"""Scenes that no task starts with: things moved, put on and into each other, drawers drawn, stoves lit. Seeded.

Tasks place each object within a few centimetres, so that a describer could learn a layout by heart and never look.
"""

from dataclasses import dataclass

import numpy as np

from sim.environment import Body, Environment
from sim.robosuite_env import OPEN_GRIPPER
from sim.scene_reader import SceneReader, category_of
from sim.scene_state import CARRIER_TABLE

JOINT_CHANCE, MOVE_CHANCE, STACK_CHANCE = 0.6, 0.85, 0.35
REACH = 0.10  # m that objects may leave the rectangle of where the task has them
PICTURE = ((0.10, 0.90), (0.30, 0.88))  # u and v where moved things are put
PENETRATION = 0.002  # m
DROP = 0.03  # m above the floor of a container's region, which lies inside the container's own floor
TRIES = 20
SETTLE_STEPS = 15
PLAIN_CARRIERS = ("plate", "akita_black_bowl", "white_bowl", "cubeB", "chefmate_8_frypan")  # that small things may be put on
CARRIERS = ("basket", "wooden_tray", "desk_caddy", *PLAIN_CARRIERS)
TOPS = ("_top_side", "_cook_region")  # of fixtures, likewise


@dataclass(frozen=True)
class _Place:
    """Where a thing may go."""

    centre: np.ndarray  # [2] m, or the middle of where
    spread: np.ndarray  # [2] m, half the size of the rectangle to draw from
    floor: float | None  # m, height that the underside goes to; None: the height it has


def shuffle(environment: Environment, reader: SceneReader, generator: np.random.Generator) -> None:
    """Rearrange the scene that `environment` was reset to, and let it settle with the hand held still.

    What finds no free place in TRIES stays where it was. The same generator state gives the same scene.
    """
    arm = environment.arm
    for name in arm.parts:
        for joint in reader.joints(name):
            if generator.random() < JOINT_CHANCE:
                arm.data.qpos[joint.address] = joint.closed + _opening(generator) * (joint.opened - joint.closed)
    arm.forward()
    on_table = [name for name, carrier in reader.supports() if carrier == CARRIER_TABLE and not reader.is_fixture(name)]
    corners = np.array([environment.world().bodies[name].position_w[:2] for name in arm.parts])
    low, high = corners.min(axis=0) - REACH, corners.max(axis=0) + REACH
    table = _Place((low + high) / 2, (high - low) / 2, None)
    order = [on_table[index] for index in generator.permutation(len(on_table))]
    for name in sorted(order, key=lambda name: category_of(name) not in CARRIERS):  # what carries moves before what it carries
        if generator.random() < MOVE_CHANCE:
            others = _carriers(environment, reader, name) if generator.random() < STACK_CHANCE else []
            place = others[generator.integers(len(others))] if others else table
            _move(environment, reader, name, place, generator)
    for _ in range(SETTLE_STEPS):
        environment.step(OPEN_GRIPPER)


def _opening(generator: np.random.Generator) -> float:
    """Share of a joint's way: shut, a little or wide."""
    low, high = ((0.0, 0.0), (0.15, 0.4), (0.55, 1.0), (0.7, 1.0))[generator.integers(4)]
    return float(generator.uniform(low, high))


def _carriers(environment: Environment, reader: SceneReader, name: str) -> list[_Place]:
    """Places on and in other things that are wide enough for `name`."""
    world = environment.world()
    bodies, things = world.bodies, {**world.bodies, **world.regions}
    foot = np.sort((np.abs(bodies[name].rotation_w) @ bodies[name].half_extents)[:2])
    places = []
    for other, body in things.items():
        extents = (np.abs(body.rotation_w) @ body.half_extents)[:2]
        is_region = other in world.regions and any(other.startswith(thing) for thing in environment.arm.parts)
        if other == name or other.startswith(f"{name}_") or (foot > np.sort(extents) + 0.01).any():
            continue
        if other.endswith(TOPS):
            places.append(_Place(body.position_w[:2], np.maximum(extents - foot.max(), 0.0), world.regions[other].box.top))
        elif is_region and _is_reachable(environment, reader, other, bodies):
            floor = world.regions[other].box.bottom + DROP
            places.append(_Place(body.position_w[:2], np.zeros(2), floor))
        elif category_of(other) in PLAIN_CARRIERS:
            places.append(_Place(body.position_w[:2], np.zeros(2), body.parts.top))
    return places


def _is_reachable(environment: Environment, reader: SceneReader, region: str, bodies: dict[str, Body]) -> bool:
    """A basket, tray, shelf or compartment always; a drawer or microwave if it stands open."""
    owner = next(name for name in environment.arm.parts if region.startswith(name))
    doors = [joint for joint in reader.joints(owner) if joint.part == "door" or joint.part.split()[0] in region]
    return all(reader.opening(joint) > 0.5 for joint in doors)


def _move(environment: Environment, reader: SceneReader, name: str, place: _Place, generator: np.random.Generator) -> None:
    """Put `name` down at a random point of the place, turned about the vertical; back where it was if nothing is free."""
    arm, box = environment.arm, environment.arm.parts[name]
    address = arm.model.jnt_qposadr[arm.model.body_jntadr[box.body_id]]
    pose = slice(address, address + 7)
    before = arm.data.qpos[pose].copy()
    body = environment.world().bodies[name]
    for _ in range(TRIES):
        turn = generator.uniform(-np.pi, np.pi)
        centre = np.append(place.centre + place.spread * generator.uniform(-1, 1, 2), body.position_w[2])
        if place.floor is not None:
            centre[2] = place.floor + body.position_w[2] - body.parts.bottom + 0.005
        u, v = reader.picture(centre)
        if not (PICTURE[0][0] < u < PICTURE[0][1] and PICTURE[1][0] < v < PICTURE[1][1]):
            continue
        rotation = about_vertical(turn)
        arm.data.qpos[pose] = np.concatenate(
            [centre - rotation @ body.rotation_w @ box.centre_b + [0.0, 0.0, 0.001], turned(before[3:], turn)]
        )
        arm.forward()
        if not collides(arm, box.geom_ids):
            return
    arm.data.qpos[pose] = before
    arm.forward()


def collides(arm: object, geoms: tuple[int, ...]) -> bool:
    """Whether one of these geoms is inside another thing's."""
    return any(
        contact.dist < -PENETRATION and (int(contact.geom[0]) in geoms) != (int(contact.geom[1]) in geoms)
        for contact in arm.data.contact
    )


def about_vertical(angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def turned(quat_wxyz: np.ndarray, angle: float) -> np.ndarray:
    """The rotation `quat_wxyz`, then `angle` about the world's vertical."""
    cosine, sine = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = quat_wxyz
    return np.array([cosine * w - sine * z, cosine * x - sine * y, cosine * y + sine * x, cosine * z + sine * w])
