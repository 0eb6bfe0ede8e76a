"""Sections made of evaluation folders: one evaluation by task, several side by side, perturbations against the clean row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.compare import check_protocols, compare, key, pair_episodes
from sim.perturbations.kinds import KINDS, NONE
from sim.report.section import Section, markdown_table, percent
from sim.results import ROWS, SETTINGS, EpisodeRow, latest_episodes, mean, tally

VERSIONS = ("mujoco", "robosuite", "torch", "remask")
SHOWN_SETTINGS = ("protocol", "execution_horizon", "max_steps", "num_known", "decode")
INTERVALS = "95 % Wilson, of paired differences Newcombe"


def read_evaluation(folder: Path) -> list[EpisodeRow]:
    """The latest row of each episode, in order. Raises FileNotFoundError without any."""
    rows = latest_episodes(folder / ROWS)
    if not rows:
        raise FileNotFoundError(f"no episode in {folder / ROWS}; `vla eval` writes them.")
    return rows


def one_evaluation(folder: Path) -> Section:
    """A line a task and one over all."""
    rows = read_evaluation(folder)
    groups: dict[str, list[EpisodeRow]] = {}
    for row in rows:
        groups.setdefault(f"{row.task}", []).append(row)
    lines = [[task, episodes[0].instruction, *measures(episodes)] for task, episodes in groups.items()]
    if len(groups) > 1:
        lines.append(["all", f"{len(groups)} tasks", *measures(rows)])
    table = markdown_table(["task", "instruction", *MEASURES], lines)
    return Section(table, evaluation_facts({folder.name: rows}, [folder]), {"success": success_bars(groups)})


def several_evaluations(folders: Mapping[str, Path]) -> Section:
    """A line an evaluation; where it shares starts with the first, the paired difference."""
    found = {name: read_evaluation(folder) for name, folder in folders.items()}
    first = next(iter(found))
    lines = [
        [name, *measures(rows), "" if name == first else paired(folders[first], folders[name])] for name, rows in found.items()
    ]
    table = markdown_table(["", *MEASURES, f"against {first}, paired"], lines)
    return Section(table, evaluation_facts(found, list(folders.values())), {"success": success_bars(found)})


def perturbations(folders: Mapping[str, Path]) -> Section:
    """Kind x severity, each against the clean evaluation of the same starts.

    Raises ValueError unless one is clean, all are of one checkpoint and none is of another's cell.
    """
    found = {name: read_evaluation(folder) for name, folder in folders.items()}
    checkpoints = {name: distinct(rows, "checkpoint") for name, rows in found.items()}
    if len(set(checkpoints.values())) != 1:
        raise ValueError(f"a perturbation table is of one checkpoint; the evaluations are of {checkpoints}.")
    clean = [name for name, rows in found.items() if rows[0].perturbation == NONE]
    if len(clean) != 1:
        raise ValueError(f"{len(clean)} of the evaluations {', '.join(found)} are clean; a perturbation table needs one.")
    cells: dict[tuple[str, int], str] = {}
    for name, rows in found.items():
        if name not in clean:
            kind, _, severity = rows[0].perturbation.rpartition("-")
            other = cells.setdefault((kind, int(severity)), name)
            if other != name:
                raise ValueError(f"{other} and {name} are both of {rows[0].perturbation}; a perturbation table takes one.")
    severities = sorted({severity for _, severity in cells})
    kinds = [kind for kind in KINDS if any(kind == other for other, _ in cells)]
    base = tally(found[clean[0]])
    lines: list[list[Any]] = [["clean", str(percent(base.rate, base.interval)), *[""] * (len(severities) - 1)]]
    lines += [
        [kind, *(cell(folders[clean[0]], folders[cells[kind, s]]) if (kind, s) in cells else "-" for s in severities)]
        for kind in kinds
    ]
    table = markdown_table(["success %, difference [95 %]", *(f"severity {severity}" for severity in severities)], lines)

    def draw(axes: Any) -> None:
        for kind in kinds:
            points = [(0, 100 * base.rate)] + [(s, 100 * tally(found[cells[kind, s]]).rate) for s in severities if (kind, s) in cells]
            axes.plot(*zip(*points), marker="o", label=kind)
        axes.set(xlabel="severity", ylabel="success, %", ylim=(-2, 102))
        axes.legend(fontsize=7, ncols=2)

    return Section(table, evaluation_facts(found, list(folders.values())), {"severity": draw})


def is_perturbation_study(folders: Mapping[str, Path]) -> bool:
    """More than one evaluation, and one of them was perturbed."""
    return len(folders) > 1 and any(read_evaluation(folder)[0].perturbation != NONE for folder in folders.values())


MEASURES = ("solved", "success [95 %]", "errors", "rounds", "ms a chunk", "jerk")


def measures(rows: Sequence[EpisodeRow]) -> list[Any]:
    count = tally(rows)
    rate = percent(count.rate, count.interval) if count.episodes else "-"
    valid = [row for row in rows if row.error is None]
    means = [mean(getattr(row, name) for row in valid) for name in ("rounds", "policy_ms", "jerk")]
    return [f"{count.successes}/{count.episodes}", rate, count.errors, *means]


def paired(first_folder: Path, folder: Path) -> str:
    """Difference in points with its interval, and McNemar's p; empty if the two share no start.

    Raises ValueError if their protocols differ, here and in `cell`.
    """
    first, rows = read_evaluation(first_folder), read_evaluation(folder)
    if not {key(row) for row in first if not row.error} & {key(row) for row in rows if not row.error}:
        return ""
    check_protocols(first_folder, folder)
    found = compare(pair_episodes(first, rows))
    low, high = found.interval
    return f"{100 * found.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}], p {found.p_value:.3g}, n {found.n}"


def cell(clean: Path, folder: Path) -> str:
    """Success in percent, and the difference to the clean evaluation in points with its interval."""
    rows = read_evaluation(folder)
    if not tally(rows).episodes:
        return f"{tally(rows).errors} errors"
    check_protocols(clean, folder)
    found = compare(pair_episodes(read_evaluation(clean), rows))
    low, high = found.interval
    text = f"{100 * tally(rows).rate:.0f}, {100 * found.difference:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
    return text + (f", {tally(rows).errors} errors" if tally(rows).errors else "")


def evaluation_facts(found: Mapping[str, Sequence[EpisodeRow]], folders: Sequence[Path]) -> dict[str, str]:
    """Everything that a number of an evaluation depends on, as its rows and settings say."""
    rows = [row for some in found.values() for row in some]
    settings = [json.loads((folder / SETTINGS).read_text()) for folder in folders if (folder / SETTINGS).exists()]
    shared = {}
    for name in SHOWN_SETTINGS:
        values = {json.dumps(each.get(name)) for each in settings}
        if values and values - {"null", "{}"}:
            shared[name] = " or ".join(sorted(values)).replace('"', "")
    ran = [row for row in rows if row.error is None]
    seeds = [row.seed for row in rows]
    return {
        "suite": distinct(rows, "suite"),
        "starts": f"{distinct(rows, 'split')}, seeds {min(seeds)} to {max(seeds)}",
        "intervals": INTERVALS,
        "settings": ", ".join(f"{name} {value}" for name, value in shared.items()),
        "checkpoint": distinct(rows, "checkpoint", 16),
        "commit": distinct(rows, "git_commit", 12),
        "versions": ", ".join(f"{name} {distinct(rows, name)}" for name in VERSIONS),
        "renderer": f"{distinct(ran, 'renderer')}, {distinct(rows, 'gl')}",
        "assets": distinct(rows, "assets"),
    }


def distinct(rows: Sequence[EpisodeRow], name: str, length: int | None = None) -> str:
    """The values of a field, once each."""
    values = sorted({str(getattr(row, name)) for row in rows})
    return " and ".join(value if length is None else shortened(value, length) for value in values)


def shortened(value: str, length: int) -> str:
    """A hash cut short; that its checkout was changed is kept."""
    return value[:length] + ("-dirty" if value.endswith("-dirty") else "")


def success_bars(groups: Mapping[str, Sequence[EpisodeRow]]) -> Any:
    """Draws success with its interval, a bar a group."""

    def draw(axes: Any) -> None:
        counts = {name: tally(rows) for name, rows in groups.items() if tally(rows).episodes}
        rates = [100 * count.rate for count in counts.values()]
        spread = [
            [100 * (count.rate - count.interval[0]) for count in counts.values()],
            [100 * (count.interval[1] - count.rate) for count in counts.values()],
        ]
        axes.bar(range(len(rates)), rates, yerr=spread, capsize=3, color="tab:blue", alpha=0.7)
        axes.set_xticks(range(len(rates)), counts, rotation=30 if max(map(len, counts), default=0) > 3 else 0, ha="right")
        axes.set(ylabel="success, % [95 %]", ylim=(0, 105))

    return draw
