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
    corrected_success: float | None = None  # success of the mixture during the corrections
    control: "Round | None" = None  # as much training without labels, on the same starts


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
    axes.set(xlabel="labelled states of corrections", ylabel="success, % [95 %]", ylim=(-2, 102))
    axes.legend(loc="lower right")
