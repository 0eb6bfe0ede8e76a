"""The policy's settings as LeRobot 0.4 reads them.

    lerobot-train --policy.discover_packages_path=vla.lerobot_plugin --policy.type=discrete_diffusion ...

LeRobot finds the policy and its processors by name from here: configuration_X -> modeling_X, processor_X; XConfig -> XPolicy.
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

from multimodal.images import ImageConfig
from vla.action_head import HeadConfig
from vla.action_tokenizer import DEFAULT_NUM_BINS
from vla.decoding import DecodeConfig
from vla.lerobot_plugin.optimizer import ContiguousAdamWConfig
from vla.train import ModelConfig, TrainConfig


def _identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("discrete_diffusion")
@dataclass
class DiscreteDiffusionConfig(PreTrainedConfig):
    """Settings of `vla train` under LeRobot's names. What a saved policy is made of comes from its folder, not from here."""

    chunk_size: int = 8  # steps of a chunk
    n_action_steps: int = 8  # executed of each chunk before the policy is asked again
    num_known: int = 0  # steps not executed that the next chunk must start with
    fit_images: bool = False  # scale frames of another shape than in training; else they are refused

    # A fresh policy's backbone and vocabulary; ignored where a saved policy is loaded.
    preset: str = "desk"  # see multimodal/config.py
    num_bins: int = DEFAULT_NUM_BINS  # per continuous action dimension, odd
    text_slack: int = 4  # instruction ids beyond the longest training instruction
    tower_weights: str | None = None  # published weights of the image tower, see VisionConfig.pretrained
    image_size: int | None = None  # pixels; other frames are scaled to fit, with black bars. Default: the data's, if square

    head: HeadConfig = field(default_factory=HeadConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"type": "cross_entropy"})  # see multimodal/losses.py

    # States and actions are normalised by the policy itself, with quantiles over all frames: lerobot 0.4.4 averages the
    # quantiles of episodes, and a checkpoint of ours must mean the same outside of LeRobot.
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    optimizer_lr: float = 3e-4
    optimizer_weight_decay: float = 0.05  # on matrices only
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 20_000  # LeRobot shortens both to the run's steps
    scheduler_final_scale: float = 0.02  # learning rate at the end, as a share of the peak

    push_to_hub: bool = False  # LeRobot's own default needs an account
    # lerobot 0.4.4 hands every --policy.* flag to the config of --policy.path, this one too (configs/parser.py,
    # get_cli_overrides); without a field of the name it would refuse its own flag.
    discover_packages_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps is {self.n_obs_steps}; this policy sees one observation at a time.")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps is {self.n_action_steps}; allowed: 1 to chunk_size {self.chunk_size}.")
        if any(mode is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()):
            raise ValueError("normalization_mapping must stay IDENTITY: the policy normalises by statistics of its own folder.")

    def train_config(self) -> TrainConfig:
        """What `vla train` would call these settings, as far as they make a policy."""
        model = ModelConfig(
            preset=self.preset,
            action_horizon=self.chunk_size,
            num_bins=self.num_bins,
            text_slack=self.text_slack,
            pretrained=self.tower_weights,
        )
        return TrainConfig(model=model, head=self.head, objective=self.objective, decode=self.decode, images=self.images)

    def validate_features(self) -> None:
        """Raise ValueError unless there are cameras, a state and an action."""
        have = {"an image feature": self.image_features, "observation.state": self.robot_state_feature}
        have["action"] = self.action_feature
        missing = [name for name, feature in have.items() if not feature]
        if missing:
            got = sorted([*(self.input_features or {}), *(self.output_features or {})])
            raise ValueError(
                f"The policy needs {', '.join(missing)}; the data set or environment offers {got}. Bring others' names into "
                "this form with `vla import --dataset`."
            )

    def get_optimizer_preset(self) -> ContiguousAdamWConfig:
        return ContiguousAdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.optimizer_lr * self.scheduler_final_scale,
        )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None
