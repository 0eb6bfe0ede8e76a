"""What happens in a sample: the body is dropped, comes to rest, and a finger pushes it; forces and motion are recorded."""

from dataclasses import dataclass

import numpy as np

from multimodal.bind.sensors import TRACE_RATE
from sim.bound.scene import DROPPED, FINGER_RADIUS, TIMESTEP, World, boxes

STEPS = 320  # of TIMESTEP: 0.64 s
POKE_STEP = 170  # the finger sets off
STEPS_PER_SAMPLE = round(1 / (TRACE_RATE * TIMESTEP))  # trace samples are averages over so many steps
TRACE_SAMPLES = STEPS // STEPS_PER_SAMPLE
TRACE_CHANNELS = 6  # finger force along, across, up; acceleration of the body along, across, up in its own frame


@dataclass
class Recording:
    """One sample's physics."""

    rest: np.ndarray  # qpos [7] before the poke
    moments: list[tuple[np.ndarray, np.ndarray]]  # (qpos [7], finger position [3]) during the poke, evenly spaced
    contact: np.ndarray  # N [STEPS]: size of the sum of all contact forces on the body
    force: np.ndarray  # N [STEPS, 3] on the finger: along the poke, across, up
    acceleration: np.ndarray  # m/s^2 [STEPS, 3], proper, in the body's frame


def play(world: World, generator: np.random.Generator, *, tilt: float, moments: int) -> Recording:
    """Drop and poke. tilt: chance that the body is dropped on its side."""
    import mujoco

    model, data = world.model, world.data
    mujoco.mj_resetData(model, data)
    data.qpos[3:7] = drop_orientation(generator, tilt)
    data.qpos[:3] = [0.0, 0.0, 1.0]
    data.mocap_pos[0] = [0.0, 0.0, -1.0]
    mujoco.mj_forward(model, data)
    lowest = float((data.geom_xpos[world.object_geoms, 2] - half_heights(world)).min())
    data.qpos[2] += generator.uniform(0.012, 0.035) - lowest
    speed, angle = generator.uniform(0.25, 0.45), generator.uniform(0, 2 * np.pi)
    heading = np.array([np.cos(angle), np.sin(angle), 0.0])
    across = np.array([-heading[1], heading[0], 0.0])
    recording = Recording(np.zeros(7), [], np.zeros(STEPS), np.zeros((STEPS, 3)), np.zeros((STEPS, 3)))
    shown = np.linspace(POKE_STEP + 25, STEPS - 1, moments).astype(int)
    for step in range(STEPS):
        if step == POKE_STEP:
            recording.rest = data.qpos[:7].copy()
            data.mocap_pos[0] = finger_start(world, heading, generator)
        if step >= POKE_STEP:
            data.mocap_pos[0] += heading * speed * TIMESTEP
        mujoco.mj_step(model, data)
        recording.acceleration[step] = data.sensordata[:3]
        if step >= POKE_STEP:
            recording.force[step] = finger_force(world)
        if step in shown:
            recording.moments.append((data.qpos[:7].copy(), data.mocap_pos[0].copy()))
    recording.force[:] = recording.force @ np.stack([heading, across, [0.0, 0.0, 1.0]], axis=1)
    recording.contact[:] = world.mass * np.linalg.norm(recording.acceleration, axis=1)  # all but gravity: contact
    return recording


def drop_orientation(generator: np.random.Generator, tilt: float) -> np.ndarray:
    """Quaternion wxyz: any yaw, upright or on its side, a little off either."""
    turn = lambda axis, angle: np.array([np.cos(angle / 2), *(np.sin(angle / 2) * np.array(axis, float))])  # noqa: E731
    lean = np.pi / 2 if generator.random() < tilt else 0.0
    lean += generator.normal(0.0, 0.04)
    axis = generator.uniform(0, 2 * np.pi)
    return _product(turn((0, 0, 1), generator.uniform(0, 2 * np.pi)), turn((np.cos(axis), np.sin(axis), 0), lean))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two quaternions wxyz."""
    scalar = a[0] * b[0] - a[1:] @ b[1:]
    return np.array([scalar, *(a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:]))])


def half_heights(world: World) -> np.ndarray:
    """How far each geom of the body reaches below its centre, m: of the box around it."""
    centre, half = boxes(world.model, world.data, world.object_geoms)
    return half[:, 2] - (centre[:, 2] - world.data.geom_xpos[world.object_geoms, 2])


def finger_start(world: World, heading: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Beside the resting body, at a height that meets it."""
    import mujoco

    data = world.data
    centre = data.xipos[world.model.body(DROPPED).id]
    height = max(FINGER_RADIUS + 0.002, float(centre[2]) * generator.uniform(0.6, 1.1))
    begin = np.array([centre[0], centre[1], height]) - 0.3 * heading
    travelled, reached, geom = 0.0, 0.25, np.zeros(1, np.int32)
    for _ in range(4):  # through clutter, to the body's own surface
        hit = mujoco.mj_ray(world.model, data, begin + travelled * heading, heading, None, 1, -1, geom)
        if hit < 0:
            break
        travelled += hit
        if geom[0] in world.object_geoms:
            reached = travelled
            break
        travelled += 1e-4
    return begin + (reached - FINGER_RADIUS - generator.uniform(0.003, 0.012)) * heading


def finger_force(world: World) -> np.ndarray:
    """Sum of contact forces on the finger, N [3], world frame."""
    import mujoco

    total, wrench = np.zeros(3), np.zeros(6)
    geoms = world.data.contact.geom  # [contacts, 2]
    for index in np.flatnonzero((geoms == world.finger_geom).any(1)):
        mujoco.mj_contactForce(world.model, world.data, index, wrench)
        sign = 1.0 if geoms[index, 1] == world.finger_geom else -1.0  # the frame's normal points from geom1 to geom2
        total += sign * world.data.contact.frame[index].reshape(3, 3).T @ wrench[:3]
    return total
