"""Laws of the evaluation: its sanity block passes an honest encoder and catches masked ones, and nothing is printed without it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from multimodal.bind.ball import Ball
from multimodal.bind.certificate import SmoothingConfig, certify
from multimodal.bind.classifier import Classifier
from multimodal.bind.evaluate_calibration import EvaluateCalibrationConfig, evaluate_calibration, headline, made_with
from multimodal.bind.interface import Box
from multimodal.bind.intervals import Share, lower_bound, upper_tail
from multimodal.bind.reference_attacks import autoattack
from multimodal.bind.robustness import NAIVE, QUICK, naive_survivors, retrieve
from multimodal.bind.robustness_report import AccuracyRow, RobustnessReport
from multimodal.bind.sanity import REQUIRED, Check, SanityBlock, SanityConfig, sanity_checks
from multimodal.bind.train_calibration import embed_all
from tests.drawn_shapes import build_task

BRIEF = SanityConfig(epsilons=(1.0, 4.0, 16.0, 64.0), steps=(1, 5, 15), restarts=(1, 2), queries=60, binarised=12)


def scene(count: int = 24, modality: str = "heat"):
    task = build_task()
    bound = task.splits["test"]
    bound = bound.select((~task.is_unseen(bound)).nonzero()[:count, 0])
    return task, bound.inputs[modality], bound.labels


class _Masked:
    """The heat encoder behind a preprocessing that hides its gradient, one way or another."""

    modality, dimension, box, logit_scale = "heat", 16, Box(20.0, 80.0, "degrees C", 60 / 255), 14.0

    def __init__(self, encoder, how: str) -> None:
        self.encoder, self.how = encoder, how

    def embed(self, inputs: Tensor) -> Tensor:
        if self.how == "rounded":  # zero almost everywhere
            inputs = 2.0 * torch.round(inputs / 2.0)
        elif self.how == "reversed":  # right values, a gradient that points the wrong way
            inputs = 2 * inputs.detach() - inputs
        elif self.how == "detached":
            inputs = inputs.detach()
        return self.encoder.embed(inputs.clamp(20, 80))


def test_an_honest_encoder_passes_every_check() -> None:
    task, inputs, labels = scene()
    model = Classifier(task.encoders["heat"], task.centers).eval()
    block = sanity_checks(model, model, inputs, labels, BRIEF)
    assert block.passed, block.markdown()
    assert tuple(check.name for check in block.checks) == REQUIRED
    assert "All sanity checks passed" in block.markdown()


def test_a_gradient_masked_model_is_caught() -> None:
    """Rounding looks robust to gradients (white-box finds little) and is not: four checks of different kinds say so."""
    task, inputs, labels = scene()
    honest = Classifier(task.encoders["heat"], task.centers).eval()
    masked = Classifier(_Masked(task.encoders["heat"], "rounded"), task.centers).eval()
    block = sanity_checks(masked, honest, inputs, labels, BRIEF)
    failed = {check.name for check in block.checks if not check.passed}
    expected = {"no zero gradients", "white-box <= transfer <= noise", "Square beats no white-box attack", "binarisation test"}
    assert expected <= failed, block.markdown()
    assert "SANITY FAILED" in block.markdown()


def test_a_gradient_that_points_the_wrong_way_is_caught() -> None:
    task, inputs, labels = scene()
    honest = Classifier(task.encoders["heat"], task.centers).eval()
    block = sanity_checks(Classifier(_Masked(task.encoders["heat"], "reversed"), task.centers).eval(), honest, inputs, labels, BRIEF)
    assert not block.passed, block.markdown()


def test_an_encoder_without_a_gradient_is_refused() -> None:
    task, inputs, labels = scene(4)
    model = Classifier(_Masked(task.encoders["heat"], "detached"), task.centers).eval()
    with pytest.raises(ValueError, match="no gradient in the inputs"):
        sanity_checks(model, model, inputs, labels, BRIEF)


def test_nothing_is_reported_without_its_sanity_block() -> None:
    with pytest.raises(ValueError, match="a report needs"):
        SanityBlock((Check(REQUIRED[0], True, ""),))
    row = AccuracyRow("frozen", "seen", 4.0, 1.0, {"worst": Share(1, 2)}, (0.5,))
    with pytest.raises(ValueError, match="not printed without"):
        RobustnessReport("heat", "K", "linf", "", made_with(EvaluateCalibrationConfig()), {}, (row,), (), ())


def _report(**changes) -> RobustnessReport:
    config = EvaluateCalibrationConfig(
        modality="heat", epsilons=(2.0,), samples=12, seeds=(0, 1), steps=6, retrieval_samples=20, certified_samples=2,
        smoothing=SmoothingConfig(choosing=10, certifying=60, alpha=0.01), sanity_samples=12, sanity=BRIEF,
    )  # fmt: skip
    return evaluate_calibration(replace(config, **changes), build_task())


def test_the_report_holds_what_it_promises(tmp_path: Path) -> None:
    report = _report()
    cells = {("frozen", part, epsilon) for part in ("seen", "unseen") for epsilon in (0.0, 2.0)}
    assert {(row.encoder, row.part, row.epsilon) for row in report.accuracy} == cells
    for row in report.accuracy:
        survivors = {name: share.count for name, share in row.survivors.items()}
        assert survivors["worst"] <= min(count for name, count in survivors.items() if name != NAIVE)
        assert len(row.per_seed) == 2 and row.survivors["worst"].total == 24
        if row.epsilon == 0:
            assert set(survivors.values()) == {survivors["clean"]}
    assert headline(report, 2.0)["frozen"].value < headline(report, 0.0)["frozen"].value
    path = report.write(tmp_path)
    text, stored = path.read_text(), json.loads((tmp_path / "robustness.json").read_text())
    for words in ("## Sanity: frozen", "Clopper-Pearson", "R@10", "naive attack says", "Certified", "AutoAttack (reduced)", "at most 12 samples"):
        assert words in text
    made = {"task": None, "task_options": {}, "calibration": None, "reference": "reduced", "steps": 6, "samples": 12, "seeds": [0, 1]}
    assert stored["made"] == made
    assert len(stored["accuracy"]) == 4 and stored["sanity"]["frozen"][0]["name"] == REQUIRED[0]
    assert (tmp_path / "robustness.png").stat().st_size > 5000
    with pytest.raises(LookupError, match="there are"):
        headline(report, 3.0)


def test_epsilon_zero_equals_clean_and_worst_is_worst() -> None:
    task, inputs, labels = scene(16, "heat-l2")
    model = Classifier(task.encoders["heat-l2"], task.centers).eval()
    clean = model(inputs).argmax(1) == labels
    assert all(torch.equal(values, clean) for values in QUICK.run(model, inputs, labels, 0.0, 0).values())
    one, two = (QUICK.run(model, inputs, labels, model.encoder.box.radius(e), 0)["worst"] for e in (2, 6))
    assert two.sum() < one.sum() <= clean.sum()


def test_each_attack_judges_what_those_before_it_left_and_worst_is_as_if_all_had_judged_all() -> None:
    task, inputs, labels = scene(48)
    encoder = task.encoders["heat"]
    model, radius = Classifier(encoder, task.centers).eval(), encoder.box.radius(3)
    survived = QUICK.run(model, inputs, labels, radius, 5, transfer=model)
    clean, ball, generator = model(inputs), Ball(inputs, encoder.box, radius), torch.Generator().manual_seed(5)
    naive = naive_survivors(model, ball, labels, generator)
    alone = autoattack(model, inputs, labels, encoder.box, radius, QUICK.auto, 5).survived & survived["clean"]
    assert torch.equal(survived["autoattack"], alone) and torch.equal(survived[NAIVE], naive & survived["clean"])
    attacks, left = QUICK.attacks(model, ball, labels, clean, generator, 5, model), alone
    for name, attack in attacks.items():
        left = left & ~attack(torch.arange(48))
        assert torch.equal(survived[name], left), name
    assert torch.equal(survived["worst"], left) and 0 < left.sum() < alone.sum() < survived["clean"].sum()


def test_retrieval_counts_and_attacks_ranks() -> None:
    task, inputs, _ = scene(24)
    encoder, images = task.encoders["heat"], task.splits["test"].inputs["image"][:24]
    own = embed_all(encoder, inputs)
    perfect = retrieve(encoder, inputs, own, steps_of_255=0, attack_steps=3, seed=0, ranks=(1, 5))
    assert perfect.recall[1].count == 24
    gallery = embed_all(task.encoders["image"], images)
    clean = retrieve(encoder, inputs, gallery, steps_of_255=0, attack_steps=3, seed=0, ranks=(1, 5, 10))
    order = (encoder.embed(inputs) @ gallery.T).argsort(1, descending=True)
    for rank in (1, 5, 10):
        assert clean.recall[rank].count == sum(row in order[row, :rank] for row in range(24))
    hit = retrieve(encoder, inputs, own, steps_of_255=4, attack_steps=5, seed=0, ranks=(1, 5))
    assert hit.recall[1].count < 24 and hit.recall[1].count <= hit.recall[5].count


def test_intervals_are_exact() -> None:
    """Tails at the bounds are alpha / 2, and the library, where it is there, agrees."""
    for count, total in ((0, 20), (3, 20), (20, 20), (511, 1000)):
        low, high = Share(count, total).interval
        if count:
            assert math.isclose(upper_tail(count, total, low), 0.025, rel_tol=1e-6)
        if count < total:
            assert math.isclose(1 - upper_tail(count + 1, total, high), 0.025, rel_tol=1e-6)
        stats = pytest.importorskip("scipy.stats")
        theirs = stats.binomtest(count, total).proportion_ci(method="exact")
        assert math.isclose(low, theirs.low, abs_tol=1e-9) and math.isclose(high, theirs.high, abs_tol=1e-9)
    with pytest.raises(ValueError, match="total > 0"):
        Share(0, 0)


def test_a_certificate_is_the_formula_and_holds_on_a_line() -> None:
    """A classifier that looks at one coordinate: smoothed, its true radius is the distance to the threshold."""
    box, distance, sigma = Box(-100.0, 100.0, "m", 1.0), 1.5, 200 / 255
    config = SmoothingConfig(sigma=1.0, choosing=20, certifying=2000, alpha=0.001)
    logits = lambda points: torch.stack([points[:, 0], -points[:, 0]], 1)  # noqa: E731
    inputs = torch.tensor([[distance, 0.0], [0.0, 0.0]])
    found = certify(logits, inputs, box, config, torch.Generator().manual_seed(0))
    assert found.classes.tolist()[0] == 0 and 0.6 * distance < found.radius[0] <= distance
    assert found.radius[1] == 0  # on the threshold: abstains
    assert found.certified_share(torch.tensor([0, 0]), 0.5) == 0.5
    assert math.isclose(lower_bound(100, 100, 0.001), 0.001 ** (1 / 100), rel_tol=1e-9) and sigma > 0


def test_a_calibrated_folder_of_another_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError)):
        _report(calibration=tmp_path)
    with pytest.raises(ValueError, match="Unknown modality"):
        _report(modality="sonar")
    with pytest.raises(ValueError, match="at least one epsilon"):
        _report(epsilons=())
    with pytest.raises(ValueError, match="one thread"):
        _report(threads=0)
