"""Simulator truth of a moment, read from the model that the environment holds: one `Scene` with the pictures it tells of."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.bodies import is_below
from sim.environment import Environment
from sim.experts.grasping import is_held
from sim.scene_state import CARRIER_TABLE, Gripper, Part, Scene, Sight, Thing

SUPPORT_COSINE = 0.6  # a contact whose normal is within 53 degrees of the vertical carries
SURFACES = {
    "main_table": "table",
    "kitchen_table": "kitchen table",
    "living_room_table": "low table",
    "study_table": "desk",
    "floor": "floor",
}


@dataclass(frozen=True)
class Joint:
    """An articulated part of a fixture."""

    part: str
    address: int  # in qpos
    closed: float
    opened: float


@dataclass(frozen=True)
class _View:
    """A camera's place and the horizontal axes that "right" and "away" mean in its stored image."""

    position_w: np.ndarray
    rotation_w: np.ndarray
    tangent: float  # of half the field of view
    mirror: float  # -1 if stored images are mirrored

    @property
    def right(self) -> np.ndarray:
        return self.mirror * _horizontal(self.rotation_w[:, 0])

    @property
    def away(self) -> np.ndarray:
        return _horizontal(-self.rotation_w[:, 2])

    def picture(self, point_w: np.ndarray) -> tuple[float, float]:
        """u, v of a point in front of the camera."""
        x, y, z = self.rotation_w.T @ (np.asarray(point_w) - self.position_w)
        depth = max(-z, 1e-6) * self.tangent
        return float(0.5 + 0.5 * self.mirror * x / depth), float(0.5 - 0.5 * y / depth)


