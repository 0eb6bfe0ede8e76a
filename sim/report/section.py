"""A section of a report: a Markdown table, what its numbers rest on, and figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """What one source of a report becomes. Made of the source's files alone, so made again it is the same text."""

    table: str  # Markdown
    facts: Mapping[str, str]  # commit, versions, seeds, renderer, assets, ...: name -> text
    figures: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)  # name -> draws on matplotlib axes

    @property
    def block(self) -> str:
        """What stands in a README: the table, and the facts in one paragraph."""
        told = "; ".join(f"{name}: {text}" for name, text in self.facts.items() if text)
        return f"{self.table}\n\n({told}.)" if told else self.table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Floats are written with four figures; a bar in a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell_text(cell) for cell in line) + " |" for line in lines)


def cell_text(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def percent(rate: float, interval: tuple[float, float]) -> str:
    """ "97 % [91.5, 99.0]" """
    return f"{100 * rate:.4g} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def rate_cells(row: Mapping[str, Any]) -> list[str]:
    """Solved of how many, and the rate with its interval."""
    rate = row["successes"] / max(row["episodes"], 1)
    return [f"{row['successes']}/{row['episodes']}", percent(rate, tuple(row["interval_95"]))]


def save_figure(draw: Callable[[Any], None], path: Path) -> None:
    """`draw(axes)` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    draw(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
