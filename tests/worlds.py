"""Small worlds of boxes, for laws of the experts: a hand over loose boxes, a basket, an oven, a drawer, a door."""

from dataclasses import replace

import numpy as np

from sim.boxes import Boxes
from sim.environment import Body, Joint, Region, World

TOP_DOWN = np.array([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]])  # fingers along world y


def turned(yaw: float) -> np.ndarray:
    """Rotation about world z, [3, 3]."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def world_with(gripper=(0.0, 0.0, 0.3), width=0.078, goal=(("lifted", "box"),), **bodies: Body) -> World:
    return World(np.array(gripper), TOP_DOWN, width, bodies, goal)


def box(position, half_extents, yaw=0.0, touches=(False, False)) -> Body:
    return Body(np.array(position, float), turned(yaw), np.array(half_extents), touches)


def random_rotation(generator: np.random.Generator) -> np.ndarray:
    matrix, _ = np.linalg.qr(generator.standard_normal((3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def basket(position=(0.0, 0.2, 0.0)) -> tuple[Body, Region]:
    """Floor and four walls 0.16 m apart, and the room between them."""
    wide, thin = np.array([0.08, 0.004, 0.05]), np.array([0.004, 0.08, 0.05])
    offsets = np.array([[0, 0, 0.004], [0, 0.08, 0.05], [0, -0.08, 0.05], [0.08, 0, 0.05], [-0.08, 0, 0.05]])
    shape = Boxes(offsets, np.stack([np.eye(3)] * 5), np.array([[0.08, 0.08, 0.004], wide, wide, thin, thin]))
    place = np.array(position, float)
    body = Body(place, np.eye(3), np.array([0.084, 0.084, 0.05]), shape=shape)
    return body, Region(place + [0, 0, 0.06], np.eye(3), np.array([0.06, 0.06, 0.06]), owner="basket")


def build_oven(roof: float) -> tuple[Body, Region]:
    """A box open towards -y only; its roof is `roof` m above the middle, its floor 0.1 m below. And the room in it."""
    offsets = np.array([[0, 0, -0.1], [0, 0, roof], [0.12, 0, 0], [-0.12, 0, 0], [0, 0.12, 0]], float)
    slab, side, back = (0.12, 0.12, 0.01), (0.01, 0.12, 0.1), (0.12, 0.01, 0.1)
    shape = Boxes(offsets, np.stack([np.eye(3)] * 5), np.array([slab, slab, side, side, back]))
    oven = Body(np.array([0.1, 0.3, 0.5]), np.eye(3), np.array([0.13, 0.13, 0.11]), shape=shape)
    return oven, Region(oven.position_w, np.eye(3), np.array([0.1, 0.1, 0.08]), owner="oven")


def drawer(opening: float, rack_at: float | None = None) -> World:
    """A cabinet whose lower drawer stands open towards the robot's side (-y), with a handle of the upper one over it."""
    level = np.eye(3)
    back = Body(np.array([0.0, 0.4, 0.2]), level, np.array([0.12, 0.01, 0.2]))
    upper = Body(np.array([0.0, 0.19, 0.25]), level, np.array([0.05, 0.01, 0.008]))
    lower = Body(np.array([0.0, 0.22 - opening, 0.1]), level, np.array([0.1, 0.005, 0.035]))
    target = {"close": (0.0, np.inf), "open": (-np.inf, -0.14)}
    slide = {"kind": "slide", "limits": (-0.16, 0.01), "axis_w": np.array([0.0, 1.0, 0.0]), "anchor_w": np.zeros(3)}
    joints = {
        name: Joint(value=value, link=link, owner="cabinet", targets=target, **slide)
        for name, value, link in (("upper", 0.0, upper), ("lower", -opening, lower))
    }
    turned_over = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # as in LIBERO's cabinets
    room = Region(np.array([0.0, 0.3 - opening, 0.1]), turned_over, np.array([0.03, 0.076, 0.1]), "cabinet", "lower")
    bowl = box((0.0, -0.2, 0.03), (0.05, 0.05, 0.025))
    bodies = {"cabinet": back, "bowl": bowl}
    if rack_at is not None:
        bodies["rack"] = box((0.0, rack_at, 0.2), (0.15, 0.02, 0.2))
    return replace(world_with(**bodies), joints=joints, regions={"room": room})


def door(angle: float) -> World:
    """An oven whose door, hinged at its left end, stands open by `angle` (rad)."""
    hinge, swing = np.array([-0.1, 0.2, 0.1]), turned(-angle)
    panel = Body(hinge + swing @ [0.1, 0.0, 0.0], swing, np.array([0.1, 0.01, 0.1]))
    targets = {"close": (-0.01, np.inf), "open": (-np.inf, -1.3)}
    joint = Joint("hinge", -angle, (-2.0, 0.0), np.array([0.0, 0.0, 1.0]), hinge, panel, "oven", targets)
    oven = box((0.0, 0.35, 0.1), (0.1, 0.1, 0.1))
    return replace(world_with(goal=(("open", "oven"),), oven=oven), joints={"hinge": joint}, achieved=(False,))
