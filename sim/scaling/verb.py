"""Loss and success of our own runs against parameters, demonstrations and compute (`vla scaling`): fits, table, plot, JSON.

A fit over one axis is made of runs that are equal in the others; groups of such runs are fitted apart. What is no axis (head,
objective, data) is not looked at: choose runs that share it. Runs trained for --training.minutes rarely have equal samples.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sim.evaluate import git_commit
from sim.report.section import cell_text
from sim.scaling.evaluations import read_evaluations, with_evaluations
from sim.scaling.fit import RESAMPLES, PowerLaw, fit_power_law
from sim.scaling.runs import Run, find_runs, read_run
from sim.scaling.tables import FIT_COLUMNS, fit_lines, scaling_tables
from vla.home import remask_home
from vla.show import show

AXES = {"parameters": "parameters", "demonstrations": "demonstrations", "compute": "6 x parameters x samples"}
EQUAL = {  # axis -> what the runs of a fit share; parameters and samples make compute, so only one of them may vary
    "parameters": ("demonstrations", "samples"),
    "demonstrations": ("parameters", "samples"),
    "compute": ("parameters", "demonstrations"),
}
QUANTITIES = {
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "held_out_error": "held-out action error",
    "failure": "share of episodes not solved",
}
SENSELESS = {("loss", "demonstrations")}  # fewer are repeated more often, and learnt by heart


@dataclass(frozen=True)
class ScalingConfig:
    """Settings of `vla scaling`."""

    runs: list[Path]  # folders of `vla train`, or folders of such folders
    evaluations: list[Path] | None = None  # folders of `vla eval`, or folders of such; matched by checkpoint, of one setting
    output_dir: Path | None = None  # default: REMASK_HOME/scaling
    floor: bool = True  # y = floor + scale * x^-exponent; false: no floor
    resamples: int = RESAMPLES  # of the bootstrap
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """One quantity against one axis, over runs equal in the other axes."""

    quantity: str
    axis: str
    equal: dict[str, int]  # what these runs share; {}: no two runs differ in this axis alone
    runs: Sequence[Run]
    law: PowerLaw | None  # None: could not be fitted
    why_not: str = ""

    @property
    def group(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.equal.items())


def fit_all(runs: Sequence[Run], config: ScalingConfig) -> list[Fit]:
    """Every quantity that some runs know against every axis, in every group of runs that differ in it alone."""
    fits = []
    for quantity in QUANTITIES:
        known = [run for run in runs if getattr(run, quantity) is not None]
        for axis in AXES if known else ():
            if (quantity, axis) in SENSELESS:
                continue
            groups = groups_of(known, axis)
            fits += [fit_group(quantity, axis, equal, members, config) for equal, members in groups]
            if not groups:
                why_not = f"no two of {len(known)} runs differ in {axis} and share {' and '.join(EQUAL[axis])}"
                fits.append(Fit(quantity, axis, {}, (), None, why_not))
    return fits


def groups_of(runs: Sequence[Run], axis: str) -> list[tuple[dict[str, int], list[Run]]]:
    """Runs equal in the other axes, with what they share; those of one value of this axis are no group."""
    found: dict[tuple[int, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(getattr(run, name) for name in EQUAL[axis]), []).append(run)
    several = {shared: members for shared, members in found.items() if len({getattr(run, axis) for run in members}) > 1}
    return [(dict(zip(EQUAL[axis], shared, strict=True)), members) for shared, members in sorted(several.items())]


def fit_group(quantity: str, axis: str, equal: dict[str, int], runs: Sequence[Run], config: ScalingConfig) -> Fit:
    x, y = points(runs, axis, quantity)
    try:
        law = fit_power_law(x, y, floor=config.floor, resamples=config.resamples, seed=config.seed)
        return Fit(quantity, axis, equal, runs, law)
    except ValueError as error:
        return Fit(quantity, axis, equal, runs, None, str(error))


def points(runs: Sequence[Run], axis: str, quantity: str) -> tuple[list[float], list[float]]:
    return [float(getattr(run, axis)) for run in runs], [float(getattr(run, quantity)) for run in runs]


def record(runs: Sequence[Run], fits: Sequence[Fit], setting: dict[str, Any], config: ScalingConfig) -> dict[str, Any]:
    """What scaling.json holds; setting: of the evaluations."""
    told = [
        {"quantity": fit.quantity, "axis": fit.axis, "equal": fit.equal, "runs": [run.folder for run in fit.runs]}
        for fit in fits
    ]
    return {
        "runs": [asdict(run) | {"compute": run.compute, "failure": run.failure} for run in runs],
        "evaluations": setting,
        "fits": [each | asdict(fit.law) for each, fit in zip(told, fits, strict=True) if fit.law is not None],
        "not_fitted": [each | {"why": fit.why_not} for each, fit in zip(told, fits, strict=True) if fit.law is None],
        "floor": config.floor,
        "resamples": config.resamples,
        "seed": config.seed,
        "git_commit": git_commit(),
    }


def write_markdown(found: Mapping[str, Any], path: Path) -> None:
    law = "floor + scale * x^-exponent" if found["floor"] else "scale * x^-exponent"
    evaluated = ", ".join(f"{name} {value}" for name, value in found["evaluations"].items() if value not in (None, {}))
    told = f"Evaluations: {evaluated or 'none'}. y = {law}; 95 % intervals of {found['resamples']} bootstrap samples."
    path.write_text("\n".join(["# Scaling", "", scaling_tables(found), "", told, "", "![fits](scaling.png)", ""]))


def write_plot(runs: Sequence[Run], fits: Sequence[Fit], path: Path) -> None:
    """A panel a quantity and axis, both logarithmic; a colour a group, runs of no group grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator

    quantities = [name for name in QUANTITIES if any(fit.quantity == name for fit in fits)]
    if not quantities:
        return
    figure, panels = pyplot.subplots(
        len(quantities), len(AXES), figsize=(3.4 * len(AXES), 2.8 * len(quantities)), layout="constrained", squeeze=False
    )
    for (row, quantity), (column, axis) in product(enumerate(quantities), enumerate(AXES)):
        axes = panels[row][column]
        if (quantity, axis) in SENSELESS:
            axes.set_axis_off()
            continue
        known = [run for run in runs if getattr(run, quantity) is not None]
        axes.scatter(*points(known, axis, quantity), s=14, color="lightgrey")
        for number, fit in enumerate(fit for fit in fits if (fit.quantity, fit.axis) == (quantity, axis) and fit.runs):
            x, y = points(fit.runs, axis, quantity)
            axes.scatter(x, y, s=14, color=f"C{number}", label=fit.group)
            if fit.law is not None:
                line = np.geomspace(min(x), max(x), 100)
                axes.plot(line, fit.law(line), color=f"C{number}", label=f"exponent {fit.law.exponent:.2f}")
            axes.legend(fontsize=6)
        axes.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=QUANTITIES[quantity])
        if axis == "demonstrations":
            counts = sorted({run.demonstrations for run in known})
            axes.set_xticks(counts, map(str, counts), minor=False)
            axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def scaling(config: ScalingConfig) -> tuple[list[Run], list[Fit], dict[str, Any]]:
    """Read, fit, write scaling.json, scaling.md and scaling.png; runs, fits and what scaling.json holds.

    Raises ValueError without a run or for unlike evaluations.
    """
    folders = find_runs(Path(folder).expanduser() for folder in config.runs)
    if not folders:
        raise ValueError("Which runs? Give --runs='[FOLDER, FOLDER]'.")
    evaluations = read_evaluations(Path(folder).expanduser() for folder in config.evaluations or ())
    runs, setting = with_evaluations([read_run(folder) for folder in folders], evaluations)
    fits = fit_all(runs, config)
    found, output = record(runs, fits, setting, config), output_dir(config)
    output.mkdir(parents=True, exist_ok=True)
    (output / "scaling.json").write_text(json.dumps(found, indent=1))
    write_markdown(found, output / "scaling.md")
    write_plot(runs, fits, output / "scaling.png")
    return runs, fits, found


def output_dir(config: ScalingConfig) -> Path:
    return Path(config.output_dir or remask_home() / "scaling").expanduser()


def main(argv: list[str]) -> None:
    """`vla scaling`."""
    from vla.cli import parse_config

    config = parse_config(ScalingConfig, argv, verb="scaling")
    runs, _, found = scaling(config)
    table = Table(*FIT_COLUMNS, title=f"{len(runs)} runs")
    for line in fit_lines(found):
        table.add_row(*map(cell_text, line))
    show(table)
    print(f"scaling.json, scaling.md, scaling.png: {output_dir(config)}")
