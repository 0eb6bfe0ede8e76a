"""robosuite's Lift, Stack, PickPlaceCan and Door as Environments. The one importer of robosuite; its conventions end here."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.bodies import RigidPart, joints_below, rigid_part, scenery
from sim.environment import Body, Joint, Region, World
from sim.osc import OperationalSpaceControl
from sim.rendering import Renderer, choose_gl_backend
from sim.robosuite_tasks import CAN, TASKS, JointTargets
from sim.seeds import Start
from sim.suites import CAMERA_NAMES, Suite, robot_spec
from vla.interface import Observation

START_NOISE = 0.02  # rad, standard deviation of arm joints at a start: robosuite's default, and LIBERO's stored states
MODEL_SEED = 0  # robosuite draws the cube's size when it builds a model; fixed, so that processes agree
OPEN_GRIPPER = np.array([0, 0, 0, 0, 0, 0, -1.0])


def import_robosuite() -> Any:
    """robosuite, imported without its warnings and without /tmp/robosuite.log, after the GL backend was chosen.

    robosuite reads its macros at import, so they are loaded and set first; a private macro file is not read, since it
    could change image conventions. Raises ModuleNotFoundError naming the extra if robosuite is not installed.
    """
    if "robosuite" in sys.modules:
        return sys.modules["robosuite"]
    choose_gl_backend()
    package = importlib.util.find_spec("robosuite")
    if package is None:
        raise ModuleNotFoundError("robosuite is not installed; install it with: pip install 'remask[sim]'.")
    (folder,) = package.submodule_search_locations
    found = importlib.util.spec_from_file_location("robosuite.macros", f"{folder}/macros.py")
    macros = importlib.util.module_from_spec(found)
    found.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.CONSOLE_LOGGING_LEVEL = "ERROR"
    sys.modules["robosuite.macros"] = macros
    sys.modules["robosuite.macros_private"] = types.ModuleType("robosuite.macros_private")
    import robosuite

    robosuite.macros = macros
    return robosuite


@contextlib.contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    """robosuite and LIBERO draw from numpy's global generator: seed it inside, give the caller's state back after."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def make_options() -> dict[str, Any]:
    """Settings of a robosuite environment that renders nothing by itself and keeps its model between episodes."""
    return dict(
        controller_configs=import_robosuite().load_controller_config(default_controller="OSC_POSE"),
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        control_freq=20,
        ignore_done=True,
        hard_reset=False,
    )