class SceneReader:
    """Reads the task at hand of an environment; another task needs another reader, another start `note_uprights`."""

    def __init__(self, environment: Environment, *, suite: str, task: int, rim: int) -> None:
        """rim: pixels at each border that do not count, since a training crop may remove them."""
        self._environment, self._suite, self._task, self._rim = environment, suite, task, rim
        self._arm = arm = environment.arm
        model = arm.model
        self.names = tuple(arm.parts)
        self._thing_of_body = np.full(model.nbody + 1, -1)  # the last entry is body -1: background
        self._is_robot = np.zeros(model.nbody, bool)
        for body in range(1, model.nbody):
            owners = [index for index, box in enumerate(arm.parts.values()) if is_below(model, body, box.body_id)]
            self._thing_of_body[body] = owners[0] if owners else -1
            self._is_robot[body] = model.body(body).name.startswith(("robot0_", "gripper0_"))
        self._joints = {name: tuple(_parts(model, box.body_id)) for name, box in arm.parts.items()}
        self._is_fixture = {name: not _is_free(model, box.body_id) for name, box in arm.parts.items()}
        self._up_axis: dict[str, int] = {}
        self.note_uprights()

    def note_uprights(self) -> None:
        """Take the present pose of each thing as its upright one; call when an episode begins, before anything moves."""
        world = self._environment.world()
        self._up_axis = {name: int(np.abs(world.bodies[name].rotation_w[2]).argmax()) for name in self.names}

    def joints(self, name: str) -> tuple[Joint, ...]:
        """The articulated parts of a thing."""
        return self._joints[name]

    def opening(self, joint: Joint) -> float:
        """0 closed or off, 1 as far as it goes."""
        share = (self._arm.data.qpos[joint.address] - joint.closed) / (joint.opened - joint.closed)
        return float(np.clip(share, 0.0, 1.0)) + 0.0  # no negative zero

    def is_fixture(self, name: str) -> bool:
        """Whether the thing stays where it is."""
        return self._is_fixture[name]

    def picture(self, point_w: np.ndarray) -> tuple[float, float]:
        """u, v of a point in the stored image of the base camera."""
        return self._view().picture(point_w)

    def read(self) -> tuple[Scene, dict[str, np.ndarray]]:
        """The scene and the images it describes, camera -> uint8 [H, W, 3]; draws every camera twice."""
        observation, world = self._environment.observe(), self._environment.world()
        size, mirrored = self._environment.spec.image_size, self._environment.images_are_mirrored
        sights = {}
        for camera, image in observation.images.items():
            bodies = self._arm.bodies_seen(camera, size)
            sights[camera] = self._sights(bodies[:, ::-1] if mirrored else bodies, image)
        view = self._view()
        things = tuple(self._thing(name, world.bodies[name], view, sights) for name in self.names)
        supports = self.supports()
        carried = {upper for upper, _ in supports}
        between = next((name for name in self.names if is_held(world, world.bodies[name])), None)
        tips = world.gripper_position_w
        gripper = Gripper(
            position_w=_floats(tips),
            centre=view.picture(tips),
            distance=float(view.away @ (tips - view.position_w)),
            across=float(view.right @ (tips - view.position_w)),
            width=max(0.0, world.gripper_width),
            touching=between,
            holding=between if between not in carried else None,
        )
        scene = Scene(
            suite=self._suite,
            layout=layout_name(self._suite, self._task, getattr(self._environment, "task_name", "")),
            surface=SURFACES[getattr(self._arm.environment, "workspace_name", "main_table")],
            instruction=observation.instruction,
            goal=world.goal,
            goal_holds=self._goal_holds(world.goal),
            things=things,
            gripper=gripper,
            supports=supports,
            inside=self._inside(world),
            image_size=size,
        )
        return scene, observation.images

    def _thing(self, name: str, body: Any, view: _View, sights: dict[str, dict[str, Sight]]) -> Thing:
        axes = np.stack([view.right, view.away, [0.0, 0.0, 1.0]])
        upright = body.rotation_w[:, self._up_axis[name]]
        return Thing(
            name=name,
            category=category_of(name),
            position_w=_floats(body.position_w),
            size=_floats(2 * np.abs(axes @ body.rotation_w) @ body.half_extents),
            centre=view.picture(body.position_w),
            distance=float(view.away @ (body.position_w - view.position_w)),
            across=float(view.right @ (body.position_w - view.position_w)),
            is_fixture=self._is_fixture[name],
            is_tipped=bool(abs(upright[2]) < 0.5),
            parts=tuple(Part(joint.part, self.opening(joint)) for joint in self._joints[name]),
            base=sights["base"].get(name, Sight()),
            wrist=sights["wrist"].get(name, Sight()),
        )

    def _view(self) -> _View:
        position, rotation, fov = self._arm.camera_pose("base")
        return _View(position, rotation, float(np.tan(fov / 2)), -1.0 if self._environment.images_are_mirrored else 1.0)

    def _sights(self, bodies: np.ndarray, image: np.ndarray) -> dict[str, Sight]:
        """bodies int [H, W], image uint8 [H, W, 3], both as stored."""
        size = len(bodies)
        owner = np.full(bodies.shape, -1)
        inner = slice(self._rim, size - self._rim)
        owner[inner, inner] = self._thing_of_body[bodies[inner, inner]]
        sights = {}
        for index, name in enumerate(self.names):
            rows, columns = np.nonzero(owner == index)
            if len(rows):
                u, v = (columns + 0.5) / size, (rows + 0.5) / size
                box = (float(u.min()), float(v.min()), float(u.max()), float(v.max()))
                colour = tuple(int(value) for value in np.median(image[rows, columns], axis=0))
                sights[name] = Sight(len(rows), (float(u.mean()), float(v.mean())), box, colour)
        return sights

    def supports(self) -> tuple[tuple[str, str], ...]:
        """Who pushes whom up, by MuJoCo's contacts; the robot carries nothing in this sense."""
        model, data = self._arm.model, self._arm.data
        pairs = set()
        for contact in data.contact:
            if contact.dist > 0.001:
                continue
            first, second = (int(model.geom_bodyid[geom]) for geom in contact.geom)
            if self._is_robot[first] or self._is_robot[second]:
                continue
            vertical = float(contact.frame[2])  # the normal points from the first geom to the second
            if abs(vertical) < SUPPORT_COSINE:
                continue
            upper, lower = (second, first) if vertical > 0 else (first, second)
            above, below = self._thing_of_body[upper], self._thing_of_body[lower]
            if above >= 0 and above != below and not self._is_fixture[self.names[above]]:
                pairs.add((self.names[above], self.names[below] if below >= 0 else CARRIER_TABLE))
        return tuple(sorted(pairs))

    def _inside(self, world: Any) -> tuple[tuple[str, str, str], ...]:
        """Things whose centre lies in a container's region: a basket, tray, drawer, shelf, compartment, microwave."""
        found = []
        for region, site in world.regions.items():
            container = next((name for name in self.names if region.startswith(f"{name}_")), None)
            is_inner = region.endswith("_region") and not region.endswith("cook_region")
            if container is None or not is_inner or category_of(container) == "wine_rack":
                continue
            for name in self.names:
                offset = site.rotation_w.T @ (world.bodies[name].position_w - site.position_w)
                if name != container and not self._is_fixture[name] and (np.abs(offset) < site.half_extents + 0.005).all():
                    drawer = re.search(r"_(top|middle|bottom)_region$", region)
                    has_drawers = any(joint.part.endswith("drawer") for joint in self._joints[container])
                    found.append((name, container, f"{drawer[1]} drawer" if drawer and has_drawers else ""))
        return tuple(sorted(set(found)))

    def _goal_holds(self, goal: tuple[tuple[str, ...], ...]) -> tuple[bool, ...]:
        environment = self._arm.environment
        check = getattr(environment, "_eval_predicate", None)
        if check is None:  # robosuite's tasks have one predicate, which is their success
            return (bool(environment._check_success()),)
        return tuple(bool(check(list(predicate))) for predicate in goal)


