"""The visual compressor before the policy's prefix, where it is lossy: same data, equal minutes, same validation starts.

    vla bench prefix [--compressors none pool-4 ...] [--suite libero_object --config ... --dataset ... --minutes 20]

Each arm changes `model.compressor` of the base's YAML alone. A shorter prefix trains more steps in its minutes: "steps trained"
says how many. Visual tokens are those of all cameras; a 2-D pool gives the square next to its share.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.arms import COLUMNS, Arm, add_arm_options, compare_arms, policy_of
from tests.benchmarks.bench_options import arm as write_arm
from tests.benchmarks.bench_options import changed
from tests.benchmarks.harness import parser, report
from vla.home import remask_home
from vla.policy import load_policy

COMPRESSORS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "pool-4": {"mode": "pool", "pool_ratio": 4},
    "resample-8": {"mode": "resample", "queries": 8},
    "prune-4": {"mode": "prune", "prune_ratio": 4},
}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_arm_options(arguments)
    arguments.add_argument("--compressors", nargs="+", default=list(COMPRESSORS), choices=list(COMPRESSORS))
    options = arguments.parse_args(argv)
    root = remask_home() / "bench" / f"prefix-{options.suite}-{options.minutes:g}min"
    arms = arms_of(options, root)
    compared = zip(arms, compare_arms(arms, root, options), strict=True)
    rows = [[name, *visual_tokens(policy_of(arm, root)), *values] for arm, (name, *values) in compared]
    report(
        f"prefix-{options.suite}", ["compressor", "visual tokens", "after", *COLUMNS], rows, options.output,
        minutes=options.minutes, concurrent=options.concurrent, tasks=options.tasks, base=str(options.config),
        compressors={name: COMPRESSORS[name] for name in options.compressors},
    )  # fmt: skip
    return 0


def arms_of(options: argparse.Namespace, root: Path) -> list[Arm]:
    """The base with each compressor in place of its own."""
    base = yaml.safe_load(options.config.read_text())
    return [write_arm(name, changed(base, "model", {"compressor": COMPRESSORS[name]}), root) for name in options.compressors]


def visual_tokens(policy: Path) -> tuple[int, int]:
    """Tokens of all cameras before and after a trained policy's compressor."""
    model = load_policy(policy).model
    return model.vlm.num_image_tokens, model.num_image_tokens


if __name__ == "__main__":
    raise SystemExit(main())
