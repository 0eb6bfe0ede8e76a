"""Two evaluations on the same starts (`vla compare A B`): what differs, per task and over all, and how sure that is.

Pairing removes the luck of the starts: of n common episodes only those count that one solved and the other did not.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from sim.results import ROWS, SETTINGS, EpisodeRow, differences, latest_episodes, wilson
from vla.show import show

Pair = tuple[EpisodeRow, EpisodeRow]


@dataclass(frozen=True)
class Comparison:
    """B against A on n common episodes without errors; rates are shares."""

    n: int
    a_solved: int
    b_solved: int
    only_a: int  # episodes that A alone solved
    only_b: int
    p_value: float  # exact McNemar test of "A and B solve equally many", two-sided
    difference: float  # rate of B minus rate of A
    interval: tuple[float, float]  # 95 % of the difference, see paired_interval


def key(row: EpisodeRow) -> tuple[str, int, str, int, int]:
    """What makes two episodes start alike."""
    return row.suite, row.task, row.split, row.initial_state_index, row.seed


def pair_episodes(a: Iterable[EpisodeRow], b: Iterable[EpisodeRow]) -> list[Pair]:
    """Episodes of A and B that began at the same start and ended without an error, in the order of A.

    Raises ValueError if there is none, or if two rows of one evaluation have the same start.
    """
    first, second = _by_start(a), _by_start(b)
    common = [start for start in first if start in second]
    pairs = [(first[start], second[start]) for start in common]
    valid = [pair for pair in pairs if pair[0].error is None and pair[1].error is None]
    if not valid:
        raise ValueError(
            f"The evaluations share {len(common)} starts (A has {len(first)}, B {len(second)}), none of them without an error. "
            "Evaluate both with the same --suite, --split, --tasks and --episodes."
        )
    return valid


def _by_start(rows: Iterable[EpisodeRow]) -> dict[tuple, EpisodeRow]:
    found: dict[tuple, EpisodeRow] = {}
    for row in rows:
        if key(row) in found:
            raise ValueError(f"Two rows of one evaluation start alike: {key(row)}. Give one evaluation's folder per side.")
        found[key(row)] = row
    return found


def check_protocols(a: Path, b: Path) -> None:
    """Raise ValueError if two evaluations' episodes began or ended by different rules: their starts are then not the same."""
    found = [json.loads(path.read_text()) for folder in (a, b) if (path := folder / SETTINGS).exists()]
    if len(found) == 2:
        rules = [{name: settings.get(name) for name in ("protocol", "max_steps")} for settings in found]
        changed = differences(*rules)
        if changed:
            raise ValueError(f"{a} and {b} follow different protocols: {changed} (A was, B is). Evaluate both by one.")


def compare(pairs: Sequence[Pair]) -> Comparison:
    """Raises ValueError without a pair."""
    if not pairs:
        raise ValueError("No pair of episodes to compare.")
    counts = Counter((a.success, b.success) for a, b in pairs)
    both, only_a, only_b, neither = counts[True, True], counts[True, False], counts[False, True], counts[False, False]
    return Comparison(
        n=len(pairs), a_solved=both + only_a, b_solved=both + only_b, only_a=only_a, only_b=only_b,
        p_value=mcnemar(only_a, only_b), difference=(only_b - only_a) / len(pairs),
        interval=paired_interval(both, only_a, only_b, neither),
    )  # fmt: skip


