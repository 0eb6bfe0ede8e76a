"""What the rounds of `vla dagger` left: rounds.json, and success against labels as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    corrected_success: float | None  # success of the mixture during the corrections
    control_policy: str | None = None  # as much training, no corrections
    control_successes: int | None = None
    control_episodes: int | None = None
    control_interval_95: tuple[float, float] | None = None


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
    """Success in % with 95 % intervals against labels; dashed, at the same places: as much training without them."""
    curves = {"": ("with corrections", "-"), "control_": ("as long on demonstrations alone", "--")}
    for prefix, (label, style) in curves.items():
        points = [each for each in rounds if each.get(f"{prefix}successes") is not None]
        if not points:
            continue
        rates = [100 * each[f"{prefix}successes"] / max(each[f"{prefix}episodes"], 1) for each in points]
        bounds = [[100 * bound for bound in each[f"{prefix}interval_95"]] for each in points]
        spread = [
            [rate - low for rate, (low, _) in zip(rates, bounds, strict=True)],
            [high - rate for rate, (_, high) in zip(rates, bounds, strict=True)],
        ]
        axes.errorbar([each["labels"] for each in points], rates, yerr=spread, marker="o", linestyle=style, capsize=3, label=label)
    axes.set(xlabel="labelled states of corrections", ylabel="success, % [95 %]", ylim=(-2, 102))
    axes.legend(loc="lower right")
