"""What is trained for, option by option: each arm changes one thing of the base; same data, budget and validation starts.

    vla bench options [--options replace_visible objective ...] [--seeds 0 1] [--suite libero_object --config ... --dataset ...]
    vla bench options --options mask_draws=1 objective=cross_entropy,earth_mover    # of an option only these values

Visible-token corruption, objectives, known prefix, mask draws, image size, augmentation, and, with --backbone, starting from a
published vision-language model. The first row is the base itself; bases of further seeds show what a difference of nothing is.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from multimodal.schedule import TrainingConfig
from tests.benchmarks.arms import COLUMNS, Arm, add_arm_options, compare_arms
from tests.benchmarks.harness import parser, report
from vla.home import remask_home

Change = tuple[str, dict[str, Any]]  # section of the YAML, what is set in it

OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross_entropy": {"type": "cross_entropy"},
    "hl_gauss": {"type": "hl_gauss", "sigma": 2.0},
    "comp_sum": {"type": "comp_sum", "tau": 1.5},
    "earth_mover": {"type": "earth_mover"},
    "earth_mover_ce": {"type": "earth_mover", "cross_entropy_weight": 0.1},
}
OPTIONS: dict[str, dict[str, Change]] = {
    "replace_visible": {f"{share:g}": ("head", {"replace_visible": share}) for share in (0.0, 0.05, 0.1, 0.2)},
    "known_prefix": {f"{share:g}": ("head", {"known_prefix": share}) for share in (0.0, 0.1, 0.25, 0.5)},
    "mask_draws": {str(draws): ("head", {"mask_draws": draws}) for draws in (1, 2, 4, 8)},
    "objective": {name: ("objective", objective) for name, objective in OBJECTIVES.items()},
    "image_size": {str(size): ("images", {"size": size}) for size in (64, 80, 96, 112)},
    "augmentation": {
        "none": ("images", {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}),
        "strong": ("images", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}),
    },
}
REPLACED_WHOLE = ("objective",)  # sections whose settings belong together: one objective's `sigma` is no setting of another


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_arm_options(arguments)
    arguments.add_argument(
        "--options", nargs="+", default=list(OPTIONS), metavar="NAME[=VALUE,...]",
        help="; ".join(f"{name}: {', '.join(values)}" for name, values in OPTIONS.items()),
    )  # fmt: skip
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0], help="of all arms; each further one, of the base again")
    arguments.add_argument("--backbone", default=None, help="published model folder: one more arm, which starts from it")
    options = arguments.parse_args(argv)
    root = remask_home() / "bench" / f"options-{options.suite}-{options.minutes:g}min"
    arms = arms_of(options, root)
    report(
        f"options-{options.suite}", ["option", *COLUMNS], compare_arms(arms, root, options), options.output,
        minutes=options.minutes, concurrent=options.concurrent, tasks=options.tasks, base=str(options.config),
        seeds=options.seeds,
    )  # fmt: skip
    return 0


def chosen(text: str) -> tuple[str, tuple[str, ...]]:
    """An option and its values from "NAME" (all of them) or "NAME=VALUE,VALUE". Raises ValueError for an unknown one."""
    name, _, values = text.partition("=")
    if name not in OPTIONS:
        raise ValueError(f"--options: no option {name!r}; there are {', '.join(OPTIONS)}")
    found = tuple(values.split(",")) if values else tuple(OPTIONS[name])
    unknown = [value for value in found if value not in OPTIONS[name]]
    if unknown:
        raise ValueError(f"--options: {name} has no value {', '.join(unknown)}; it has {', '.join(OPTIONS[name])}")
    return name, found


def arms_of(options: argparse.Namespace, root: Path) -> list[Arm]:
    """The base, the base by each further seed, and an arm for each value that is not the base's own."""
    first, *further = dict.fromkeys(options.seeds)
    base = seeded(yaml.safe_load(options.config.read_text()), first)
    arms = [arm("base", base, root), *(arm(f"base, seed {seed}", seeded(base, seed), root) for seed in further)]
    for option, values in map(chosen, options.options):
        for value in values:
            config = changed(base, *OPTIONS[option][value])
            if config != base:
                arms.append(arm(f"{option}-{value}", config, root))
    if options.backbone:
        arms.append(Arm("backbone", arms[0].config, (f"--policy.backbone.path={options.backbone}",)))
    return arms


def changed(base: dict[str, Any], section: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The base's YAML with some settings of a section; an objective is replaced as a whole."""
    before = {} if section in REPLACED_WHOLE else base.get(section, {})
    return base | {section: before | settings}


def seeded(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The YAML trained by that seed; as it is where it already is, so that finished arms are kept."""
    own = config.get("training", {}).get("seed", TrainingConfig.seed)
    return config if own == seed else changed(config, "training", {"seed": seed})


def arm(name: str, config: dict[str, Any], root: Path) -> Arm:
    """The arm of a YAML written to root/NAME.yaml."""
    path = root / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return Arm(name, path)


if __name__ == "__main__":
    raise SystemExit(main())
