"""A simulated robot without a simulator: a point in space and a ball to reach. Its task, start and actions decide all."""

import os
import time

import numpy as np

from sim.environment import Body, World
from sim.seeds import Start
from vla.interface import ActionChunk, Observation, RobotSpec

SPEC = RobotSpec(
    name="point",
    cameras=("base", "wrist"),
    image_size=8,
    state_names=("x", "y", "z"),
    action_names=("dx", "dy", "dz", "roll", "pitch", "yaw", "gripper"),
    binary_actions=(6,),
    control_hz=20.0,
)
STEP = 0.1  # m per unit of action
REACHED = 0.05  # m
CRASH_INDEX, KILL_INDEX = 1_000, 1_001  # starts that raise, and that kill the process


class PointWorld:
    """sim.environment.Environment; counts what it renders."""

    num_tasks = 3

    def __init__(self, image_size: int = SPEC.image_size) -> None:
        self.spec = RobotSpec(**{**SPEC.__dict__, "image_size": image_size})
        self.num_observations = self.num_frames = self.num_builds = 0
        self._task: int | None = None

    def instruction(self, task: int) -> str:
        return f"reach ball {task}"

    def reset(self, task: int, start: Start) -> None:
        if start.index == CRASH_INDEX:
            raise ArithmeticError("the ball fell through the floor")
        if start.index == KILL_INDEX:
            os.kill(os.getpid(), 9)
        if task != self._task:
            self._task, self.num_builds = task, self.num_builds + 1
        generator = np.random.default_rng((task, start.seed))
        self.position = np.zeros(3)
        self.ball = generator.uniform(-1, 1, 3)

    def step(self, action: np.ndarray) -> bool:
        self.position = self.position + STEP * np.asarray(action[:3], np.float64)
        return bool(np.linalg.norm(self.ball - self.position) < REACHED)

    def state(self) -> np.ndarray:
        return self.position.astype(np.float32)

    def observe(self) -> Observation:
        self.num_observations += 1
        return Observation({name: self._picture() for name in self.spec.cameras}, self.state(), self.instruction(self._task))

    def render(self, camera: str, size: int) -> np.ndarray:
        self.num_frames += 1
        return np.full((size, size, 3), 40 * self._task, np.uint8)

    def world(self) -> World:
        ball = Body(self.ball.copy(), np.eye(3), np.full(3, REACHED))
        return World(self.position.copy(), np.eye(3), 0.08, {"ball": ball}, (("reach", "ball"),))

    def close(self) -> None:
        pass

    def _picture(self) -> np.ndarray:
        """The ball's position, to 1/100, in the first pixel: a policy can see where to go."""
        picture = np.zeros((self.spec.image_size,) * 2 + (3,), np.uint8)
        picture[0, 0] = np.round(100 * self.ball + 100)
        return picture


def build_point_world(
    suite: str, *, image_size: int | None = None, protocol: str = "openpi", mesh_detail: float = 1.0
) -> PointWorld:
    return PointWorld(image_size or SPEC.image_size)


def build_broken_world(
    suite: str, *, image_size: int | None = None, protocol: str = "openpi", mesh_detail: float = 1.0
) -> PointWorld:
    raise FileNotFoundError("no meshes anywhere")


def sleep_forever(connection) -> None:
    """A worker that says who it is and never looks at its pipe again."""
    connection.send(os.getpid())
    while True:
        time.sleep(1)


class PointExpert:
    """Goes straight to the ball; `hopeless` tasks stand still, so they never succeed."""

    def __init__(self, hopeless: bool) -> None:
        self.hopeless = hopeless

    def action(self, world: World) -> np.ndarray:
        towards = (world.bodies["ball"].position_w - world.gripper_position_w) / STEP
        return np.array([*(0 * towards if self.hopeless else np.clip(towards, -1, 1)), 0.0, 0.0, 0.0, -1.0], np.float32)


def point_expert(environment: PointWorld, task: int) -> PointExpert:
    return PointExpert(hopeless=task == 2)


class PointPolicy:
    """vla.interface.Policy: reads the ball off the image and goes there, with seeded noise; solves most starts."""

    spec = SPEC
    action_horizon = 4

    def __init__(self, noise: float = 0.2, delay_s: float = 0.0) -> None:
        self.noise, self.delay_s = noise, delay_s
        self.batch_sizes: list[int] = []
        self.seeds: list[int] = []

    def act(self, observations, *, known=None, seeds=None) -> list[ActionChunk]:
        self.batch_sizes.append(len(observations))
        self.seeds += seeds
        time.sleep(self.delay_s)
        return [
            self._chunk(observation, None if known is None else known[row], seeds[row])
            for row, observation in enumerate(observations)
        ]

    def _chunk(self, observation: Observation, known: np.ndarray | None, seed: int) -> ActionChunk:
        generator = np.random.default_rng(seed)
        ball = observation.images["base"][0, 0].astype(np.float64) / 100 - 1
        move = np.clip((ball - observation.state) / STEP / self.action_horizon, -1, 1)
        actions = np.tile([*move, 0.0, 0.0, 0.0, -1.0], (self.action_horizon, 1)).astype(np.float32)
        actions[:, :3] += self.noise * generator.standard_normal((self.action_horizon, 3)).astype(np.float32)
        if known is not None:
            actions[: len(known)] = known
        return ActionChunk(actions, {"rounds": 1 + seed % 5, "milliseconds": 1.0})
