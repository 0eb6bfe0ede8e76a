"""What the rounds of `vla dagger` left: rounds.json, and success against labels as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sim.report.section import rate_cells

FILE = "rounds.json"


@dataclass(frozen=True)
class Round:
    """One round: its policy on validation starts, and what it was taught with."""

    number: int
    policy: str
    labels: int  # labelled states so far, of corrections
    successes: int
    episodes: int
    interval_95: tuple[float, float]
    by_suite: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # suite -> solved, episodes
    corrected_success: float | None = None  # success of the mixture during the corrections
    control: "Round | None" = None  # as much training without labels, on the same starts


def round_table(rounds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and lines of what rounds.json holds; None: an empty cell."""
    several = list(rounds[0].get("by_suite", {}))
    several = several if len(several) > 1 else []
    controlled = any(each.get("control") for each in rounds)
    columns = ["round", "labels", *several, "solved", "success [95 %]", "mixture while correcting"]
    columns += ["as long without labels: solved", "success [95 %]"] if controlled else []
    lines = []
    for each in rounds:
        mixture = None if each["corrected_success"] is None else f"{100 * each['corrected_success']:.0f} %"
        control = rate_cells(each["control"]) if each.get("control") else [None, None]
        suites = ["/".join(map(str, each["by_suite"][suite])) for suite in several]
        lines.append([each["number"], each["labels"], *suites, *rate_cells(each), mixture, *(control if controlled else [])])
    return columns, lines


def write_rounds(root: Path, rounds: Sequence[Round]) -> None:
    """rounds.json and rounds.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [asdict(each) for each in rounds]
    (root / FILE).write_text(json.dumps(found, indent=1))
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    draw_rounds(axes, found)
    figure.savefig(root / "rounds.png", dpi=150)
    pyplot.close(figure)


def draw_rounds(axes: Any, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Success in % with 95 % intervals against labels; dashed, at the same places: as much training without them; thin: a suite each."""
    judged = [(each["labels"], each) for each in rounds]
    controls = [(each["labels"], each["control"]) for each in rounds if each.get("control")]
    controls = [judged[0], *controls] if controls else []  # both begin at the same policy
    for points, label, style in ((judged, "with corrections", "-"), (controls, "as long on demonstrations alone", "--")):
        if not points:
            continue
        rates = [100 * each["successes"] / max(each["episodes"], 1) for _, each in points]
        bounds = [[100 * bound for bound in each["interval_95"]] for _, each in points]
        spread = [
            [rate - low for rate, (low, _) in zip(rates, bounds, strict=True)],
            [high - rate for rate, (_, high) in zip(rates, bounds, strict=True)],
        ]
        axes.errorbar([labels for labels, _ in points], rates, yerr=spread, marker="o", linestyle=style, capsize=3, label=label)
    suites = rounds[0].get("by_suite", {})
    for suite in suites if len(suites) > 1 else ():
        rates = [100 * solved / max(episodes, 1) for solved, episodes in (each["by_suite"][suite] for each in rounds)]
        axes.plot([each["labels"] for each in rounds], rates, linewidth=0.8, label=suite)
    axes.set(xlabel="labelled states of corrections", ylabel="success, % [95 %]", ylim=(-2, 102))
    axes.legend(loc="lower right")
