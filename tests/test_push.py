"""Laws of the model card and of pushing: what the card says is what the folder holds, and the card changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from multimodal.checkpoint import checkpoint_hash
from multimodal.images import ImageConfig
from multimodal.training import TrainingConfig
from tests.reaching import write_cache
from vla.backbone import Base
from vla.cli import main as cli
from vla.heads import HeadConfig
from vla.policy import PolicyAssets, load_policy
from vla.train import DatasetConfig, ModelConfig, TrainConfig, train_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    return train_policy(
        TrainConfig(
            dataset=DatasetConfig(root=write_cache(root / "cache", episodes=2), held_out_fraction=0.0),
            model=ModelConfig(preset="debug", action_horizon=3, num_bins=15),
            head=HeadConfig(mask_draws=1),
            images=ImageConfig(crop=32),
            training=TrainingConfig(steps=1, batch_size=2, device="cpu"),
            output_dir=root / "run",
        )
    )


def write_results(path: Path, checkpoint: str) -> Path:
    """What `vla eval` writes, as far as the card reads it."""
    suite = {"n_successes": 97, "n_episodes": 100, "n_errors": 1, "pc_success_interval_95": [91.5, 98.97]}
    path.write_text(json.dumps({"config": {"checkpoint": checkpoint, "split": "official"}, "per_group": {"libero_object": suite}}))
    return path


def push(policy: Path, *words: str) -> int:
    return cli(["push", f"--policy.path={policy}", "--repo_id=me/reaching", *words])


def test_a_dry_run_writes_the_card_and_sends_nothing(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The tests run offline, so sending would be an error."""
    results = write_results(tmp_path / "eval_info.json", checkpoint_hash(policy))
    assert push(policy, f"--results=[{results}]", "--license=apache-2.0", "--dry_run") == 0
    card, printed = (policy / "README.md").read_text(), capsys.readouterr().out
    assert card in printed and "would push to me/reaching: README.md" in printed and "model.safetensors (" in printed
    _, header, text = card.split("---", 2)
    fields = yaml.safe_load(header)
    assert fields["pipeline_tag"] == "robotics" and fields["license"] == "apache-2.0"
    for fact in (
        "base, wrist", "uint8 [36, 36, 3]", "x, y, z", "dx, dy, grip", "[3, 3]", "20 Hz", "grip in {-1, 1}",  # schema
        "episodes: 2", "steps 1, batch_size 2",  # training data
        "| libero_object | official | 97/100 = 97.0 % | 91.5 - 99.0 % | 1 |",  # results with intervals
        f"torch: {json.loads((policy / 'versions.json').read_text())['torch']}", checkpoint_hash(policy),  # versions
    ):  # fmt: skip
        assert fact in text, fact


def test_the_card_changes_neither_hash_nor_policy(policy: Path, capsys: pytest.CaptureFixture[str]):
    (policy / "README.md").unlink(missing_ok=True)
    before = checkpoint_hash(policy)
    assert push(policy, "--dry_run") == 0
    assert checkpoint_hash(policy) == before == load_policy(policy).content_hash
    assert "None were given with this policy" in (policy / "README.md").read_text()


def test_results_of_another_policy_are_refused(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = write_results(tmp_path / "eval_info.json", "0123456789abcdef")
    assert push(policy, f"--results=[{results}]", "--dry_run") == 2
    assert "results of the policy 0123456789abcdef" in capsys.readouterr().err


def test_without_a_network_the_error_says_so(policy: Path, capsys: pytest.CaptureFixture[str]):
    assert push(policy) == 2
    assert "The Hub cannot be reached" in capsys.readouterr().err


def test_the_whole_folder_is_sent_and_nothing_hidden(policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert push(policy, "--private") == 0
    assert [name for name, _ in calls] == ["create", "upload"] and calls[0][1]["private"] is True
    assert calls[1][1]["folder_path"] == policy and calls[1][1]["ignore_patterns"] == [".*"]
    assert "https://hub/commit" in capsys.readouterr().out


def test_adapters_for_a_base_that_only_this_machine_has_are_not_pushed(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assets, weights = PolicyAssets.load(policy)
    base = Base(str(tmp_path / "llama"), None, "0" * 16, "float32", None, 8, 16.0)
    PolicyAssets(**{**vars(assets), "base": base}).save(tmp_path / "adapters", weights)
    assert push(tmp_path / "adapters", "--dry_run") == 2
    assert "vla merge" in capsys.readouterr().err
