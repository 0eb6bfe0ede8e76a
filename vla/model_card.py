"""The README of a published policy: what it reads and moves, what it saw, how often it succeeded, with which versions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from multimodal.pretrained.source import is_repository
from vla.policy import PolicyAssets


@dataclass(frozen=True)
class Result:
    """Success on one suite, from an eval_info.json (sim/results.py)."""

    suite: str
    split: str
    successes: int
    episodes: int  # without errors
    errors: int
    interval: tuple[float, float]  # percent, 95 %


def read_results(path: Path, checkpoint: str) -> list[Result]:
    """The suites of an eval_info.json. Raises ValueError if it is none, or another policy's than `checkpoint` (its hash)."""
    try:
        info = json.loads(path.read_text())
        evaluated, split = info["config"]["checkpoint"], info["config"]["split"]
        rows = [
            Result(suite, split, row["n_successes"], row["n_episodes"], row["n_errors"], tuple(row["pc_success_interval_95"]))
            for suite, row in info["per_group"].items()
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no eval_info.json of `vla eval` ({error!r}).") from error
    if evaluated != checkpoint:
        raise ValueError(f"{path} holds results of the policy {evaluated}; this one is {checkpoint}. Evaluate this one: vla eval.")
    return rows


def model_card(
    assets: PolicyAssets, versions: dict[str, Any], checkpoint: str, repo_id: str, results: Sequence[Result], license: str | None
) -> str:
    """Markdown with the Hub's header. versions: of the packages that trained it; checkpoint: its content hash."""
    parts = [
        _header(assets, license),
        f"# {repo_id.split('/')[-1]}\n\n{_summary(assets)}",
        f"## Use\n\nWith Remask installed:\n\n```\nvla eval --policy.path={repo_id} --suite=... --episodes=50\n```\n\n"
        f"```python\nfrom vla.policy import load_policy\n\nchunks = load_policy(\"{repo_id}\").act([observation])\n```",
        f"## Interface\n\n{_schema(assets)}",
        f"## Training data\n\n{_listed(_training(assets))}",
        f"## Results\n\n{_results(results)}",
        f"## Versions\n\n{_listed({name: version for name, version in versions.items() if version})}\n\nContent hash `{checkpoint}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _header(assets: PolicyAssets, license: str | None) -> str:
    fields: dict[str, Any] = {
        "library_name": "remask",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "vision-language-action", assets.head.type.replace("_", "-")],
    }
    if license is not None:
        fields["license"] = license
    path = _backbone_path(assets)
    if path is not None and is_repository(path):
        fields["base_model"] = path
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(assets: PolicyAssets) -> str:
    model = assets.model
    basis = _backbone_path(assets)
    built = f"built on {Path(basis).name if not is_repository(basis) else basis}" if basis else "trained from scratch"
    text = (
        f"A {assets.head.type.replace('_', ' ')} policy for {assets.spec.name}, {built}: chunks of {model.action_horizon} steps x "
        f"{model.action_dim} dimensions at {assets.spec.control_hz:g} Hz."
    )
    return text if assets.base is None else text + f" The folder holds adapters; it is laid over {assets.base.path} when it is loaded."


def _schema(assets: PolicyAssets) -> str:
    spec, low, high = assets.spec, assets.action_tokenizer.low, assets.action_tokenizer.high
    rows = [
        "| | names | shape |",
        "|---|---|---|",
        f"| cameras | {', '.join(spec.cameras)} | uint8 [{spec.image_size}, {spec.image_size}, 3] each |",
        f"| state | {', '.join(spec.state_names)} | float32 [{spec.state_dim}] |",
        f"| actions | {', '.join(spec.action_names)} | float32 [{assets.model.action_horizon}, {spec.action_dim}] |",
    ]
    ranges = ", ".join(
        f"{name} in {{-1, 1}}" if index in spec.binary_actions else f"{name} {low[index]:.3g} .. {high[index]:.3g}"
        for index, name in enumerate(spec.action_names)
    )
    return "\n".join(rows) + f"\n\nRanges of the actions in the data: {ranges}. Other cameras are errors, not guesses."


def _training(assets: PolicyAssets) -> dict[str, Any]:
    """Provenance without what is the machine's own."""
    known = {key: value for key, value in assets.provenance.items() if key not in ("training", "backbone", "merged_from", "start_from")}
    training = assets.provenance.get("training", {})
    kept = ("steps", "minutes", "batch_size", "accumulation", "learning_rate", "precision", "ema_decay")
    known["training"] = ", ".join(f"{key} {training[key]}" for key in kept if training.get(key) is not None)
    backbone = assets.provenance.get("backbone")
    if backbone is not None:
        known["backbone"] = f"{backbone['family']}, {backbone['tune']} ({Path(str(backbone['path'])).name})"
    return known


def _results(results: Sequence[Result]) -> str:
    if not results:
        return "None were given with this policy."
    rows = ["| suite | starts | success | 95 % interval (Wilson) | errors |", "|---|---|---|---|---|"]
    for row in results:
        rate = f"{row.successes}/{row.episodes} = {100 * row.successes / row.episodes:.1f} %" if row.episodes else "-"
        low, high = row.interval
        rows.append(f"| {row.suite} | {row.split} | {rate} | {low:.1f} - {high:.1f} % | {row.errors} |")
    return "\n".join(rows) + "\n\nErrors are exceptions of the simulator or the policy; they are in no rate."


def _listed(values: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {_shown(value)}" for name, value in values.items() if value not in (None, "", [], {}))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _backbone_path(assets: PolicyAssets) -> str | None:
    return assets.provenance.get("backbone", {}).get("path")
