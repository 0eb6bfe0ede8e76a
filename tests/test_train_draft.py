"""`vla train-draft` from checkpoint to checkpoint, and what is read back."""

import json
from pathlib import Path

import pytest
import torch

from multimodal.compressor import CompressorConfig
from multimodal.training import TrainingConfig
from multimodal.training_log import read_log
from serve import train_draft as module
from serve.draft_checkpoint import DraftAssets, load_draft
from serve.draft_model import DraftModel, DraftModelConfig
from serve.request import Request
from serve.target import Target
from serve.train_draft import TrainDraftConfig, answer, main, plot_accepted_length
from tests.test_draft import dialogue
from tests.tiny_vlm import naive, request, target

SMALL = CompressorConfig(prune_ratio=2.0, pool_ratio=4.0)


class FewDialogues:
    """Stands where the corpus does."""

    def __init__(self, root: Path, split: str, target: Target) -> None:
        self._all = [dialogue(index, 12) for index in range(6)]

    def __len__(self) -> int:
        return len(self._all)

    def batch(self, index: int, size: int, seed: int) -> list:
        return [self._all[(index * size + place) % len(self._all)][0] for place in range(size)]

    def questions(self, count: int, *, least_tokens: int, max_tokens: int) -> list[Request]:
        return [asked for _, asked in self._all[:count]]

    def frequent_ids(self, count: int) -> list[int]:
        return list(range(count))


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> Target:
    found = target(0, torch.float32)
    monkeypatch.setattr(module, "load_target", lambda path, device: found)
    monkeypatch.setattr(module, "CorpusDialogues", FewDialogues)
    return found


def test_a_run_writes_a_draft_its_log_and_its_curve(single, tmp_path, capsys):
    words = ["--vlm=v", "--corpus=c", f"--output_dir={tmp_path}", "--steps=4", "--held_out_prompts=2", "--model.head_size=200"]
    words += [f"--training.{setting}" for setting in ("save_every=2", "batch_size=2", "threads=1")]
    assert main([*words, "--model.compressor.prune_ratio=2.0", "--model.compressor.pool_ratio=4.0"]) == 0
    assert "vla bench spec" in capsys.readouterr().out
    scores = [row["validation/tokens_per_round"] for row in read_log(tmp_path) if "validation/tokens_per_round" in row]
    assert len(scores) == 2 and all(score >= 1 for score in scores)
    assert (tmp_path / "accepted_length.png").stat().st_size > 1000
    draft = load_draft(tmp_path / "checkpoints" / "last" / "policy", single)
    assert draft.config.head_size == 200 and draft.head_ids.tolist() == list(range(200))
    assert {"agreement_1", "agreement_3"} <= read_log(tmp_path)[0].keys()


def test_a_draft_survives_its_folder_and_knows_its_target(single, tmp_path):
    torch.manual_seed(3)
    config = DraftModelConfig(head_size=50, compressor=SMALL)
    draft = DraftModel(config, single.vlm, range(100, 150)).eval()
    DraftAssets(config, "abc", {"seed": 3}).save(tmp_path / "draft", draft.state_dict())
    loaded = load_draft(tmp_path / "draft", single)  # a target without a name is not compared
    for name, value in draft.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    named = Target(single.vlm, single.tokenizer, single.images, name="xyz")
    with pytest.warns(UserWarning, match="trained for target abc"):
        load_draft(tmp_path / "draft", named)
    (tmp_path / "draft" / "config.yaml").write_text("format: remask-policy-1\n")
    with pytest.raises(ValueError, match="remask-policy-1"):
        load_draft(tmp_path / "draft", single)


def test_the_target_answers_prompts_of_any_length():
    """Longer ones than those that the accepted length is measured on."""
    asked = [request(index, prompt=[9] * (20 + 60 * index), max_tokens=5) for index in range(3)]
    assert [list(finished.token_ids) for finished in answer(target(), asked)] == [naive(target(), each) for each in asked]


def test_a_curve_needs_measurements(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "elapsed": 3.0}) + "\n")
    assert plot_accepted_length([tmp_path], tmp_path / "curve.png") is None


def test_settings_come_from_the_command_line():
    config = TrainDraftConfig(Path("v"), Path("c"), Path("o"), training=TrainingConfig(steps=1))
    assert config.loss.soft_weight == 0.1 and config.loss.feature_weight == 1.0 and config.loss.rollout == 3