class Snapshot:
    """What cameras and proprioception read, as it was at the instant robosuite observes; a few arrays of an mjData."""

    FIELDS = (
        *("qpos", "xpos", "xquat", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
        *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
    )

    def __init__(self, model: Any):
        import mujoco

        self.data = mujoco.MjData(model)
        self._targets = [getattr(self.data, field) for field in self.FIELDS]

    def take(self, data: Any) -> None:
        for field, target in zip(self.FIELDS, self._targets):
            target[:] = getattr(data, field)

    def copy(self) -> list[np.ndarray]:
        """What was taken last, for `put`."""
        return [target.copy() for target in self._targets]

    def put(self, taken: list[np.ndarray]) -> None:
        """Show what `copy` gave at another time."""
        for target, values in zip(self._targets, taken, strict=True):
            target[:] = values


@dataclass(frozen=True)
class RegionSource:
    """Where a Region of the World comes from."""

    owner: str | None = None  # name in the World of the body it belongs to
    joint: str | None = None  # MuJoCo joint it moves with


class Arm:
    """One built robosuite model: steps it, reads it, draws it. Shared by the robosuite and LIBERO environments."""

    def __init__(
        self,
        environment: Any,
        body_names: Mapping[str, str],
        regions: Mapping[str, RegionSource] | None = None,
        joint_targets: Mapping[str, JointTargets] | None = None,
        mesh_detail: float = 1.0,
        fixed_regions: Mapping[str, Region] | None = None,
    ):
        """body_names: name in the World -> MuJoCo body; regions: MuJoCo site -> whose it is.

        joint_targets: name of a body that has joints below it -> what predicates ask of each of them.
        fixed_regions: name in the World -> region that has no site.
        """
        self.environment = environment
        environment._observables.clear()  # we read the state ourselves; sampling all of them costs a reset milliseconds
        self.model = environment.sim.model._model
        self.data = environment.sim.data._data
        self._control = OperationalSpaceControl(environment)
        self._num_substeps = int(environment.control_timestep / environment.model_timestep)
        self._observed = Snapshot(self.model)
        self._renderer = Renderer(self.model, self._observed.data, mesh_detail)
        robot = environment.robots[0]
        self._site, self._hand = robot.eef_site_id, self.model.body(robot.robot_model.eef_name).id
        self._shoulder = self.model.joint(robot.robot_joints[1]).id  # lifts the upper arm
        self._gripper_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        roots = {name: self.model.body(body).id for name, body in body_names.items()}
        self._bodies = {name: rigid_part(self.model, body) for name, body in roots.items()}
        self._regions = {name: (self.model.site(name).id, source) for name, source in (regions or {}).items()}
        self._fixed_regions = dict(fixed_regions or {})
        self._joint_owners = {joint: name for name, body in roots.items() for joint in joints_below(self.model, body)}
        self._links = {joint: rigid_part(self.model, self.model.jnt_bodyid[joint]) for joint in self._joint_owners}
        self._joint_targets = joint_targets or {}
        self._finger_of_geom = np.full(self.model.ngeom, -1)  # 0 left, 1 right
        for finger, part in enumerate(("left_finger", "right_finger")):
            for geom in robot.gripper.important_geoms[part]:
                self._finger_of_geom[self.model.geom(geom).id] = finger
        named = {geom for part in (*self._bodies.values(), *self._links.values()) for geom in part.geom_ids}
        self._scenery = scenery(self.model, named, ("robot0", "mount0", "gripper0"))
        self._part_of_geom = np.full(self.model.ngeom, -1)  # index into the parts: bodies first, then links
        for index, part in enumerate((*self._bodies.values(), *self._links.values())):
            self._part_of_geom[list(part.geom_ids)] = index

    @property
    def observed(self) -> Snapshot:
        """What cameras and proprioception read now."""
        return self._observed

    @property
    def renderer(self) -> Renderer:
        return self._renderer

    def reset(self, seed: int) -> None:
        """robosuite's own reset: arm at its start posture, objects placed by numpy's generator under `seed`."""
        from robosuite.utils.errors import RandomizationError

        with seeded_numpy(seed):
            for _ in range(100):
                try:
                    self.environment.reset()
                    break
                except RandomizationError:  # no room for the objects as drawn: draw again, as LIBERO's wrapper does
                    continue
            else:
                raise RuntimeError(f"No placement of the objects found in 100 draws under seed {seed}.")
        self._control.reset()
        self._observed_substep = self._num_substeps
        self._observed.take(self.data)

    def restore(self, state: np.ndarray) -> None:
        """After `reset`: LIBERO's stored state [1 + nq + nv] (time, qpos, qvel) in place of the sampled placement.

        robosuite samples observations by a timer that each forced reading advances by one substep; setting a state
        forces one, so that from then on a period is observed after its last substep but one.
        """
        self.environment.sim.set_state_from_flattened(state)
        self.environment.sim.forward()
        self._observed_substep = self._num_substeps - 1
        self._observed.take(self.data)

    def disturb_joints(self, seed: int) -> None:
        """After `reset`: move the arm's joints by START_NOISE under `seed`; the posture its control aims at stays."""
        joints = self.environment.robots[0]._ref_joint_pos_indexes
        self.data.qpos[joints] += np.random.default_rng(seed).normal(0, START_NOISE, len(joints))
        self.environment.sim.forward()
        self._observed.take(self.data)

    def step(self, action: np.ndarray) -> None:
        """One control period: 25 substeps of 2 ms at 20 Hz."""
        action = np.asarray(action, np.float64)
        for substep in range(1, self._num_substeps + 1):
            self._control.substep(action, new_goal=substep == 1)
            if substep == self._observed_substep:
                self._observed.take(self.data)

    def state(self) -> np.ndarray:
        """float32 [8]: grip site position, hand axis-angle (robosuite's, no antipodal flip), finger joint positions."""
        from robosuite.utils.transform_utils import quat2axisangle

        data = self._observed.data
        quat_xyzw = data.xquat[self._hand][[1, 2, 3, 0]]
        parts = (data.site_xpos[self._site], quat2axisangle(quat_xyzw), data.qpos[self._gripper_qpos])
        return np.concatenate(parts).astype(np.float32)

    def frame(self, camera: str, size: int) -> np.ndarray:
        """uint8 [size, size, 3], upright; camera is a name of the spec ("base", "wrist") or of the MuJoCo model."""
        return self._renderer.frame(CAMERA_NAMES.get(camera, camera), size)

    def bodies_seen(self, camera: str, size: int) -> np.ndarray:
        """The MuJoCo body at each pixel of `frame`, int32 [size, size]; -1 for none."""
        return self._renderer.bodies(CAMERA_NAMES.get(camera, camera), size)

    def camera_pose(self, camera: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Position [3] m and axes [3, 3] (columns right, up, backwards) in the world, and field of view, rad, of `frame`."""
        index, data = self.model.camera(CAMERA_NAMES.get(camera, camera)).id, self._observed.data
        fov = float(np.radians(self.model.cam_fovy[index]))
        return data.cam_xpos[index].copy(), data.cam_xmat[index].reshape(3, 3).copy(), fov

    @property
    def parts(self) -> Mapping[str, RigidPart]:
        """Name in the World -> collision geometry of each object, and of each fixture's fixed part."""
        return self._bodies

    def forward(self) -> None:
        """After somebody wrote into `data.qpos`: recompute what follows from it, and let the cameras see it."""
        self.environment.sim.forward()
        self._observed.take(self.data)

    def arm_moved(self) -> None:
        """After somebody wrote into the arm's joints: `forward`, and its control holds it where it is."""
        self.forward()
        self._control.look_again()

    def world(self, goal: tuple[tuple[str, ...], ...], achieved: tuple[bool, ...]) -> World:
        """What experts see; `achieved` is as long as `goal`."""
        data = self.data
        touches = self._finger_contacts()
        left_qpos, right_qpos = data.qpos[self._gripper_qpos]
        return World(
            gripper_position_w=data.site_xpos[self._site].copy(),
            gripper_rotation_w=_finger_frame(data.site_xmat[self._site].reshape(3, 3)),
            gripper_width=float(left_qpos - right_qpos),
            bodies={name: self._body(part, touch) for (name, part), touch in zip(self._bodies.items(), touches)},
            goal=goal,
            achieved=achieved,
            regions={
                **{name: self._region(site, source) for name, (site, source) in self._regions.items()},
                **self._fixed_regions,
            },
            joints={
                self.model.joint(joint).name: self._joint(joint, self._body(part, touch))
                for (joint, part), touch in zip(self._links.items(), touches[len(self._bodies) :])
            },
            scenery=self._scenery,
            shoulder_w=data.xanchor[self._shoulder].copy(),
        )

    def _finger_contacts(self) -> list[tuple[bool, bool]]:
        """Per part whether the left and the right finger touch it."""
        touching = np.zeros((len(self._bodies) + len(self._links), 2), bool)
        pairs = self.data.contact.geom
        for geoms, others in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 1], pairs[:, 0])):
            part, finger = self._part_of_geom[geoms], self._finger_of_geom[others]
            known = (part >= 0) & (finger >= 0)
            touching[part[known], finger[known]] = True
        return [(bool(left), bool(right)) for left, right in touching]

    def _body(self, part: RigidPart, touches: tuple[bool, bool]) -> Body:
        rotation = self.data.xmat[part.body_id].reshape(3, 3).copy()
        centre = self.data.xpos[part.body_id] + rotation @ part.centre_b
        return Body(centre, rotation, part.half_extents, touches, part.shape, -part.centre_b)

    def _region(self, site: int, source: RegionSource) -> Region:
        rotation = self.data.site_xmat[site].reshape(3, 3).copy()
        size = self.model.site_size[site].copy()
        return Region(self.data.site_xpos[site].copy(), rotation, size, source.owner, source.joint)

    def _joint(self, joint: int, link: Body) -> Joint:
        import mujoco

        owner = self._joint_owners[joint]
        return Joint(
            kind="slide" if self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_SLIDE else "hinge",
            value=float(self.data.qpos[self.model.jnt_qposadr[joint]]),
            limits=tuple(self.model.jnt_range[joint].tolist()),
            axis_w=self.data.xaxis[joint].copy(),
            anchor_w=self.data.xanchor[joint].copy(),
            link=link,
            owner=owner,
            targets=self._joint_targets.get(owner, {}),
        )

    def close(self) -> None:
        self._renderer.close()
        self.environment.close()


