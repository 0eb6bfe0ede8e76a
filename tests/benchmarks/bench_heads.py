"""Heads on one backbone: discrete diffusion, parallel, autoregressive; same data, same budget, same validation starts."""

from tests.benchmarks.arms import COLUMNS, Arm, add_arm_options, compare_arms
from tests.benchmarks.harness import parser, report
from vla.home import remask_home

HEADS = ("discrete_diffusion", "parallel", "autoregressive")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_arm_options(arguments)
    arguments.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    options = arguments.parse_args(argv)
    root = remask_home() / "bench" / f"heads-{options.suite}-{options.minutes:g}min"
    arms = [Arm(head, options.config, (f"--head.type={head}",)) for head in options.heads]
    report(
        f"heads-{options.suite}", ["head", *COLUMNS], compare_arms(arms, root, options), options.output,
        minutes=options.minutes, concurrent=options.concurrent, tasks=options.tasks,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
