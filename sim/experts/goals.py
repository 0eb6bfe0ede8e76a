"""From a goal to the skill that is due: which predicate comes first, what it needs, which program fulfils it."""

from collections.abc import Callable

import numpy as np

from sim.environment import Body, Region, World
from sim.experts.articulated import move_joint, wanted_value
from sim.experts.dragging import drag_into, is_to_be_dragged
from sim.experts.grasping import choose_grasp, is_between_pads, is_held, reach_and_grasp
from sim.experts.inserting import entrance, put_under
from sim.experts.motion import CLOSE, let_go, servo, solids
from sim.experts.placing import Place, carry_and_place
from sim.experts.spots import place_in, spot_on

JOINT_PREDICATES = ("open", "close", "turnon", "turnoff")
PLACEMENTS = ("in", "on")
OPEN_ENOUGH, PULL_FURTHER = 0.7, 0.12  # of the way of a drawer or door
Predicate = tuple[str, ...]


def pursue(world: World) -> np.ndarray:
    """The action, float [7], towards the first predicate, in working order, that does not hold yet.

    What the hand holds of a placement's things is put down first: LIBERO counts a thing as in a basket while the hand still
    holds it there. A thing that no goal names is dropped. When all hold, the hand lets go and draws back. Raises ValueError if a predicate has no program or a name is unknown.
    """
    for predicate, *names in world.goal:
        if predicate not in PROGRAMS:
            raise ValueError(
                f"No scripted expert for the goal {world.goal}; there are programs for {sorted(PROGRAMS)}. Add one to "
                "sim/experts/goals.py, or choose another task."
            )
    achieved = dict(zip(world.goal, world.achieved))
    carried = {goal: goal[0] in PLACEMENTS and is_held(world, find_body(world, goal[1])) for goal in world.goal}
    for goal in sorted(world.goal, key=lambda goal: (not carried[goal], stage(world, goal))):
        if achieved.get(goal, False) and not carried[goal]:
            if goal[0] in PLACEMENTS and not any(carried.values()) and is_between_pads(world, world.bodies[goal[1]]):
                return let_go(world)
            continue
        predicate, *names = goal
        return PROGRAMS[predicate](world, *names)
    return let_go(world)


def stage(world: World, goal: Predicate) -> tuple[int, int]:
    """Sorts predicates into working order.

    Switches first, then joints that nothing goes through, then objects, those that carry others before these, then the
    joints that had to stay open for them.
    """
    predicate, *names = goal
    if predicate in ("turnon", "turnoff"):
        return 0, 0
    placements = [other for other in world.goal if other[0] in PLACEMENTS]
    if predicate in JOINT_PREDICATES:
        joint = find_joint(world, names[0], predicate)
        used = any(passage(world, region) == joint for _, _, region in placements)
        return (4 if used and predicate == "close" else 1 if predicate == "close" else 2), 0
    carriers = [other for other in placements if len(names) == 2 and other[1] == names[1]]
    return 3, len(carriers)


def find_body(world: World, name: str) -> Body:
    if name not in world.bodies:
        raise ValueError(f"The goal names {name!r}, which the world lacks; it has {sorted(world.bodies)}.")
    return world.bodies[name]


def find_joint(world: World, name: str, predicate: str) -> str:
    """The joint that a goal means by a fixture's or a region's name. Raises ValueError if there is none."""
    if name in world.regions and world.regions[name].joint is not None:
        return world.regions[name].joint
    for joint_name, joint in world.joints.items():
        if joint.owner == name and predicate in joint.targets:
            return joint_name
    raise ValueError(f"The goal asks that {name!r} is {predicate!r}; no joint can do that. Joints: {sorted(world.joints)}.")


def passage(world: World, region_name: str) -> str | None:
    """The joint that must be open for something to get into a region: its drawer's, or its cupboard's door."""
    region = world.regions.get(region_name)
    if region is None or region.joint is not None or region.owner is None:
        return region.joint if region is not None else None
    doors = [name for name, joint in world.joints.items() if joint.owner == region.owner and joint.kind == "hinge"]
    return next((name for name in doors if "open" in world.joints[name].targets), None)


def lift(world: World, name: str) -> np.ndarray:
    """Grasp body `name` and raise it."""
    body = find_body(world, name)
    if is_held(world, body):
        return servo(world, world.gripper_position_w + np.array([0.0, 0.0, 0.1]), None, CLOSE)
    others = solids(world, without=(name,))
    return reach_and_grasp(world, body, choose_grasp(world, body, others), others)


def put_in(world: World, name: str, region_name: str) -> np.ndarray:
    """Put body `name` into a region, through what must be open for it."""
    region = find_region(world, region_name)
    joint = passage(world, region_name)
    if joint is not None and not is_open_enough(world, joint):
        return move_joint(world, joint, "open")
    inward = entrance(world, region)
    if inward is not None:
        return put_under(world, name, region, inward)
    return pick_and_place(world, name, place_in(world, region, name))


def put_on(world: World, name: str, support_name: str) -> np.ndarray:
    """Put body `name` onto a region or onto the middle of another body; drag it if it can only stay on the table."""
    body = find_body(world, name)
    if support_name not in world.regions:
        return pick_and_place(world, name, Place(find_body(world, support_name).origin_w, 0.008))
    region = world.regions[support_name]
    if region.owner is None and is_to_be_dragged(body) and abs(body.origin_w[2] - region.position_w[2]) < 0.03:
        return drag_into(world, name, region)
    return pick_and_place(world, name, Place(spot_on(world, region, name), 0.015))


def find_region(world: World, name: str) -> Region:
    if name not in world.regions:
        raise ValueError(f"The goal names the region {name!r}, which the world lacks; it has {sorted(world.regions)}.")
    return world.regions[name]


def pick_and_place(world: World, name: str, place: Place) -> np.ndarray:
    """Grasp body `name` wherever it is, carry it to `place` and let it go there."""
    body = find_body(world, name)
    if is_held(world, body):
        return carry_and_place(world, name, place)
    others = solids(world, without=(name,))
    grasp = choose_grasp(world, body, others, shift=place.position_w - body.origin_w)
    return reach_and_grasp(world, body, grasp, others)


def is_open_enough(world: World, name: str) -> bool:
    """Whether something can be put through a joint's opening.

    A hand that holds the handle goes on for a while, so that what moves the drawer a little does not call it back.
    """
    joint = world.joints[name]
    wanted, shut = wanted_value(joint, "open"), wanted_value(joint, "close")
    enough = OPEN_ENOUGH + (PULL_FURTHER if is_held(world, joint.link) else 0.0)
    return abs(joint.value - shut) > enough * abs(wanted - shut)


def set_joint(predicate: str) -> Callable[[World, str], np.ndarray]:
    """The program of a joint predicate."""
    return lambda world, name: move_joint(world, find_joint(world, name, predicate), predicate)


# Predicate -> program, called with the world and the predicate's arguments. A new predicate needs a line here.
PROGRAMS: dict[str, Callable[..., np.ndarray]] = {
    "lifted": lift,
    "in": put_in,
    "on": put_on,
    **{predicate: set_joint(predicate) for predicate in JOINT_PREDICATES},
}