def _finger_frame(site: np.ndarray) -> np.ndarray:
    """The grip site's axes renamed to World's: robosuite's pads lie along the site's x axis, World's along y. [3, 3]"""
    return np.stack([-site[:, 1], site[:, 0], site[:, 2]], axis=1)


class RobosuiteEnvironment:
    """One robosuite task with a Panda arm. See sim.environment.Environment for the contract of each method."""

    num_tasks = 1
    images_are_mirrored = False

    def __init__(self, suite: Suite, image_size: int, mesh_detail: float = 1.0):
        robosuite = import_robosuite()
        self.assets = f"robosuite {robosuite.__version__}"
        self.spec = robot_spec(suite, image_size)
        self._suite, self._task = suite, TASKS[suite.name]
        with seeded_numpy(MODEL_SEED):
            environment = robosuite.make(
                self._task.environment, robots="Panda", use_object_obs=False, **self._task.options, **make_options()
            )
            environment.reset()
        self._arm = Arm(
            environment,
            self._task.bodies,
            joint_targets=self._task.joint_targets,
            mesh_detail=mesh_detail,
            fixed_regions=fixed_regions(environment),
        )

    @property
    def arm(self) -> Arm:
        """The model itself, for those who need more than a World."""
        return self._arm

    def instruction(self, task: int) -> str:
        check_task(self._suite, task)
        return self._task.instruction

    def reset(self, task: int, start: Start) -> None:
        check_task(self._suite, task)
        self._arm.reset(start.seed)
        for _ in range(self._suite.settle_steps):
            self._arm.step(OPEN_GRIPPER)

    def step(self, action: np.ndarray) -> bool:
        self._arm.step(action)
        return bool(self._arm.environment._check_success())

    def state(self) -> np.ndarray:
        return self._arm.state()

    def observe(self) -> Observation:
        images = {camera: self._arm.frame(camera, self.spec.image_size) for camera in self.spec.cameras}
        return Observation(images, self.state(), self._task.instruction)

    def render(self, camera: str, size: int) -> np.ndarray:
        return self._arm.frame(camera, size)

    def world(self) -> World:
        return self._arm.world(self._task.goal, (self._is_achieved(),))

    def _is_achieved(self) -> bool:
        """The goal itself: robosuite counts a can in its bin as success only once the hand has left it."""
        environment = self._arm.environment
        if self._suite.name == "robosuite_can":
            return not environment.not_in_bin(environment.sim.data.body_xpos[environment.obj_body_id["Can"]], CAN)
        return bool(environment._check_success())

    def close(self) -> None:
        self._arm.close()


def fixed_regions(environment: Any) -> dict[str, Region]:
    """The can's compartment of PickPlace's second bin, by robosuite's own test (`not_in_bin`); {} for other tasks."""
    if not hasattr(environment, "target_bin_placements"):
        return {}
    width, length, _ = environment.bin_size
    half = np.array([width / 4, length / 4, 0.05])
    return {"can_bin": Region(environment.target_bin_placements[CAN] + [0.0, 0.0, half[2]], np.eye(3), half)}


def check_task(suite: Suite, task: int) -> None:
    """Raise ValueError unless the suite has this task."""
    if not 0 <= task < suite.num_tasks:
        raise ValueError(f"Suite {suite.name!r} has no task {task}; allowed: 0 to {suite.num_tasks - 1}.")

