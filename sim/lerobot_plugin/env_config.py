"""Our suites as environments of LeRobot 0.4.

    lerobot-eval --env.discover_packages_path=sim.lerobot_plugin --env.type=remask --env.task=SUITE --env.task_id=0 ...

lerobot's make_env builds `gymnasium.make(gym_id, **gym_kwargs)` for every environment type that it does not know, one task
per run; it cannot build them in other processes (its AsyncVectorEnv path asks for an attribute `envs` that is not there).
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from sim import gym_env  # noqa: F401  registers the ids that make_env looks up
from sim.suites import get_suite, robot_spec


@EnvConfig.register_subclass("remask")  # the word "libero" in the type would make lerobot build its own environment
@dataclass
class RemaskEnvConfig(EnvConfig):
    """Settings of sim.gym_env.RobotEnv under LeRobot's names; --seed=N begins with the N-th start of the split."""

    task: str | None = "robosuite_lift"  # suite
    task_id: int = 0  # number within the suite
    fps: int = 20
    split: str = "validation"
    protocol: str | None = None
    image_size: int | None = None  # pixels; must be what the policy was trained with
    max_steps: int | None = None
    camera_names: dict[str, str] = field(default_factory=dict)  # e.g. '{base: image, wrist: image2}' for others' policies
    render_mode: str = "rgb_array"

    def __post_init__(self) -> None:
        suite = get_suite(str(self.task))
        spec = robot_spec(suite, self.image_size or suite.image_size)
        self.fps = round(suite.control_hz)
        picture = PolicyFeature(type=FeatureType.VISUAL, shape=(spec.image_size, spec.image_size, 3))
        names = [self.camera_names.get(camera, camera) for camera in spec.cameras]
        self.features = {f"pixels/{name}": picture for name in names} | {
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(spec.state_dim,)),
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(spec.action_dim,)),
        }
        self.features_map = {f"pixels/{name}": f"{OBS_IMAGES}.{name}" for name in names}
        self.features_map |= {"agent_pos": OBS_STATE, ACTION: ACTION}

    @property
    def gym_id(self) -> str:
        return f"{self.task}-v0"

    @property
    def package_name(self) -> str:
        return "sim.gym_env"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        names = ("split", "protocol", "image_size", "max_steps", "camera_names", "render_mode")
        return {"task": self.task_id, "layout": "lerobot"} | {name: getattr(self, name) for name in names}
