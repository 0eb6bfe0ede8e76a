"""Laws of scaling fits: known exponents come back within the intervals, and the intervals cover as often as they say."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sim.results import append_row
from sim.scaling.fit import fit_power_law, student_quantile
from sim.scaling.runs import Run, count_parameters
from sim.scaling.verb import ScalingConfig, fit_all, scaling
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
    with pytest.raises(ValueError, match="positive"):
        fit_power_law([1, 2, 3, 4], [1, 0, 1, 1])


def runs(count: int) -> list[Run]:
    values = np.geomspace(1e5, 1e7, count)
    return [
        Run(f"r{i}", f"c{i}", int(n), 10 * (i + 1), 1000, 32_000, float(0.2 + 50 * n**-0.5), None, solved=i, episodes=20)
        for i, n in enumerate(values)
    ]


def test_each_quantity_is_fitted_against_each_axis_and_few_runs_are_said_to_be_few():
    fits = {(fit.quantity, fit.axis): fit for fit in fit_all(runs(8), ScalingConfig([], resamples=50))}
    assert set(fits) == {(q, a) for q in ("loss", "failure") for a in ("parameters", "demonstrations", "compute")}
    assert fits["loss", "parameters"].law.exponent == pytest.approx(0.5, abs=0.01)
    few = fit_all(runs(3), ScalingConfig([], resamples=50))
    assert all(fit.law is None and "needs 4 values of x, got 3" in fit.why_not for fit in few)


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
    log.append({"step": 100, "validation/action_error": 0.05 + 1 / demonstrations})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return checkpoint_hash(policy)


def test_runs_and_their_evaluations_become_fits(tmp_path: Path):
    for index, size in enumerate((10, 100, 1000, 10_000)):
        checkpoint = write_run(tmp_path / "runs" / f"run{index}", size, 10 * (index + 1))
        (tmp_path / "evaluations" / f"e{index}").mkdir(parents=True)
        for number in range(4):
            row = asdict(episode(0, number, number < index, checkpoint=checkpoint))
            append_row(tmp_path / "evaluations" / f"e{index}" / "episodes.jsonl", row)
    config = ScalingConfig([tmp_path / "runs"], [tmp_path / "evaluations"], tmp_path / "out", resamples=20)
    found, fits = scaling(config)
    assert [run.parameters for run in found] == [100, 1000, 10_000, 100_000]
    assert [run.samples for run in found] == [1600] * 4 and [run.solved for run in found] == [0, 1, 2, 3]
    assert found[0].loss == pytest.approx(0.1 + 10**-0.5 + 1 / 100), "the mean of the last tenth of ten"
    assert found[1].compute == 6 * 1000 * 1600 and found[3].failure == pytest.approx(1.5 / 5)
    assert len(fits) == 9 and all(fit.law is not None for fit in fits)
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert len(written["fits"]) == 9 and (tmp_path / "out" / "scaling.png").exists()
    assert "| run3 | 100000 | 40 |" in (tmp_path / "out" / "scaling.md").read_text()


def test_parameters_are_counted_off_the_header(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert count_parameters(tmp_path / "m.safetensors") == 22
