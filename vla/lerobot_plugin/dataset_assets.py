"""A LeRobot data set -> the assets of a fresh policy: robot, statistics over all frames, tokenizers."""

from dataclasses import replace
from importlib import metadata

from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE

from vla.feature_map import FeatureMap, camera_name, derive_spec
from vla.interface import RobotSpec
from vla.lerobot_metadata import DatasetMetadata
from vla.lerobot_plugin.configuration_discrete_diffusion import DiscreteDiffusionConfig
from vla.normalization import Statistics
from vla.policy import PolicyAssets
from vla.train import assemble_assets


def assets_from_dataset(config: DiscreteDiffusionConfig, lerobot_meta: LeRobotDatasetMetadata) -> PolicyAssets:
    """Everything of a fresh policy that follows from the data set and the settings; reads states and actions of all frames.

    Raises ValueError if the frames are not squares of one size and config.image_size does not say what to make of them, or
    if the rows are not on this machine (a streamed data set).
    """
    meta = DatasetMetadata.open(lerobot_meta.root)
    absent = [path for path in meta.data_paths if not path.is_file()]
    if absent:
        raise ValueError(
            f"{absent[0]} is not on this machine, and a fresh policy needs the quantiles of all frames: leave out "
            "--dataset.streaming, or begin with a trained policy (--policy.path)."
        )
    features = FeatureMap(policy_cameras(config), OBS_STATE, ACTION)
    spec = _own_spec(meta, features, config.image_size) or derive_spec(meta, features, image_size=config.image_size)
    statistics = Statistics.of(meta.column(OBS_STATE)), Statistics.of(meta.column(ACTION))
    provenance = {
        "datasets": [lerobot_meta.repo_id],
        "frames": meta.num_frames,
        "episodes": meta.num_episodes,
        "objective": config.objective,
        "trainer": f"lerobot {metadata.version('lerobot')}",
    }
    return assemble_assets(config.train_config(), spec, statistics, meta.tasks, provenance)


def policy_cameras(config: DiscreteDiffusionConfig) -> dict[str, str]:
    """camera -> feature, in the order in which the policy sees them. Raises ValueError if two share a name."""
    cameras = {camera_name(feature): feature for feature in config.image_features}
    if len(cameras) < len(config.image_features):
        both = list(config.image_features)
        raise ValueError(f"Two of the features {both} name the same camera; rename one in the data set.")
    return cameras


def _own_spec(meta: DatasetMetadata, features: FeatureMap, image_size: int | None) -> RobotSpec | None:
    """The robot that `vla collect` left beside the data, if the policy uses its cameras."""
    if meta.spec is None or set(meta.spec.cameras) != set(features.cameras):
        return None
    return replace(meta.spec, cameras=tuple(features.cameras), image_size=image_size or meta.spec.image_size)
