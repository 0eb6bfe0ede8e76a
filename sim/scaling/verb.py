"""Loss and success of our own runs against parameters, demonstrations and compute (`vla scaling`): fits, table, plot, JSON.

A fit over one axis tells of that axis only as far as the runs differ in nothing else: choose them so.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sim.evaluate import git_commit
from sim.report.section import markdown_table
from sim.scaling.fit import RESAMPLES, PowerLaw, fit_power_law
from sim.scaling.runs import Run, find_runs, read_evaluations, read_run
from vla.home import remask_home

AXES = {"parameters": "parameters", "demonstrations": "demonstrations", "compute": "6 x parameters x samples"}
QUANTITIES = {"loss": "training loss", "held_out_error": "held-out action error", "failure": "share of episodes not solved"}


@dataclass(frozen=True)
class ScalingConfig:
    """Settings of `vla scaling`."""

    runs: list[Path]  # folders of `vla train`, or folders of such folders
    evaluations: list[Path] | None = None  # folders of `vla eval`, or folders of such folders; matched by checkpoint
    output_dir: Path | None = None  # default: REMASK_HOME/scaling
    floor: bool = True  # y = floor + scale * x^-exponent; false: no floor
    resamples: int = RESAMPLES  # of the bootstrap
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """One quantity against one axis."""

    quantity: str
    axis: str
    runs: int
    law: PowerLaw | None  # None: could not be fitted
    why_not: str = ""


def fit_all(runs: Sequence[Run], config: ScalingConfig) -> list[Fit]:
    """Every quantity that some runs know against every axis."""
    fits = []
    for quantity in QUANTITIES:
        known = [run for run in runs if getattr(run, quantity) is not None]
        for axis in AXES if known else ():
            x, y = points(known, axis, quantity)
            try:
                law = fit_power_law(x, y, floor=config.floor, resamples=config.resamples, seed=config.seed)
                fits.append(Fit(quantity, axis, len(known), law))
            except ValueError as error:
                fits.append(Fit(quantity, axis, len(known), None, str(error)))
    return fits


def points(runs: Sequence[Run], axis: str, quantity: str) -> tuple[list[float], list[float]]:
    return [float(getattr(run, axis)) for run in runs], [float(getattr(run, quantity)) for run in runs]


def record(runs: Sequence[Run], fits: Sequence[Fit], config: ScalingConfig) -> dict[str, Any]:
    """What scaling.json holds."""
    return {
        "runs": [asdict(run) | {"compute": run.compute, "failure": run.failure} for run in runs],
        "fits": [
            {"quantity": fit.quantity, "axis": fit.axis, "runs": fit.runs, **asdict(fit.law)}
            for fit in fits
            if fit.law is not None
        ],
        "not_fitted": [{"quantity": fit.quantity, "axis": fit.axis, "why": fit.why_not} for fit in fits if fit.law is None],
        "floor": config.floor,
        "resamples": config.resamples,
        "seed": config.seed,
        "git_commit": git_commit(),
    }


def fit_line(fit: Fit) -> list[Any]:
    if fit.law is None:
        return [fit.quantity, fit.axis, fit.runs, "-", "-", fit.why_not]
    low, high = fit.law.exponent_interval_95
    floor_low, floor_high = fit.law.floor_interval_95
    exponent = f"{fit.law.exponent:.3f} [{low:.3f}, {high:.3f}]"
    floor = f"{fit.law.floor:.3g} [{floor_low:.3g}, {floor_high:.3g}]"
    return [fit.quantity, fit.axis, fit.runs, exponent, floor, fit.law.r_squared]


FIT_COLUMNS = ("quantity", "against", "runs", "exponent [95 %]", "floor [95 %]", "R2 of logarithms")


def write_markdown(runs: Sequence[Run], fits: Sequence[Fit], config: ScalingConfig, path: Path) -> None:
    columns = ("run", "parameters", "demonstrations", "samples", "loss", "held-out error", "solved")
    lines = [
        [run.folder, run.parameters, run.demonstrations, run.samples, run.loss, run.held_out_error,
         f"{run.solved}/{run.episodes}" if run.episodes else None]
        for run in runs
    ]  # fmt: skip
    law = "floor + scale * x^-exponent" if config.floor else "scale * x^-exponent"
    told = f"y = {law}; 95 % intervals of {config.resamples} bootstrap samples."
    text = ["# Scaling", "", markdown_table(columns, lines), "", told]
    path.write_text("\n".join([*text, "", markdown_table(FIT_COLUMNS, map(fit_line, fits)), "", "![fits](scaling.png)", ""]))


def write_plot(runs: Sequence[Run], fits: Sequence[Fit], path: Path) -> None:
    """A panel a quantity and axis, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quantities = [name for name in QUANTITIES if any(fit.quantity == name for fit in fits)]
    if not quantities:
        return
    figure, panels = pyplot.subplots(
        len(quantities), len(AXES), figsize=(3.4 * len(AXES), 2.8 * len(quantities)), layout="constrained", squeeze=False
    )
    for fit in fits:
        axes = panels[quantities.index(fit.quantity)][list(AXES).index(fit.axis)]
        x, y = points([run for run in runs if getattr(run, fit.quantity) is not None], fit.axis, fit.quantity)
        axes.scatter(x, y, s=14, color="black")
        if fit.law is not None:
            line = np.geomspace(min(x), max(x), 100)
            axes.plot(line, fit.law(line), label=f"exponent {fit.law.exponent:.2f}")
            axes.legend(fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel=AXES[fit.axis], ylabel=QUANTITIES[fit.quantity])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def scaling(config: ScalingConfig) -> tuple[list[Run], list[Fit]]:
    """Read, fit, write scaling.json, scaling.md and scaling.png. Raises ValueError without a run."""
    folders = find_runs(Path(folder).expanduser() for folder in config.runs)
    if not folders:
        raise ValueError("Which runs? Give --runs='[FOLDER, FOLDER]'.")
    rows = read_evaluations(Path(folder).expanduser() for folder in config.evaluations or ())
    runs = [read_run(folder, rows) for folder in folders]
    fits = fit_all(runs, config)
    output = Path(config.output_dir or remask_home() / "scaling").expanduser()
    output.mkdir(parents=True, exist_ok=True)
    (output / "scaling.json").write_text(json.dumps(record(runs, fits, config), indent=1))
    write_markdown(runs, fits, config, output / "scaling.md")
    write_plot(runs, fits, output / "scaling.png")
    return runs, fits


def main(argv: list[str]) -> None:
    """`vla scaling`."""
    from vla.cli import parse_config

    config = parse_config(ScalingConfig, argv, verb="scaling")
    runs, fits = scaling(config)
    table = Table(*FIT_COLUMNS, title=f"{len(runs)} runs")
    for fit in fits:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in fit_line(fit)))
    Console().print(table)
    print(f"scaling.json, scaling.md, scaling.png: {config.output_dir or remask_home() / 'scaling'}")
