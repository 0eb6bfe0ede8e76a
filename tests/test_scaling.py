"""Laws of scaling fits: known exponents lie in the intervals, which cover as often as they say; like is fitted with like."""

import json
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sim.report.verb import build_section
from sim.results import append_row
from sim.scaling.evaluations import read_evaluations, with_evaluations
from sim.scaling.fit import fit_power_law, student_quantile
from sim.scaling.runs import Run, count_parameters
from sim.scaling.verb import AXES, ScalingConfig, fit_all, scaling
from tests.test_report import episode

X = np.geomspace(1e4, 1e8, 16)


def drawn(exponent: float, floor: float, noise: float, seed: int, x: np.ndarray = X) -> np.ndarray:
    exact = floor + 3.0 * (x / x[0]) ** -exponent
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x)))


@pytest.mark.parametrize(("exponent", "floor"), [(0.1, 0.0), (0.34, 0.5), (0.7, 0.1), (1.2, 0.02)])
def test_exact_data_give_the_exact_law(exponent: float, floor: float):
    law = fit_power_law(X, drawn(exponent, floor, 0.0, 0), floor=floor > 0, resamples=50)
    assert law.exponent == pytest.approx(exponent, abs=0.002)
    assert law.floor == pytest.approx(floor, rel=0.02, abs=1e-12)
    np.testing.assert_allclose(law(X), drawn(exponent, floor, 0.0, 0), rtol=0.01)
    assert law.r_squared > 0.999


@pytest.mark.parametrize(("exponent", "floor"), [(0.25, 0.0), (0.5, 0.3), (0.8, 0.05)])
def test_known_exponents_lie_in_the_intervals(exponent: float, floor: float):
    """Of 40 draws with 5 % noise at least 32 are covered; of 150, 91 to 95 % were: with 16 points a bootstrap is short."""
    covered = 0
    for seed in range(40):
        law = fit_power_law(X, drawn(exponent, floor, 0.05, seed), floor=floor > 0, resamples=100, seed=1000 + seed)
        low, high = law.exponent_interval_95
        covered += low <= exponent <= high
    assert covered >= 32


TABLE = [(2, 4.303, 0.03), (3, 3.182, 0.01), (5, 2.571, 0.002), (13, 2.160, 0.001)]


@pytest.mark.parametrize(("freedom", "quantile", "error"), TABLE)
def test_students_quantiles_are_those_of_tables(freedom: int, quantile: float, error: float):
    assert student_quantile(freedom) == pytest.approx(quantile, rel=error)


def test_more_noise_makes_wider_intervals():
    intervals = [fit_power_law(X, drawn(0.5, 0.1, noise, 0), resamples=200).exponent_interval_95 for noise in (0.01, 0.1)]
    assert np.diff(intervals[0]) < np.diff(intervals[1])


