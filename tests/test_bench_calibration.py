"""Laws of the calibration table: every row once, and a row that is what its arm measured."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from multimodal.bind.robustness import AttackSuite
from tests.benchmarks.bench_calibration import COLUMNS, Arm, check_encoders, check_partner, check_root, plan, row_of, run_arm
from tests.drawn_shapes import build_task


def options(**changes) -> argparse.Namespace:
    settings = {
        "task": "tests.drawn_shapes:build_task", "task_options": {}, "modalities": ["heat", "image"], "every_objective": ["ce", "l2"],
        "placements": ["frozen", "head", "head+adapters"], "objectives": ["combined"], "ablate": "", "seeds": [0], "steps": 10,
        "inner_steps": 2, "rank": 2, "epsilon": 4.0, "samples": 8, "headline": False, "threads": 1, "partner": "image", "split": "test",
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


def test_every_row_is_planned_once() -> None:
    arms = plan(options(ablate="heat", seeds=[0, 1]))
    assert len(arms) == len({arm.name for arm in arms}) == 2 * ((1 + 1 + 2) + (1 + 1 + 1))
    assert sum(arm.placement == "frozen" for arm in arms) == 4
    assert {arm.objective for arm in arms if arm.modality == "heat" and arm.placement == "head"} == {"combined"}
    assert {arm.objective for arm in arms if arm.modality == "image"} == {"-", "combined"}


def test_arms_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    check_root(tmp_path, options())
    check_root(tmp_path, options(modalities=["heat"], seeds=[1]))
    for changes in ({"rank": 1}, {"task_options": {"model": "other"}}, {"split": "validation"}, {"partner": "heat"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} was .*Give another --root"):
            check_root(tmp_path, options(**changes))


def test_an_arm_that_cannot_train_is_refused_before_any_runs() -> None:
    arms = plan(options(ablate="image", every_objective=["ce", "consistent"]))
    check_partner(arms, "heat")
    with pytest.raises(ValueError, match="image-head.adapters-consistent-0.*give --partner"):
        check_partner(arms, "image")
    with pytest.raises(ValueError, match="No objective 'cee'"):
        check_partner(plan(options(objectives=["cee"])), "image")


def test_a_row_is_what_its_arm_measured(tmp_path: Path) -> None:
    arms = [Arm("heat", "frozen", "-"), Arm("heat", "head+adapters", "ce")]
    for arm in arms:
        run_arm(arm, options(), tmp_path)
    found = [json.loads((tmp_path / f"{arm.name}.json").read_text()) for arm in arms]
    check_encoders(found)
    with pytest.raises(ValueError, match="heat began at different encoders"):
        check_encoders([found[0], found[1] | {"encoder": "another"}])
    frozen, trained = (dict(zip(COLUMNS, row_of(entry, found), strict=True)) for entry in found)
    assert frozen["trainable"] == frozen["seconds"] == frozen["gain over frozen"] == 0
    assert trained["trainable"] > 0 and trained["seconds"] > 0 and trained["% of model"] < trained["% of tower"]
    assert trained["gain over frozen"] == trained["AutoAttack %"] - frozen["AutoAttack %"]
    for row in (frozen, trained):
        assert row["95 % low"] <= row["AutoAttack %"] <= row["95 % high"] and row["worst case %"] <= row["AutoAttack %"] <= row["clean %"]


def test_an_arm_stopped_while_it_judged_says_how_long_it_trained_and_one_stopped_before_a_checkpoint_begins_anew(tmp_path: Path) -> None:
    arm = Arm("heat", "head", "ce")
    (tmp_path / "runs" / arm.name / "checkpoints").mkdir(parents=True)  # stopped while it wrote the first one
    seconds = []
    for _ in range(2):
        run_arm(arm, options(), tmp_path)
        seconds.append(json.loads((tmp_path / f"{arm.name}.json").read_text())["seconds"])
        (tmp_path / f"{arm.name}.json").unlink()
    assert seconds[0] == seconds[1] > 0


def test_the_split_that_judges_is_the_one_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what AutoAttack warns of stands in the row."""
    task, judged = build_task(), []

    def run(suite, model, inputs, labels, radius, seed, transfer, flags) -> dict[str, torch.Tensor]:
        judged.append(inputs)
        flags.append("There are zero gradients.")
        return dict.fromkeys(("clean", "naive", "autoattack", "worst"), torch.ones(len(labels), dtype=torch.bool))

    monkeypatch.setattr(AttackSuite, "run", run)
    arm = Arm("heat", "frozen", "-")
    for split in ("validation", "test"):
        run_arm(arm, options(split=split), tmp_path)
    for split, inputs in zip(("validation", "test"), judged, strict=True):
        rows = (task.splits[split].inputs["heat"][None] == inputs[:, None]).flatten(2).all(2)
        assert len(inputs) == 8 and rows.any(1).all()
    entry = json.loads((tmp_path / f"{arm.name}.json").read_text())
    assert dict(zip(COLUMNS, row_of(entry, [entry]), strict=True))["flags"] == "There are zero gradients."
