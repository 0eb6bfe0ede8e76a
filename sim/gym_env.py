"""Every suite as a gymnasium environment: `gymnasium.make("sim.gym_env:libero_object-v0", task=3)`.

gymnasium imports this module for the part before the colon and expects it to register its ids then, so the last lines do.
No torch, and the simulator is imported when an environment is made.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from sim.environment import Environment
from sim.rollout import checked_actions
from sim.seeds import SPLIT_SIZE, start
from sim.suites import SUITES, build_environment, get_protocol, get_suite
from vla.interface import Observation, RobotSpec

LAYOUTS = ("remask", "lerobot", "openpi")
FILM_SIZE = 256  # pixels of what `render` gives


class RobotEnv(gymnasium.Env):
    """One task of a suite. An episode ends with success (terminated) or at the suite's step limit (truncated).

    suite, task: which. split: where episodes start, "train", "validation" or "official" (see sim/seeds.py); reset(seed=s)
        takes the s-th start of it, so seed 0, 1, ... are the episodes 0, 1, ... of `vla eval --split=...`; a reset
        without a seed draws a start. protocol: the step limit and, for LIBERO's official starts, the fixtures' seed.
    image_size: pixels, default the suite's. camera_names: other names for the cameras, {"base": "image", ...}.
    layout: keys of an observation.
        remask   images/<camera> uint8 [H, W, 3], state float32 [S]
        lerobot  pixels/<camera>, agent_pos: what lerobot's preprocess_observation turns into observation.images.<camera>
                 and observation.state
        openpi   observation/image, observation/<camera>_image ..., observation/state, prompt: the keys of its LIBERO client
    Reward is 1.0 with success, else 0.0; info holds is_success, instruction, task, start, steps.
    The instruction is also the attribute `task_description`, which lerobot asks for.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        suite: str,
        task: int = 0,
        *,
        split: str = "train",
        protocol: str | None = None,
        image_size: int | None = None,
        max_steps: int | None = None,
        layout: str = "remask",
        camera_names: Mapping[str, str] | None = None,
        render_mode: str | None = None,
        build: Callable[..., Environment] = build_environment,
    ) -> None:
        row = get_suite(suite)
        rules = get_protocol(protocol or row.default_protocol)
        start(split, 0)
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}; allowed: None or {self.metadata['render_modes']}.")
        self.world = build(suite, image_size=image_size, protocol=rules.name)
        self.task_description = self.world.instruction(task)
        self.task, self.split, self.layout, self.render_mode = f"{suite}/{task}", split, layout, render_mode
        self.metadata = self.metadata | {"render_fps": round(row.control_hz)}
        self._task = task
        self._max_episode_steps = max_steps or row.max_steps[rules.name]  # lerobot reads it under this name
        self._keys = {camera: (camera_names or {}).get(camera, camera) for camera in self.world.spec.cameras}
        self._steps: int | None = None  # of the running episode; None when one must be begun
        self.observation_space = observation_space(self.world.spec, layout, self._keys)
        self.action_space = spaces.Box(-1.0, 1.0, (self.world.spec.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin an episode at start `seed` of the split, or at options["start"], or at a drawn one."""
        super().reset(seed=seed)
        index = (options or {}).get("start", seed)
        if index is None:
            index = int(self.np_random.integers(SPLIT_SIZE))
        self._start = start(self.split, index % SPLIT_SIZE)
        self.world.reset(self._task, self._start)
        self._steps = 0
        return self._observe(), self._info(success=False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control period. ValueError for an action of another shape or not finite, RuntimeError out of an episode."""
        if self._steps is None:
            raise RuntimeError("The episode is over, or none was begun: call reset() before step().")
        action = np.asarray(action, dtype=np.float32)
        success = bool(self.world.step(checked_actions(action[None], self.world.spec.action_dim)[0]))
        self._steps += 1
        info = self._info(success)
        truncated = not success and self._steps >= self._max_episode_steps
        observation = self._observe()
        if success or truncated:
            self._steps = None
        return observation, float(success), success, truncated, info

    def render(self) -> np.ndarray | None:
        """A frame for people, uint8 [256, 256, 3], upright; None unless render_mode is "rgb_array"."""
        if self.render_mode is None:
            return None
        return np.ascontiguousarray(self.world.render(self.world.spec.cameras[0], FILM_SIZE))

    def close(self) -> None:
        self.world.close()

    def _info(self, success: bool) -> dict[str, Any]:
        info = {"is_success": success, "instruction": self.task_description, "task": self._task}
        return info | {"start": self._start.index, "steps": self._steps}

    def _observe(self) -> dict[str, Any]:
        return laid_out(self.world.observe(), self.layout, self._keys)


def laid_out(observation: Observation, layout: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """An observation under the keys of a layout; `keys`: camera -> its name there."""
    images = {key: np.ascontiguousarray(observation.images[camera]) for camera, key in keys.items()}
    if layout == "remask":
        return {"images": images, "state": observation.state}
    if layout == "lerobot":
        return {"pixels": images, "agent_pos": observation.state}
    named = {_openpi_key(key): image for key, image in images.items()}
    return named | {"observation/state": observation.state, "prompt": observation.instruction}


def observation_space(spec: RobotSpec, layout: str, keys: Mapping[str, str]) -> spaces.Dict:
    """What `laid_out` gives."""
    picture = spaces.Box(0, 255, (spec.image_size, spec.image_size, 3), np.uint8)
    images = {keys[camera]: picture for camera in spec.cameras}
    state = spaces.Box(-np.inf, np.inf, (spec.state_dim,), np.float32)
    if layout == "remask":
        return spaces.Dict({"images": spaces.Dict(images), "state": state})
    if layout == "lerobot":
        return spaces.Dict({"pixels": spaces.Dict(images), "agent_pos": state})
    prompt = spaces.Text(max_length=512, min_length=0, charset="".join(map(chr, range(32, 127))))
    named = {_openpi_key(key): picture for key in images}
    return spaces.Dict(named | {"observation/state": state, "prompt": prompt})


def _openpi_key(camera: str) -> str:
    """openpi calls the scene camera `image` and every other one after its place (policies/libero_policy.py)."""
    return "observation/image" if camera == "base" else f"observation/{camera}_image"


for _name in SUITES:
    # Unwrapped by gymnasium: RobotEnv keeps the order of reset and step itself, and lerobot 0.4.4 looks for
    # `task_description` on the outermost object, where a wrapper would hide it (envs/utils.py, add_envs_task).
    gymnasium.register(f"{_name}-v0", entry_point="sim.gym_env:RobotEnv", kwargs={"suite": _name}, order_enforce=False)
