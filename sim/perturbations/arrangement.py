"""Object layout and robot start: things stand elsewhere, the arm begins in another posture. These change the simulation."""

from typing import Any

import numpy as np

from sim.environment import Body, Environment
from sim.perturbations.effect import Effect, arm_of
from sim.robosuite_env import OPEN_GRIPPER
from sim.scene_shuffle import PENETRATION, about_vertical, collides, turned

TURN_PER_METRE = np.radians(10.0) / 0.01  # a thing moved by 1 cm is turned by up to 10 degrees
ON_TABLE = 0.01  # m above the lowest thing's foot
LIFT = 0.001  # m, so that a moved thing does not begin inside the table
TRIES = 20
SETTLE_STEPS = 15


class Layout(Effect):
    """Magnitude: m that each thing on the table is moved, in a drawn direction; turned about the vertical as well.

    What carries something, stands on something, or finds no free place stays; so does everything if the task would be solved.
    """

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        arm = arm_of(environment, "layout")
        before = arm.data.qpos.copy()
        directions = {name: generator.uniform(-1, 1, (TRIES, 2)) for name in sorted(arm.parts)}
        moved = [name for name in movable(environment, arm) if self._move(environment, arm, name, directions[name])]
        if not moved:
            return
        if all(environment.world().achieved):
            arm.data.qpos[:] = before
            arm.forward()
            return
        for _ in range(SETTLE_STEPS):
            environment.step(OPEN_GRIPPER)

    def _move(self, environment: Environment, arm: Any, name: str, draws: np.ndarray) -> bool:
        """Try the drawn directions; False if none leads to a free place. draws: [TRIES, 2] in [-1, 1], angle and turn."""
        if self.magnitude == 0:
            return False
        part, body = arm.parts[name], environment.world().bodies[name]
        pose = free_joint(arm.model, part.body_id)
        before = arm.data.qpos[pose].copy()
        for angle, turn in draws * (np.pi, self.magnitude * TURN_PER_METRE):
            offset = np.array([self.magnitude * np.cos(angle), self.magnitude * np.sin(angle), LIFT])
            origin = body.position_w + offset - about_vertical(turn) @ body.rotation_w @ part.centre_b
            arm.data.qpos[pose] = np.concatenate([origin, turned(before[3:], turn)])
            arm.forward()
            if not collides(arm, part.geom_ids):
                return True
        arm.data.qpos[pose] = before
        arm.forward()
        return False


class RobotStart(Effect):
    """Magnitude: rad, standard deviation of each arm joint about the start's own. A posture in collision is drawn again."""

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        arm = arm_of(environment, "robot")
        joints = arm.environment.robots[0]._ref_joint_pos_indexes
        before, penetrating = arm.data.qpos[joints].copy(), penetrations(arm)
        for draw in generator.standard_normal((TRIES, len(joints))):
            if self.magnitude == 0:
                return
            arm.data.qpos[joints] = before + self.magnitude * draw
            arm.arm_moved()
            if penetrations(arm) <= penetrating:
                return
        arm.data.qpos[joints] = before
        arm.arm_moved()


def movable(environment: Environment, arm: Any) -> list[str]:
    """Free things that stand on what the lowest of them stands on, and carry nothing; by name."""
    bodies = environment.world().bodies
    free = [name for name in sorted(arm.parts) if free_joint(arm.model, arm.parts[name].body_id) is not None]
    if not free:
        return []
    floor = min(bodies[name].parts.bottom for name in free)
    others = {name: body for name, body in bodies.items() if name in free}
    return [
        name
        for name in free
        if bodies[name].parts.bottom < floor + ON_TABLE
        and not any(rests_on(body, bodies[name]) for other, body in others.items() if other != name)
    ]


def rests_on(body: Body, carrier: Body) -> bool:
    """Its centre is over the carrier's box, and its foot above the carrier's."""
    reach = (np.abs(carrier.rotation_w) @ carrier.half_extents)[:2]
    over = (np.abs(body.position_w[:2] - carrier.position_w[:2]) < reach).all()
    return bool(over and body.parts.bottom > carrier.parts.bottom + ON_TABLE / 2)


def free_joint(model: Any, body: int) -> slice | None:
    """Where qpos holds a body's position [3] and quaternion [4]; None if it does not move freely."""
    import mujoco

    joint = model.body_jntadr[body]
    if joint < 0 or model.jnt_type[joint] != mujoco.mjtJoint.mjJNT_FREE:
        return None
    address = int(model.jnt_qposadr[joint])
    return slice(address, address + 7)


def penetrations(arm: Any) -> int:
    """Contacts deeper than what settling leaves."""
    return sum(contact.dist < -PENETRATION for contact in arm.data.contact)
