"""Run folders -> tables and figures (`vla report`), and a README whose marked blocks hold those tables, or do not.

Names what every number rests on: commit, settings, versions, seeds, intervals, renderer, assets with their stand-ins.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.report import evaluations, others
from sim.report.readme import disagreements, rewritten, split_blocks
from sim.report.section import Section, save_figure
from sim.results import ROWS
from vla.home import remask_home


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `vla report`."""

    sources: dict[str, Any] = field(default_factory=dict)  # name -> folder or JSON file, or a list of evaluation folders or of `vla experts`' files
    root: Path | None = None  # what relative sources are relative to; default: REMASK_HOME
    output_dir: Path | None = None  # report.md and figures; default: REMASK_HOME/report
    readme: Path | None = None  # file whose blocks `<!-- report:NAME -->` are rewritten
    check: bool = False  # write nothing; exit code 1 if a block of `readme` does not hold what the sources say


def build_section(given: Any, root: Path) -> Section:
    """The section of a source: what it is is read off its files.

    An evaluation (episodes.jsonl), a folder or list of evaluations, `vla dagger`'s folder (rounds.json), `vla collect`'s
    (collect.json), `vla scaling`'s (scaling.json), a benchmark's or `vla experts`' JSON file, or a list of the latter.
    Raises FileNotFoundError or ValueError saying what was looked for.
    """
    if isinstance(given, (list, tuple)):
        paths = [located(each, root) for each in given]
        if paths and all(path.is_file() for path in paths):
            return others.experts_group(paths)
        return evaluation_group(dict(zip(names_of(paths), paths, strict=True)))
    path = located(given, root)
    if path.is_file():
        found = json.loads(path.read_text())
        if isinstance(found, Mapping) and "benchmark" in found:
            return others.bench(path)
        if isinstance(found, Mapping) and "tasks" in found and "config" in found:
            return others.experts(path)
        raise ValueError(f"{path} is no JSON of a benchmark (key 'benchmark') nor of `vla experts` (keys 'tasks', 'config').")
    if (path / ROWS).exists():
        if (path / "corrections.json").exists():
            raise ValueError(f"{path} holds corrections; name the folder of `vla dagger` above it.")
        return evaluations.one_evaluation(path)
    for name, build in (("rounds.json", others.dagger), ("collect.json", others.collection), ("scaling.json", others.scaling)):
        if (path / name).exists():
            return build(path)
    folders = sorted(found.parent for found in path.glob(f"*/{ROWS}"))
    if folders:
        return evaluation_group({folder.name: folder for folder in folders})
    raise FileNotFoundError(
        f"nothing to report in {path}: no {ROWS}, rounds.json, collect.json, scaling.json, and no evaluation one folder below."
    )


def located(given: Any, root: Path) -> Path:
    path = root / Path(str(given)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no source {path}; sources are relative to --root={root}.")
    return path


def names_of(paths: list[Path]) -> list[str]:
    """The folders' names, with as many of their parents' as tell them apart. Raises ValueError for a folder named twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"a source is named twice: {max(paths, key=paths.count)}.")
    depths = [1] * len(paths)
    while True:
        names = ["/".join(path.parts[-depth:]) for path, depth in zip(paths, depths, strict=True)]
        if len(set(names)) == len(names):
            return names
        depths = [depth + (names.count(name) > 1) for name, depth in zip(names, depths, strict=True)]


def evaluation_group(folders: dict[str, Path]) -> Section:
    study = evaluations.perturbations if evaluations.is_perturbation_study(folders) else evaluations.several_evaluations
    return study(folders)


def write_report(sections: Mapping[str, Section], folder: Path) -> Path:
    """report.md and its figures; returns the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Report", ""]
    for name, section in sections.items():
        lines += [f"## {name}", "", section.block, ""]
        for figure, draw in section.figures.items():
            path = folder / f"{name}-{figure}.png"
            save_figure(draw, path)
            lines += [f"![{name}, {figure}]({path.name})", ""]
    report = folder / "report.md"
    report.write_text("\n".join(lines))
    return report


def check_names(text: str, sections: Mapping[str, Section], file: Path) -> None:
    """Raise ValueError if a block names no source: it could never be checked."""
    unknown = [name for name, _ in split_blocks(text) if name is not None and name not in sections]
    if unknown:
        raise ValueError(f"{file} has blocks {unknown} without a source; sources: {', '.join(sections)}.")


def main(argv: list[str]) -> int:
    """`vla report`."""
    from vla.cli import parse_config

    config = parse_config(ReportConfig, argv, verb="report")
    if not config.sources:
        raise ValueError("Report of what? Give --sources='{NAME: FOLDER}', or a file of them with --config_path.")
    if config.check and config.readme is None:
        raise ValueError("Check what? Give --readme=FILE.md.")
    root = Path(config.root or remask_home()).expanduser()
    sections = {name: build_section(given, root) for name, given in config.sources.items()}
    blocks = {name: section.block for name, section in sections.items()}
    if config.readme is not None:
        file = Path(config.readme).expanduser()
        text = file.read_text()
        check_names(text, sections, file)
        found = disagreements(text, blocks)
        if config.check:
            for name, difference in found.items():
                print(f"{file}, block {name}:\n{difference}\n", file=sys.stderr)
            count = sum(name is not None for name, _ in split_blocks(text))
            print(f"{file}: {len(found)} of {count} blocks disagree with the run folders")
            return int(bool(found))
        file.write_text(rewritten(text, blocks))
        print(f"{file}: rewrote {', '.join(found) or 'nothing, all blocks agree'}")
    report = write_report(sections, Path(config.output_dir or remask_home() / "report").expanduser())
    print(f"{report}: {len(sections)} sections")
    return 0