def category_of(name: str) -> str:
    """`akita_black_bowl_1` -> `akita_black_bowl`; robosuite's cubes are their own categories."""
    return re.sub(r"_\d+$", "", name)


def layout_name(suite: str, task: int, task_name: str) -> str:
    """Which furniture and objects a task shows; tasks of one layout differ in what is to be done.

    task_name: LIBERO's, which in libero_90 and libero_10 begins with its scene; "" in robosuite.
    """
    scene = re.match(r"[A-Z_]+SCENE\d+", task_name)
    if scene:
        return scene[0]
    return f"{suite}_{task}" if suite == "libero_object" else suite


def _parts(model: Any, root: int) -> list[Joint]:
    """The hinges and slides of a body's parts. The closed end of a range is the one at zero."""
    import mujoco

    joints = []
    for joint in range(model.njnt):
        if model.jnt_type[joint] in (mujoco.mjtJoint.mjJNT_FREE, mujoco.mjtJoint.mjJNT_BALL):
            continue
        if is_below(model, model.jnt_bodyid[joint], root):
            low, high = model.jnt_range[joint]
            name = model.joint(joint).name
            level = re.search(r"_(top|middle|bottom)_level$", name)
            part = f"{level[1]} drawer" if level else "knob" if name.endswith("_button") else "door"
            opened = high if abs(high) > abs(low) else low
            joints.append(Joint(part, int(model.jnt_qposadr[joint]), 0.0, float(opened)))
    return joints


def _is_free(model: Any, root: int) -> bool:
    import mujoco

    joints = [j for j in range(model.njnt) if model.jnt_bodyid[j] == root]
    return any(model.jnt_type[j] == mujoco.mjtJoint.mjJNT_FREE for j in joints)


def _horizontal(vector: np.ndarray) -> np.ndarray:
    flat = np.array([vector[0], vector[1], 0.0])
    return flat / np.linalg.norm(flat)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
