"""What scaling.json holds as tables: for the terminal, scaling.md and reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from sim.report.section import markdown_table

FIT_COLUMNS = ("quantity", "against", "at equal", "runs", "exponent [95 %]", "floor [95 %]", "R2 of logarithms")
RUN_COLUMNS = ("run", "parameters", "demonstrations", "samples", "loss", "held-out loss", "held-out error", "solved")


def fit_lines(found: Mapping[str, Any]) -> list[list[Any]]:
    """Of scaling.json: those fitted, then those not, with what is in the way."""
    fitted = [
        [*fit_head(fit), f"{fit['exponent']:.3f} {between(fit['exponent_interval_95'], '.3f')}",
         f"{fit['floor']:.3g} {between(fit['floor_interval_95'], '.3g')}", fit["r_squared"]]
        for fit in found["fits"]
    ]  # fmt: skip
    return fitted + [[*fit_head(fit), None, None, fit["why"]] for fit in found["not_fitted"]]


def fit_head(fit: Mapping[str, Any]) -> list[Any]:
    return [fit["quantity"], fit["axis"], ", ".join(f"{name} {value}" for name, value in fit["equal"].items()) or None, len(fit["runs"])]


def between(interval: Sequence[float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def scaling_tables(found: Mapping[str, Any]) -> str:
    """Markdown of what scaling.json holds: its runs, and its fits."""
    lines = [
        [run["folder"], run["parameters"], run["demonstrations"], run["samples"], run["loss"], run["held_out_loss"],
         run["held_out_error"], f"{run['solved']}/{run['episodes']}" if run["episodes"] else None]
        for run in found["runs"]
    ]  # fmt: skip
    return markdown_table(RUN_COLUMNS, lines) + "\n\n" + markdown_table(FIT_COLUMNS, fit_lines(found))
