"""A policy laid over published weights becomes one folder that needs nothing else (`vla merge`)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vla.cli import parse_config
from vla.policy import load_policy


@dataclass(frozen=True)
class PolicyPath:
    path: str | None = None  # policy folder, or Hub repository


@dataclass(frozen=True)
class MergeConfig:
    """Settings of `vla merge`."""

    policy: PolicyPath = field(default_factory=PolicyPath)
    output_dir: Path | None = None  # the merged policy's folder


def merge_policy(path: str | Path, output_dir: Path) -> Path:
    """Write the policy of `path` with adapters merged and published weights included. Raises ValueError if it is whole already."""
    policy = load_policy(path)
    if policy.assets.base is None:
        raise ValueError(f"{path} needs no base: it holds all of its weights.")
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists; choose another --output_dir.")
    assets = replace(policy.assets, base=None, provenance=policy.assets.provenance | {"merged_from": str(path)})
    assets.save(output_dir, policy.model.state_dict())
    return output_dir


def main(argv: Sequence[str]) -> int:
    """`vla merge`."""
    config = parse_config(MergeConfig, argv, verb="merge")
    if config.policy.path is None or config.output_dir is None:
        raise ValueError("vla merge needs --policy.path=FOLDER and --output_dir=FOLDER.")
    folder = merge_policy(config.policy.path, config.output_dir.expanduser())
    print(f"policy: {folder}\nnext: vla eval --policy.path={folder} --suite=... --episodes=50")
    return 0
