"""robosuite's Lift and Stack as Environments. The one importer of robosuite; its conventions end here."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sim.bodies import BodyBox, body_box
from sim.environment import Body, World
from sim.osc import OperationalSpaceControl
from sim.rendering import Renderer, choose_gl_backend
from sim.seeds import Start
from sim.suites import CAMERA_NAMES, Suite, robot_spec
from vla.interface import Observation

START_NOISE = 0.02  # rad, standard deviation of arm joints at a start: robosuite's default, and LIBERO's stored states
MODEL_SEED = 0  # robosuite draws the cube's size when it builds a model; fixed, so that processes agree
OPEN_GRIPPER = np.array([0, 0, 0, 0, 0, 0, -1.0])
INSTRUCTIONS = {"robosuite_lift": "lift the red cube", "robosuite_stack": "stack the red cube on the green cube"}
ROBOSUITE_NAMES = {"robosuite_lift": "Lift", "robosuite_stack": "Stack"}
BODY_NAMES = {
    "robosuite_lift": {"cube": "cube_main"},
    "robosuite_stack": {"cubeA": "cubeA_main", "cubeB": "cubeB_main"},
}
GOALS = {"robosuite_lift": (("lifted", "cube"),), "robosuite_stack": (("on", "cubeA", "cubeB"),)}


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


class Arm:
    """One built robosuite model: steps it, reads it, draws it. Shared by the robosuite and LIBERO environments."""

    def __init__(self, environment: Any, body_names: dict[str, str], site_names: tuple[str, ...] = ()):
        """body_names: name in the World -> MuJoCo body; site_names: sites (regions) that the World also shows."""
        self.environment = environment
        environment._observables.clear()  # we read the state ourselves; sampling all of them costs a reset milliseconds
        self.model = environment.sim.model._model
        self.data = environment.sim.data._data
        self._control = OperationalSpaceControl(environment)
        self._num_substeps = int(environment.control_timestep / environment.model_timestep)
        self._observed = Snapshot(self.model)
        self._renderer = Renderer(self.model, self._observed.data)
        robot = environment.robots[0]
        self._site, self._hand = robot.eef_site_id, self.model.body(robot.robot_model.eef_name).id
        self._gripper_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        self._boxes: dict[str, BodyBox] = {name: body_box(self.model, body) for name, body in body_names.items()}
        self._sites = {name: self.model.site(name).id for name in site_names}
        self._finger_of_geom = np.full(self.model.ngeom, -1)  # 0 left, 1 right
        for finger, part in enumerate(("left_finger", "right_finger")):
            for geom in robot.gripper.important_geoms[part]:
                self._finger_of_geom[self.model.geom(geom).id] = finger
        self._body_of_geom = np.full(self.model.ngeom, -1)  # index into _boxes
        for index, box in enumerate(self._boxes.values()):
            self._body_of_geom[list(box.geom_ids)] = index

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
    def boxes(self) -> Mapping[str, BodyBox]:
        """Name in the World -> collision box of each object and fixture; regions have none."""
        return self._boxes

    def forward(self) -> None:
        """After somebody wrote into `data.qpos`: recompute what follows from it, and let the cameras see it."""
        self.environment.sim.forward()
        self._observed.take(self.data)

    def world(self, goal: tuple[tuple[str, ...], ...]) -> World:
        data = self.data
        touching = np.zeros((len(self._boxes), 2), bool)
        for first, second in data.contact.geom:
            for body_geom, finger_geom in ((first, second), (second, first)):
                body, finger = self._body_of_geom[body_geom], self._finger_of_geom[finger_geom]
                if body >= 0 and finger >= 0:
                    touching[body, finger] = True
        bodies = {}
        for (name, box), (left, right) in zip(self._boxes.items(), touching.tolist()):
            rotation = data.xmat[box.body_id].reshape(3, 3).copy()
            centre = data.xpos[box.body_id] + rotation @ box.centre_b
            bodies[name] = Body(centre, rotation, box.half_extents, (left, right))
        for name, site in self._sites.items():
            rotation = data.site_xmat[site].reshape(3, 3).copy()
            bodies[name] = Body(data.site_xpos[site].copy(), rotation, self.model.site_size[site].copy())
        left_qpos, right_qpos = data.qpos[self._gripper_qpos]
        return World(
            gripper_position_w=data.site_xpos[self._site].copy(),
            gripper_rotation_w=_finger_frame(data.site_xmat[self._site].reshape(3, 3)),
            gripper_width=float(left_qpos - right_qpos),
            bodies=bodies,
            goal=goal,
        )

    def close(self) -> None:
        self._renderer.close()
        self.environment.close()


def _finger_frame(site: np.ndarray) -> np.ndarray:
    """The grip site's axes renamed to World's: robosuite's pads lie along the site's x axis, World's along y. [3, 3]"""
    return np.stack([-site[:, 1], site[:, 0], site[:, 2]], axis=1)


class RobosuiteEnvironment:
    """Lift or Stack with a Panda arm. See sim.environment.Environment for the contract of each method."""

    num_tasks = 1
    images_are_mirrored = False

    def __init__(self, suite: Suite, image_size: int):
        robosuite = import_robosuite()
        self.assets = f"robosuite {robosuite.__version__}"
        self.spec = robot_spec(suite, image_size)
        self._suite = suite
        with seeded_numpy(MODEL_SEED):
            environment = robosuite.make(ROBOSUITE_NAMES[suite.name], robots="Panda", **make_options())
            environment.reset()
        self._arm = Arm(environment, BODY_NAMES[suite.name])

    @property
    def arm(self) -> Arm:
        """The model itself, for those who need more than a World."""
        return self._arm

    def instruction(self, task: int) -> str:
        check_task(self._suite, task)
        return INSTRUCTIONS[self._suite.name]

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
        return Observation(images, self.state(), INSTRUCTIONS[self._suite.name])

    def render(self, camera: str, size: int) -> np.ndarray:
        return self._arm.frame(camera, size)

    def world(self) -> World:
        return self._arm.world(GOALS[self._suite.name])

    def close(self) -> None:
        self._arm.close()


def check_task(suite: Suite, task: int) -> None:
    """Raise ValueError unless the suite has this task."""
    if not 0 <= task < suite.num_tasks:
        raise ValueError(f"Suite {suite.name!r} has no task {task}; allowed: 0 to {suite.num_tasks - 1}.")

