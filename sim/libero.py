"""LIBERO's task suites as Environments. The one importer of libero; its conventions end here.

Nothing here imports torch: task tables and initial states are read from libero's files directly, so that a simulator
process starts in two seconds and stays small.
"""

import contextlib
import gc
import importlib.util
import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sim.environment import World
from sim.robosuite_env import (
    OPEN_GRIPPER,
    Arm,
    RegionSource,
    check_task,
    import_robosuite,
    make_options,
    seeded_numpy,
)
from sim.robosuite_tasks import JointTargets
from sim.seeds import Start
from sim.suites import Protocol, Suite, robot_spec
from vla.home import remask_home
from vla.interface import Observation

ASSET_VARIABLES = ("REMASK_LIBERO_ASSETS", "LIBERO_ASSETS")
MODEL_SEED = 0


def libero_folder() -> Path:
    """Where libero's package data (tasks, initial states) lies; imports nothing."""
    package = importlib.util.find_spec("libero")
    if package is None:
        raise ModuleNotFoundError("libero is not installed; install it with: pip install 'remask[libero]'.")
    return Path(list(package.submodule_search_locations)[0]) / "libero"


def find_assets() -> Path | None:
    """The folder of LIBERO's meshes and textures on this machine, or None if it is yet to be downloaded.

    Raises FileNotFoundError if an environment variable names a folder that holds no assets.
    """
    for variable in ASSET_VARIABLES:
        folder = os.environ.get(variable)
        if folder:
            if not (Path(folder) / "scenes").is_dir():
                raise FileNotFoundError(
                    f"{variable} names {folder!r}, which has no folder 'scenes'. Point it at LIBERO's assets folder "
                    "(scenes, textures, stable_hope_objects, ...)."
                )
            return Path(folder)
    for folder in (remask_home() / "libero_assets", libero_folder() / "assets"):
        if (folder / "scenes").is_dir():
            return folder
    return None


def describe_assets() -> str:
    """Where `find_assets` found them, for the record; says so if the folder's README.md tells of stand-ins."""
    folder = find_assets()
    if folder is None:
        return "LIBERO assets from the hub"
    variable = next((name for name in ASSET_VARIABLES if os.environ.get(name)), None)
    readme = folder / "README.md"
    stand_ins = readme.is_file() and "stood in" in " ".join(readme.read_text().split())
    source = f"LIBERO assets from {variable or folder.name}"
    return f"{source}, some stood in for (its README.md)" if stand_ins else source


def import_libero() -> Any:
    """libero.libero.envs, imported without questions, with the assets of `find_assets` or else from the hub.

    libero asks on standard input when LIBERO_CONFIG_PATH holds no config.yaml, and ignores the file's assets entry.
    Raises FileNotFoundError if there are no assets and the hub cannot be reached.
    """
    import_robosuite()
    folder = libero_folder()
    write_config(remask_home() / "libero_config", folder)
    import libero.libero as package

    assets = find_assets()
    if assets is None:
        assets = Path(package.get_assets_path())  # downloads from the hub, prints a warning if it cannot
        if not (assets / "scenes").is_dir():
            raise FileNotFoundError(
                "LIBERO's assets are not on this machine and could not be downloaded. Download the assets folder of "
                f"the LIBERO repository and set {ASSET_VARIABLES[0]} to it, or put it at "
                f"{remask_home() / 'libero_assets'}."
            )
    package._assets_path_cache = str(assets)  # what get_assets_path returns, wherever it was imported by name
    with contextlib.redirect_stdout(io.StringIO()):
        import libero.libero.envs as envs

    return envs