def test_the_unit_of_x_does_not_matter():
    y = drawn(0.5, 0.2, 0.03, 1)
    one, other = fit_power_law(X, y, resamples=50), fit_power_law(1e6 * X, y, resamples=50)
    assert one.exponent == pytest.approx(other.exponent, abs=1e-6) and one.floor == pytest.approx(other.floor, abs=1e-6)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="needs 4 values of x, got 2"):
        fit_power_law([1, 1, 2, 2], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="border 3: these points tell no power law"):
        fit_power_law([1, 2, 4, 8], [9.0, 1.0, 1.1, 1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_power_law([1, 2, 3, 4], [1, 0, 1, 1])


def run(size: float, demonstrations: int, samples: int, solved: int = 0) -> Run:
    loss = float(0.2 + 50 * size**-0.5)
    return Run(f"r{size:.0f}", f"c{size:.0f}", int(size), demonstrations, 1000, samples, loss, None, None, solved=solved, episodes=20)


SIZES = np.geomspace(1e5, 1e7, 8)
QUICK = ScalingConfig([], resamples=50)


def test_an_axis_is_fitted_over_runs_equal_in_the_others():
    grid = [run(size, demonstrations, 32_000, solved=i) for i, size in enumerate(SIZES) for demonstrations in (10, 100)]
    fits = fit_all(grid, QUICK)
    assert [fit.equal for fit in fits if (fit.quantity, fit.axis) == ("loss", "parameters")] == [
        {"demonstrations": 10, "samples": 32_000}, {"demonstrations": 100, "samples": 32_000},
    ]  # fmt: skip
    for fit in fits:
        assert all({getattr(each, name) for each in fit.runs} == {value} for name, value in fit.equal.items() if fit.runs)
        if (fit.quantity, fit.axis) == ("loss", "parameters"):
            assert len(fit.runs) == 8 and fit.law.exponent == pytest.approx(0.5, abs=0.01)
        elif fit.axis == "demonstrations":
            assert "needs 4 values of x, got 2" in fit.why_not and len(fit.runs) == 2
            assert fit.group == f"parameters {fit.runs[0].parameters}, samples 32000"
        elif fit.axis == "compute":
            assert not fit.runs and fit.why_not == "no two of 16 runs differ in compute and share parameters and demonstrations"
    expected = {(q, a) for q in ("loss", "failure") for a in AXES} - {("loss", "demonstrations")}
    assert {(fit.quantity, fit.axis) for fit in fits} == expected, "fewer demonstrations are learnt by heart"


def test_what_another_axis_does_is_in_no_exponent():
    """Loss falls with size alone; demonstrations that grow beside it are given no exponent for it."""
    fits = fit_all([run(size, 10 * (i + 1), 32_000) for i, size in enumerate(SIZES)], QUICK)
    assert all(fit.law is None and not fit.runs for fit in fits)
    lengths = fit_all([run(1e6, 10, 1000 * (i + 1)) for i in range(5)], QUICK)
    assert [fit.axis for fit in lengths if fit.quantity == "loss" and fit.runs] == ["compute"]


def write_run(folder: Path, size: int, demonstrations: int) -> str:
    """A run folder of a `size` x 10 weight; returns its checkpoint's hash."""
    import torch

    from multimodal.checkpoint import checkpoint_hash, save_checkpoint

    provenance = {"episodes": demonstrations, "frames": 100, "training": {"batch_size": 8, "accumulation": 2}}
    policy = folder / "checkpoints" / "last" / "policy"
    policy.parent.mkdir(parents=True)
    blobs = {"provenance.json": json.dumps(provenance)}
    save_checkpoint(policy, model_state={"w": torch.zeros(size, 10)}, config={}, blobs=blobs)
    log = [{"step": step, "loss": 0.1 + size**-0.5 + 1 / step} for step in range(10, 110, 10)]
    log += [{"step": step, "validation/action_error": 0.05 + 1 / step, "validation/loss": 0.3 + size**-0.5} for step in (50, 100)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return checkpoint_hash(policy)


SETTING = {"suite": "libero_object", "split": "validation", "protocol": "openpi", "decode": {}, "perturb": None, "shard": None}


def write_evaluation(folder: Path, checkpoint: str, solved: int, tasks: tuple[int, ...] = (0,), **changes) -> Path:
    """Four episodes of each task, the first `solved` of them solved."""
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(SETTING | {"checkpoint": checkpoint} | changes))
    for task, number in product(tasks, range(4)):
        append_row(folder / "episodes.jsonl", asdict(episode(task, number, number < solved, checkpoint=checkpoint)))
    return folder


def test_runs_and_their_evaluations_become_fits(tmp_path: Path):
    for index, size in enumerate((10, 100, 1000, 10_000)):
        checkpoint = write_run(tmp_path / "runs" / f"run{index}", size, 40)
        write_evaluation(tmp_path / "evaluations" / f"e{index}", checkpoint, index)
    write_evaluation(tmp_path / "evaluations" / "stranger", "of no run", 4, split="official")
    config = ScalingConfig([tmp_path / "runs"], [tmp_path / "evaluations"], tmp_path / "out", resamples=20)
    found, fits, record = scaling(config)
    assert [run.parameters for run in found] == [100, 1000, 10_000, 100_000]
    assert [run.samples for run in found] == [1600] * 4 and [run.solved for run in found] == [0, 1, 2, 3]
    assert found[0].loss == pytest.approx(0.1 + 10**-0.5 + 1 / 100), "the mean of the last tenth of ten"
    assert found[1].compute == 6 * 1000 * 1600 and found[3].failure == pytest.approx(1.5 / 5)
    assert found[1].held_out_loss == 0.4 and found[1].held_out_error == 0.05 + 1 / 100, "the last that was logged"
    fitted = [(fit.quantity, fit.axis) for fit in fits if fit.law is not None]
    assert fitted == [(quantity, "parameters") for quantity in ("loss", "held_out_loss", "failure")] and len(fits) == 11
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert written["evaluations"]["split"] == "validation" and (tmp_path / "out" / "scaling.png").exists()
    assert [fit["equal"] for fit in written["fits"]] == [{"demonstrations": 40, "samples": 1600}] * 3
    text = (tmp_path / "out" / "scaling.md").read_text()
    assert "| run3 | 100000 | 40 |" in text and "| loss | parameters | demonstrations 40, samples 1600 | 4 |" in text
    section = build_section("out", tmp_path)
    assert "| loss | parameters | demonstrations 40, samples 1600 | 4 |" in section.table
    assert "protocol openpi" in section.facts["evaluations"]


TWO = [replace(run(size, 10, 1000), episodes=0) for size in (1e5, 1e6)]
A, B = (each.checkpoint for each in TWO)
UNLIKE = [
    ({"split": "official"}, "split was 'validation', is 'official'"),
    ({"protocol": "lerobot"}, "protocol was 'openpi', is 'lerobot'"),
    ({"decode": {"rounds": 1}}, "decode was {}, is {'rounds': 1}"),
    ({"mesh_detail": 0.15}, "mesh_detail was None, is 0.15"),
    ({"perturb": {"kind": "camera", "severity": 3}}, "perturb was None"),
]


@pytest.mark.parametrize(("changes", "message"), UNLIKE, ids=lambda given: next(iter(given)) if isinstance(given, dict) else "")
@pytest.mark.parametrize("checkpoint", [A, B], ids=["same run", "other run"])
def test_evaluations_of_other_settings_are_refused(tmp_path: Path, checkpoint: str, changes: dict, message: str):
    folders = [write_evaluation(tmp_path / "a", A, 1), write_evaluation(tmp_path / "b", checkpoint, 2, **changes)]
    with pytest.raises(ValueError, match=re.escape(message)):
        with_evaluations(TWO, read_evaluations(folders))


def test_a_start_counts_once_and_shards_add_up(tmp_path: Path):
    write_evaluation(tmp_path / "study" / "a", A, 1, shard="0/2", tasks=(0,))
    write_evaluation(tmp_path / "study" / "b", A, 3, shard="1/2", tasks=(1,))
    (one, other), setting = with_evaluations(TWO, read_evaluations([tmp_path / "study", tmp_path / "study" / "a"]))
    assert (one.solved, one.episodes) == (4, 8) and other == TWO[1] and "shard" not in setting
    with pytest.raises(ValueError, match="run r1000000 was evaluated on tasks .0., r100000 on .0, 1."):
        write_evaluation(tmp_path / "study" / "c", B, 1)
        with_evaluations(TWO, read_evaluations([tmp_path / "study"]))
    with pytest.raises(ValueError, match="task 0, episode 0 is in .*a and in .*again"):
        with_evaluations(TWO, read_evaluations([tmp_path / "study", write_evaluation(tmp_path / "again", A, 1)]))
    assert with_evaluations(TWO, []) == (TWO, {})


def test_an_evaluation_without_settings_is_refused(tmp_path: Path):
    (write_evaluation(tmp_path / "a", A, 1) / "settings.json").unlink()
    with pytest.raises(FileNotFoundError, match="settings.json"):
        read_evaluations([tmp_path / "a"])


def test_parameters_are_counted_off_the_header(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert count_parameters(tmp_path / "m.safetensors") == 22
