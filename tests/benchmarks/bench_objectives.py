"""Objectives on one policy: cross-entropy, HL-Gauss, comp-sum, earth mover; same seed, data, budget and validation starts.

The head, the decoding and everything else are the base config's. Its objective is replaced as a whole in a YAML written for
each arm: on the command line an objective merges into the file's key by key, and one's `sigma` is no setting of another.
"""

from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.arms import COLUMNS, Arm, add_arm_options, compare_arms
from tests.benchmarks.harness import parser, report
from vla.home import remask_home

OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"type": "cross_entropy"},
    "hl_gauss": {"type": "hl_gauss", "sigma": 2.0},
    "comp_sum": {"type": "comp_sum", "tau": 1.5},
    "earth_mover": {"type": "earth_mover"},
    "earth_mover_ce": {"type": "earth_mover", "cross_entropy_weight": 0.1},
}
DEFAULT = ("cross_entropy", "hl_gauss", "comp_sum", "earth_mover")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_arm_options(arguments)
    arguments.add_argument("--objectives", nargs="+", default=list(DEFAULT), choices=list(OBJECTIVES))
    options = arguments.parse_args(argv)
    root = remask_home() / "bench" / f"objectives-{options.suite}-{options.minutes:g}min"
    arms = [Arm(name, arm_config(options.config, name, root)) for name in options.objectives]
    report(
        f"objectives-{options.suite}", ["objective", *COLUMNS], compare_arms(arms, root, options), options.output,
        minutes=options.minutes, concurrent=options.concurrent, tasks=options.tasks,
        objectives={name: OBJECTIVES[name] for name in options.objectives},
    )  # fmt: skip
    return 0


def arm_config(base: Path, name: str, root: Path) -> Path:
    """The base YAML with the arm's objective instead of its own, written to root/NAME.yaml."""
    config = yaml.safe_load(base.read_text()) | {"objective": OBJECTIVES[name]}
    path = root / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