def write_config(config_folder: Path, package_folder: Path) -> None:
    """Write the config.yaml that keeps libero from asking, and point LIBERO_CONFIG_PATH at its folder."""
    keys = {
        "benchmark_root": package_folder,
        "bddl_files": package_folder / "bddl_files",
        "init_states": package_folder / "init_files",
        "datasets": remask_home() / "libero_datasets",
        "assets": remask_home() / "libero_assets",
    }
    text = "".join(f'{key}: "{path}"\n' for key, path in keys.items())
    path = config_folder / "config.yaml"
    if not path.is_file() or path.read_text() != text:
        config_folder.mkdir(parents=True, exist_ok=True)
        unfinished = config_folder / f"config.{os.getpid()}.tmp"
        unfinished.write_text(text)
        unfinished.replace(path)  # atomic: other processes may be reading
    os.environ["LIBERO_CONFIG_PATH"] = str(config_folder)


def task_names(suite_name: str) -> list[str]:
    """The suite's tasks in official order (task order index 0), as file names without ending."""
    path = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    found = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.libero_task_map[suite_name]


def instruction_of(task_name: str) -> str:
    """LIBERO's instruction is its file name: scene prefix dropped, underscores to spaces."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task_name).replace("_", " ")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain numpy arrays and refuses everything else."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"An initial-state file asks for {module}.{name}; only numpy arrays are read.")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def initial_states(suite_name: str, task_name: str) -> np.ndarray:
    """LIBERO's stored initial states of a task, [N, 1 + nq + nv]: time, qpos, qvel.

    torch.save wrote them, as a zip with one numpy pickle. They are read without torch, and nothing but arrays is
    unpickled (torch.load would need weights_only=False). Raises UnpicklingError if a file asks for anything else.
    """
    path = libero_folder() / "init_files" / suite_name / f"{task_name}.pruned_init"
    with zipfile.ZipFile(path) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return np.asarray(_ArrayUnpickler(io.BytesIO(archive.read(member))).load())


class LiberoEnvironment:
    """One LIBERO suite; the model of one task is held at a time. See sim.environment.Environment for the contract.

    Images are rotated by 180 degrees in LIBERO's sense, [::-1, ::-1] of OpenGL's rows: upright and mirrored left to
    right. They and the state are those of the instant at which LIBERO's own loop observes.
    """

    images_are_mirrored = True

    def __init__(self, suite: Suite, image_size: int, protocol: Protocol, mesh_detail: float = 1.0):
        import_libero()
        self.assets = describe_assets()
        self.spec = robot_spec(suite, image_size)
        self.num_tasks = suite.num_tasks
        self._suite = suite
        self._protocol = protocol
        self._mesh_detail = mesh_detail
        self._names = task_names(suite.name)
        self._task: int | None = None

    @property
    def arm(self) -> Arm:
        """The model of the task at hand, for those who need more than a World."""
        return self._arm

    @property
    def task_name(self) -> str:
        """File name of the task at hand; in libero_90 and libero_10 it begins with its scene, `KITCHEN_SCENE3_...`."""
        return self._names[self._task]

    def instruction(self, task: int) -> str:
        check_task(self._suite, task)
        return instruction_of(self._names[task])

    def _load(self, task: int) -> None:
        """Build the task's model, unless it is the one at hand."""
        check_task(self._suite, task)
        if task == self._task:
            return
        self.close()
        envs, name = import_libero(), self._names[task]
        bddl = libero_folder() / "bddl_files" / self._suite.name / f"{name}.bddl"
        problem = envs.bddl_base_domain.BDDLUtils.get_problem_info(str(bddl))["problem_name"]
        with seeded_numpy(MODEL_SEED):
            environment = envs.TASK_MAPPING[problem](
                str(bddl), robots=["Panda"], initialization_noise=None, horizon=1000, **make_options()
            )
        # LIBERO registers its samplers of open and closed joints again when it rebuilds the model on reset, and so draws
        # them twice in a task's first episode; done here too, the fixtures drawn after them are LIBERO's.
        environment.object_property_initializers *= 2
        objects, sites = {**environment.objects_dict, **environment.fixtures_dict}, environment.object_sites_dict
        self._arm = Arm(
            environment,
            {name: thing.root_body for name, thing in objects.items()},
            {name: RegionSource(site.parent_name, next(iter(site.joints or ()), None)) for name, site in sites.items()},
            {name: joint_targets(fixture) for name, fixture in environment.fixtures_dict.items()},
            self._mesh_detail,
        )
        self._fixture_poses = fixture_poses(environment)
        self._states = initial_states(self._suite.name, name)
        self._goal = tuple(tuple(predicate) for predicate in environment.parsed_problem["goal_state"])
        self._task = task

    def reset(self, task: int, start: Start) -> None:
        self._load(task)
        arm, environment = self._arm, self._arm.environment
        for body, (position, quat_wxyz) in self._fixture_poses.items():
            arm.model.body_pos[body], arm.model.body_quat[body] = position, quat_wxyz
        if start.split == "official":
            arm.reset(self._protocol.fixture_seed(start))
            arm.restore(self._states[start.index % len(self._states)])  # gym's drawn starts go beyond them
            environment._post_process()
        else:
            arm.reset(start.seed)
            arm.disturb_joints(start.seed)
        for _ in range(self._suite.settle_steps):
            self.step(OPEN_GRIPPER)

    def step(self, action: np.ndarray) -> bool:
        self._arm.step(action)
        self._arm.environment._post_process()
        return bool(self._arm.environment._check_success())

    def state(self) -> np.ndarray:
        return self._arm.state()

    def observe(self) -> Observation:
        size = self.spec.image_size
        images = {camera: np.ascontiguousarray(self._arm.frame(camera, size)[:, ::-1]) for camera in self.spec.cameras}
        return Observation(images, self.state(), self.instruction(self._task))

    def render(self, camera: str, size: int) -> np.ndarray:
        return self._arm.frame(camera, size)

    def world(self) -> World:
        achieved = tuple(bool(self._arm.environment._eval_predicate(predicate)) for predicate in self._goal)
        return self._arm.world(self._goal, achieved)

    def close(self) -> None:
        if self._task is not None:
            self._arm.close()
            self._arm = self._task = None
            gc.collect()  # a model with its textures is half a gigabyte, and robosuite's objects refer to each other


