"""THE table of suites: tasks, step limits, settle steps, rates, cameras; and the protocols of published numbers."""

from dataclasses import dataclass

from sim.environment import Environment
from sim.seeds import Start, start
from vla.interface import RobotSpec

# Camera of an Observation -> camera of the MuJoCo model; the same in robosuite and LIBERO.
CAMERA_NAMES = {"base": "agentview", "wrist": "robot0_eye_in_hand"}

STATE_NAMES = (
    "eef_x",  # m, grip site in the world frame
    "eef_y",
    "eef_z",
    "eef_axis_angle_x",  # rad, of the hand
    "eef_axis_angle_y",
    "eef_axis_angle_z",
    "finger_left",  # m
    "finger_right",
)
ACTION_NAMES = ("delta_x", "delta_y", "delta_z", "delta_roll", "delta_pitch", "delta_yaw", "gripper")
GRIPPER_ACTION = 6


@dataclass(frozen=True)
class Protocol:
    """How a published evaluation runs an episode, besides the step limit, which each suite has per protocol."""

    name: str
    execution_horizon: int | None  # actions executed of each chunk; None: what the policy says
    environment_seed: int | None  # of official start 0, + i of start i; None: the start's own

    def fixture_seed(self, start: Start) -> int:
        """Places the fixtures of an official start, which LIBERO's stored states leave out."""
        return start.seed if self.environment_seed is None else self.environment_seed + start.index


# openpi: examples/libero/main.py (5 of 10 actions). It seeds 7 once a task and lets the stream run on, so that an episode depends
# on those before; ours take the official split's seeds instead, since 7 + i are training starts' too, and a policy trained on
# those has seen the fixtures just so. lerobot: lerobot-eval (seed 1000 + episode: up to 1000 demonstrations a task share none).
PROTOCOLS = {
    "openpi": Protocol("openpi", execution_horizon=5, environment_seed=None),
    "lerobot": Protocol("lerobot", execution_horizon=None, environment_seed=1000),
}


LIBERO_STATES = 50  # stored initial states of each task


@dataclass(frozen=True)
class Suite:
    """One row: what is evaluated under this name, and for how long."""

    name: str
    backend: str  # "robosuite" or "libero"
    num_tasks: int
    max_steps: dict[str, int]  # protocol name -> steps after settling
    settle_steps: int  # steps with an open gripper and no motion before the episode counts
    control_hz: float = 20.0
    default_protocol: str = "openpi"
    cameras: tuple[str, ...] = ("base", "wrist")
    image_size: int = 128  # pixels, square

    def check_starts(self, split: str, count: int) -> None:
        """Raise ValueError on an unknown split, or on more starts of a task than a split has different ones."""
        start(split, 0)
        if (self.backend, split) == ("libero", "official") and count > LIBERO_STATES:
            raise ValueError(
                f"{count} official episodes of a task of {self.name}: LIBERO stores {LIBERO_STATES} initial states a task, and "
                "one counted twice is no second trial. Lower --episodes, or take --split=validation."
            )


def _suite(name: str, backend: str, num_tasks: int, settle_steps: int, openpi: int, lerobot: int) -> Suite:
    return Suite(name, backend, num_tasks, {"openpi": openpi, "lerobot": lerobot}, settle_steps)


SUITES = {
    suite.name: suite
    for suite in (
        _suite("robosuite_lift", "robosuite", 1, settle_steps=0, openpi=150, lerobot=150),
        _suite("robosuite_stack", "robosuite", 1, settle_steps=0, openpi=250, lerobot=250),
        _suite("robosuite_can", "robosuite", 1, settle_steps=0, openpi=250, lerobot=250),
        _suite("robosuite_door", "robosuite", 1, settle_steps=0, openpi=300, lerobot=300),
        # LIBERO: step limits of openpi main.py and of lerobot envs/libero.py; they differ in libero_spatial only.
        _suite("libero_spatial", "libero", 10, settle_steps=10, openpi=220, lerobot=280),
        _suite("libero_object", "libero", 10, settle_steps=10, openpi=280, lerobot=280),
        _suite("libero_goal", "libero", 10, settle_steps=10, openpi=300, lerobot=300),
        _suite("libero_10", "libero", 10, settle_steps=10, openpi=520, lerobot=520),
        _suite("libero_90", "libero", 90, settle_steps=10, openpi=400, lerobot=400),
    )
}


def get_suite(name: str) -> Suite:
    """Raises ValueError naming the suites if there is none of that name."""
    if name not in SUITES:
        raise ValueError(f"Unknown suite {name!r}; allowed: {', '.join(SUITES)}.")
    return SUITES[name]


def get_protocol(name: str) -> Protocol:
    """Raises ValueError naming the protocols if there is none of that name."""
    if name not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {name!r}; allowed: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def robot_spec(suite: Suite, image_size: int) -> RobotSpec:
    """The Panda arm of this suite as a policy sees it."""
    return RobotSpec(
        name="panda",
        cameras=suite.cameras,
        image_size=image_size,
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        binary_actions=(GRIPPER_ACTION,),
        control_hz=suite.control_hz,
    )


def build_environment(
    suite_name: str, *, image_size: int | None = None, protocol: str = "openpi", mesh_detail: float = 1.0
) -> Environment:
    """The suite's environment; imports its simulator now. Raises ValueError on an unknown suite or protocol.

    mesh_detail: share of the meshes' triangles that are drawn, in (0, 1]; below 1 frames are only nearly the simulator's.
    """
    suite, rules = get_suite(suite_name), get_protocol(protocol)
    size = suite.image_size if image_size is None else image_size
    if suite.backend == "robosuite":
        from sim.robosuite_env import RobosuiteEnvironment

        return RobosuiteEnvironment(suite, size, mesh_detail)
    from sim.libero import LiberoEnvironment

    return LiberoEnvironment(suite, size, rules, mesh_detail)