def paired_interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of B's rate minus A's: Newcombe 1998, Statistics in Medicine 17:2635, method 10.

    The distances to both rates' Wilson limits, added as the sides of a triangle whose angle is their correlation. Unlike
    a bootstrap's interval it keeps a width where no pair is discordant: none seen in n does not mean none.
    """
    n, a_solved, b_solved = both + only_a + only_b + neither, both + only_a, both + only_b
    a, b = a_solved / n, b_solved / n
    (a_low, a_high), (b_low, b_high) = wilson(a_solved, n), wilson(b_solved, n)
    agreement = both * neither - only_a * only_b
    if agreement > 0:
        agreement = max(agreement - n / 2, 0)  # the paper's continuity correction
    margins = a_solved * (n - a_solved) * b_solved * (n - b_solved)
    correlation = agreement / math.sqrt(margins) if margins else 0.0

    def side(one: float, other: float) -> float:
        return math.sqrt(one * one - 2 * correlation * one * other + other * other)

    difference = (only_b - only_a) / n
    return difference - side(b - b_low, a_high - a), difference + side(b_high - b, a - a_low)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value: were the discordant pairs a fair coin's? McNemar 1947, the binomial form."""
    return min(1.0, 2 * tail(only_a + only_b, max(only_a, only_b)))


def tail(tosses: int, heads: int) -> float:
    """Probability of at least `heads` in so many fair tosses."""
    return sum(math.comb(tosses, count) for count in range(heads, tosses + 1)) / 2**tosses


def table(pairs: Sequence[Pair], title: str) -> Table:
    """One line a task and one over all; won: episodes that B alone solved, lost: A alone."""
    view = Table(title=title)
    view.add_column("task")
    view.add_column("instruction")
    for heading in ("n", "A %", "B %", "won", "lost", "B - A, 95 %", "p"):
        view.add_column(heading, justify="right", no_wrap=True)
    tasks = sorted({(a.suite, a.task) for a, _ in pairs})
    for suite, task in tasks:
        chosen = [pair for pair in pairs if (pair[0].suite, pair[0].task) == (suite, task)]
        view.add_row(f"{suite} {task}", chosen[0][0].instruction, *_cells(compare(chosen)))
    if len(tasks) > 1:
        view.add_section()
        view.add_row("all", f"{len(tasks)} tasks", *_cells(compare(pairs)))
    return view


def _cells(found: Comparison) -> list[str]:
    low, high = found.interval
    return [
        str(found.n), f"{100 * found.a_solved / found.n:.1f}", f"{100 * found.b_solved / found.n:.1f}", str(found.only_b),
        str(found.only_a), f"{100 * found.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{found.p_value:.3g}",
    ]  # fmt: skip


USAGE = """usage: vla compare A B [--output=FILE.json]

A and B are folders that `vla eval` wrote. Episodes are paired by start (suite, task, split, initial state, seed); one that
ended with an error on either side is left out. Prints per task and over all: success of both, episodes that only one
of them solved, the difference with its 95 % interval (Newcombe 1998, paired), and McNemar's exact p-value."""


def main(argv: Sequence[str]) -> int:
    """`vla compare`."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    folders = [Path(word).expanduser() for word in argv if not word.startswith("--")]
    flags = [word for word in argv if word.startswith("--")]
    output = next((Path(flag.partition("=")[2]).expanduser() for flag in flags if flag.startswith("--output=")), None)
    if len(folders) != 2 or len(flags) != (output is not None):
        raise ValueError(f"two evaluation folders are compared; got {' '.join(argv) or 'none'} (`vla compare --help`).")
    rows = []
    for folder in folders:
        if not (folder / ROWS).is_file():
            raise FileNotFoundError(f"no evaluation in {folder}: {ROWS} is missing; `vla eval` makes one.")
        rows.append(latest_episodes(folder / ROWS))
    check_protocols(*folders)
    pairs = pair_episodes(*rows)
    left_out = min(len(side) for side in rows) - len(pairs)
    show(table(pairs, f"B = {folders[1]}\nagainst A = {folders[0]}"))
    if left_out:
        print(f"{left_out} episodes have no partner without an error and are left out.", file=sys.stderr)
    if output:
        found = {"a": str(folders[0]), "b": str(folders[1]), **asdict(compare(pairs))}
        rates = {side: list(wilson(found[f"{side}_solved"], found["n"])) for side in ("a", "b")}
        output.write_text(json.dumps(found | {"rate_intervals_95": rates}, indent=1))
    return 0