def fixture_poses(environment: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Body id -> position [3], quaternion wxyz [4] of each fixture as the XML places it.

    LIBERO moves fixtures by writing into the model and samples objects on them assuming that a reset has just rebuilt
    it; since we keep the model, these poses are put back before each reset.
    """
    poses = {}
    for fixture in environment.fixtures_dict.values():
        element = environment.model.root.find(f".//body[@name='{fixture.root_body}']")
        position = np.array(element.get("pos", "0 0 0").split(), float)
        quat_wxyz = np.array(element.get("quat", "1 0 0 0").split(), float)
        body = environment.sim.model.body_name2id(fixture.root_body)
        poses[body] = (position, quat_wxyz / np.linalg.norm(quat_wxyz))
    return poses


def joint_targets(fixture: Any) -> JointTargets:
    """Joint values at which LIBERO's is_open, is_close, turn_on and turn_off hold, for each that a fixture has.

    LIBERO compares with one end of a range only, and which end depends on the fixture's sense of turning; the other end
    is infinite here.
    """
    ranges = fixture.object_properties.get("articulation", {})
    targets = {}
    for predicate, test in (("open", "is_open"), ("close", "is_close"), ("turnon", "turn_on"), ("turnoff", "turn_off")):
        limits = ranges.get(f"default_{predicate}_ranges")
        if not limits:
            continue
        low, high = min(limits), max(limits)
        below, above = getattr(fixture, test)(low - 1.0), getattr(fixture, test)(high + 1.0)
        between = getattr(fixture, test)((low + high) / 2)
        if below:
            targets[predicate] = (-np.inf, high if between else low)
        elif above:
            targets[predicate] = (low if between else high, np.inf)
    return targets
