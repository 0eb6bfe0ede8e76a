"""Sections made of JSON files: benchmarks, DAgger rounds, collections, experts, scaling fits."""

import functools
import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sim.dagger_rounds import FILE, draw_rounds, round_table
from sim.report.evaluations import shortened
from sim.report.section import Section, markdown_table, percent, rate_cells
from sim.results import SETTINGS, wilson
from sim.scaling.tables import scaling_tables
from vla.home import remask_home

SHOWN = ("episodes", "mixing", "decay", "share", "minutes", "steps")  # settings of `vla dagger`
BENCH_KEYS = ("benchmark", "rows", "command", "git_commit", "machine", "versions", "time")  # the others: a benchmark's own


def bench(path: Path) -> Section:
    """What tests/benchmarks/harness.py wrote: its rows as they are."""
    found = json.loads(path.read_text())
    rows = found["rows"]
    columns = list(rows[0]) if rows else []
    machine, versions = found.get("machine", {}), found.get("versions", {})
    facts = {
        "command": f"`{bench_command(found)}`",
        "settings": ", ".join(f"{key} {told(value)}" for key, value in found.items() if key not in BENCH_KEYS and value != ""),
        "commit": shortened(found.get("git_commit", ""), 12),
        "machine": f"{machine.get('processor', 'unknown')}, {machine.get('cores', '?')} cores",
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
        "measured": found.get("time", "")[:10],
    }
    return Section(markdown_table(columns, [[row.get(name) for name in columns] for row in rows]), facts)


def bench_command(found: Mapping[str, Any]) -> str:
    """As it was typed, less where it wrote to, and with REMASK_HOME by its name: a report tells no machine's folders.

    The verb and the benchmark alone where a file does not say it, and before arguments of a bare module.
    """
    typed = [word.replace(str(remask_home()), "REMASK_HOME") for word in found.get("command", [])]
    words = [word for before, word in pairwise(["", *typed]) if "--output" not in (before, word.partition("=")[0])]
    return shlex.join(["vla", *(words if words[:1] == ["bench"] else ["bench", found["benchmark"].split("-")[0], *words])])


def told(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else str(value)


def dagger(folder: Path) -> Section:
    """rounds.json of `vla dagger`: success against labels."""
    rounds = json.loads((folder / FILE).read_text())
    settings = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).exists() else {}
    facts = {
        "suite": settings.get("suite", ""),
        "starts": "validation",
        "intervals": "95 % Wilson",
        "settings": ", ".join(f"{key} {settings[key]}" for key in SHOWN if settings.get(key, "None") != "None"),
    }
    return Section(markdown_table(*round_table(rounds)), facts, {"labels": functools.partial(draw_rounds, rounds=rounds)})


def experts(path: Path) -> Section:
    """What `vla experts` wrote."""
    found = json.loads(path.read_text())
    lines = [
        [task, row["instruction"], *rate_cells(row)]
        for task, row in found["tasks"].items()
    ]
    solved, tried = (sum(row[key] for row in found["tasks"].values()) for key in ("successes", "episodes"))
    lines.append(["all", f"{len(lines)} tasks", f"{solved}/{tried}", percent(solved / max(tried, 1), wilson(solved, tried))])
    config = found["config"]
    facts = {
        "command": f"`vla experts --suite={config['suite']} --episodes={config['episodes']}`",
        "starts": config["split"],
        "noise": str(config["noise"]),
        **made_with([found]),
    }
    return Section(markdown_table(["task", "instruction", "solved", "success [95 %]"], lines), facts)


def made_with(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Versions and assets that files of `vla experts` rest on: each name with the values that occur."""
    names = {name: None for each in found for name in each.get("made_with", {})}
    return {name: "; ".join(sorted({str(each["made_with"][name]) for each in found if "made_with" in each})) for name in names}


def experts_group(paths: list[Path]) -> Section:
    """Several files of `vla experts`, a line each, with the task that was solved least often. Raises ValueError for another file."""
    lines, found = [], [json.loads(path.read_text()) for path in paths]
    for path, each in zip(paths, found, strict=True):
        if not {"tasks", "config", "all"} <= set(each):
            raise ValueError(f"{path} is no file of `vla experts` (keys 'tasks', 'config', 'all'); a list of files is a list of those.")
        tasks, config = each["tasks"], each["config"]
        least = min(tasks, key=lambda task: tasks[task]["successes"])
        lowest = f"{tasks[least]['instruction']}: {tasks[least]['successes']}/{tasks[least]['episodes']}"
        always = sum(row["successes"] == row["episodes"] for row in tasks.values())
        lines.append([
            config["suite"], config["split"], len(tasks), *rate_cells(each["all"]), each["all"]["errors"],
            None if each["all"]["mean_steps"] is None else f"{each['all']['mean_steps']:.0f}", always, lowest if always < len(tasks) else "",
        ])  # fmt: skip
    columns = ["suite", "starts", "tasks", "solved", "success [95 %]", "errors", "mean steps", "tasks always solved", "lowest"]
    noises = sorted({str(each["config"]["noise"]) for each in found})
    facts = {
        "command": "`vla experts --suite=SUITE --split=STARTS --episodes=N`",
        "noise": ", ".join(noises),
        "intervals": "95 % Wilson",
        **made_with(found),
    }
    return Section(markdown_table(columns, lines), facts)


def collection(folder: Path) -> Section:
    """collect.json of `vla collect`: the demonstrator's success by task, with what the collection took."""
    found = json.loads((folder / "collect.json").read_text())
    tasks = found["expert"] | {"all": found["expert_all"]}
    lines = [
        [task, *rate_cells(row), row["errors"], row["mean_steps"]]
        for task, row in tasks.items()
    ]
    columns = ["task", "solved", "success [95 %]", "errors", "mean steps"]
    shown = ("suite", "split", "noise", "image_size", "episodes_per_task", "collect_s", "attempts_per_hour", "dataset_bytes")
    settings = ", ".join(f"{key} {found[key]}" for key in shown if found.get(key) is not None)
    facts = {"settings": settings, "intervals": "95 % Wilson"}
    return Section(markdown_table(columns, lines), facts)


def scaling(folder: Path) -> Section:
    """scaling.json of `vla scaling`: its runs, then its fits, one a line."""
    found = json.loads((folder / "scaling.json").read_text())
    intervals = f"95 % of {found['resamples']} bootstrap samples, seed {found['seed']}"
    setting = ", ".join(f"{name} {value}" for name, value in found["evaluations"].items() if value not in (None, {}))
    facts = {"evaluations": setting, "intervals": intervals, "commit": shortened(found["git_commit"], 12)}
    return Section(scaling_tables(found), facts)
