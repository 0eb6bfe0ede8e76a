"""A checkpoint folder of ours <-> a policy folder of LeRobot: `vla convert`.

LeRobot's folder is ours plus config.json and its two processor files; weights and blobs are the same bytes. `vla eval` reads
either; lerobot-eval and lerobot-train need LeRobot's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from multimodal.checkpoint import load_weights
from multimodal.config import check_choice
from vla.lerobot_plugin.configuration_discrete_diffusion import DiscreteDiffusionConfig
from vla.lerobot_plugin.modeling_discrete_diffusion import DiscreteDiffusionPolicy
from vla.lerobot_plugin.processor_discrete_diffusion import make_discrete_diffusion_pre_post_processors
from vla.policy import PolicyAssets

DIRECTIONS = ("lerobot", "remask")
LEROBOT_CONFIG = "config.json"


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `vla convert`."""

    source: Path  # policy folder, e.g. RUN/checkpoints/last/policy or RUN/checkpoints/last/pretrained_model
    output_dir: Path  # new folder
    to: str = "lerobot"  # lerobot | remask
    n_action_steps: int | None = None  # to lerobot: actions executed of each chunk; default: all

    def __post_init__(self) -> None:
        check_choice("ConvertConfig", "to", self.to, DIRECTIONS)


def to_lerobot(source: Path, output_dir: Path, *, n_action_steps: int | None = None) -> Path:
    """Write the LeRobot folder of a checkpoint of ours. Errors: `PolicyAssets.load`; FileExistsError if output_dir exists."""
    _check_new(output_dir)
    assets, weights = PolicyAssets.load(source)
    config = lerobot_config(assets, n_action_steps)
    policy = DiscreteDiffusionPolicy(config, assets=assets)
    load_weights(policy.model, weights, source)
    policy.save_pretrained(output_dir)
    for processor in make_discrete_diffusion_pre_post_processors(config):
        processor.save_pretrained(output_dir)
    return output_dir


def from_lerobot(source: Path, output_dir: Path) -> Path:
    """Write the checkpoint of ours that a LeRobot folder holds, with the decoding that its config.json asks for."""
    _check_new(output_dir)
    config = PreTrainedConfig.from_pretrained(source) if (source / LEROBOT_CONFIG).is_file() else None
    if not isinstance(config, DiscreteDiffusionConfig):
        kind = f"a policy of type {config.type!r}" if config else f"no {LEROBOT_CONFIG}"
        raise ValueError(f"{source} holds {kind}; expected a folder that lerobot-train wrote for discrete_diffusion.")
    assets, weights = PolicyAssets.load(source)
    replace(assets, decode=config.decode).save(output_dir, weights)
    return output_dir


def lerobot_config(assets: PolicyAssets, n_action_steps: int | None = None) -> DiscreteDiffusionConfig:
    """LeRobot's settings of a policy that was trained with `vla train`."""
    spec = assets.spec
    picture = PolicyFeature(type=FeatureType.VISUAL, shape=(3, spec.image_size, spec.image_size))
    state = PolicyFeature(type=FeatureType.STATE, shape=(spec.state_dim,))
    return DiscreteDiffusionConfig(
        device="cuda" if torch.cuda.is_available() else "cpu",
        chunk_size=assets.model.action_horizon,
        n_action_steps=n_action_steps or assets.model.action_horizon,
        image_size=spec.image_size,
        head=assets.head,
        decode=assets.decode,
        images=assets.images,
        objective=assets.provenance.get("objective", {"type": "cross_entropy"}),
        input_features={f"{OBS_IMAGES}.{camera}": picture for camera in spec.cameras} | {OBS_STATE: state},
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(spec.action_dim,))},
    )


def _check_new(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a converted policy goes to a new folder.")


def main(argv: Sequence[str]) -> None:
    """`vla convert`."""
    from vla.cli import parse_config

    config = parse_config(ConvertConfig, argv, verb="convert")
    source, output = config.source.expanduser(), config.output_dir.expanduser()
    if config.to == "remask":
        print(f"policy: {from_lerobot(source, output)}\nnext: vla eval --policy.path={output} --suite=...")
        return
    to_lerobot(source, output, n_action_steps=config.n_action_steps)
    plugins = "--policy.discover_packages_path=vla.lerobot_plugin --env.discover_packages_path=sim.lerobot_plugin"
    print(f"policy: {output}\nnext: lerobot-eval --policy.path={output} {plugins} --env.type=remask --env.task=SUITE")
