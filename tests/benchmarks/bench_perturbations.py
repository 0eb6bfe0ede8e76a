"""Success under perturbations, kind x severity, against the clean episodes of the same starts.

    vla bench perturbations --policy RUN/checkpoints/last/policy --suite libero_object [--kinds camera light] [--severities 1 5]

Finished evaluations are kept, and the same command goes on; `vla report` makes the table of the same folder.
"""

from dataclasses import replace

from sim.perturbations.kinds import KINDS, PerturbConfig
from sim.report.section import save_figure
from sim.report.verb import build_section
from tests.benchmarks.harness import parser, report
from tests.benchmarks.studies import COLUMNS, add_study_options, base_config, evaluate_variants, study_rows
from vla.home import remask_home


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_study_options(arguments)
    arguments.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    arguments.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5], choices=[1, 2, 3, 4, 5])
    options = arguments.parse_args(argv)
    base = base_config(options)
    settings = [PerturbConfig(), *(PerturbConfig(kind, severity) for kind in options.kinds for severity in options.severities)]
    root = options.root or remask_home() / "bench" / f"perturbations-{options.suite}"
    names = {"clean" if perturb == PerturbConfig() else perturb.name: perturb for perturb in settings}
    found = evaluate_variants({name: replace(base, perturb=perturb) for name, perturb in names.items()}, root)
    section = build_section([str((root / name).resolve()) for name in names], root)
    for name, draw in section.figures.items():
        save_figure(draw, root / f"{name}.png")
    report(
        "perturbations", ["perturbation", *COLUMNS], study_rows(found, "clean"), options.output,
        suite=options.suite, split="validation", episodes=options.episodes, checkpoint=found["clean"][0].checkpoint,
    )  # fmt: skip
    print(f"{section.block}\n\nevaluations and plot: {root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
