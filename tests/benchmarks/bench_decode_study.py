"""Decoding on validation starts: success, rounds, milliseconds and jerk against rounds, thresholds, remasking, order noise.

    vla bench decode_study --policy RUN/checkpoints/last/policy --suite libero_object [--episodes 10]

One factor is changed at a time from the base (the policy's own settings, or --base); all variants run the same starts and
are paired with the base. Finished evaluations are kept, and the same command goes on with the missing ones.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sim.evaluate import EvaluateConfig
from sim.policy_source import PolicySource
from tests.benchmarks.harness import parser, report
from tests.benchmarks.studies import COLUMNS, add_study_options, base_config, evaluate_variants, study_rows, variants_milliseconds
from vla.home import remask_home
from vla.unmasking import REMASK_RULES, DecodeConfig

ROUNDS = (1, 2, 4, 6, 8, 12)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99, 2.0)  # 2: off
ORDER_TEMPERATURES = (0.0, 0.5, 1.0, 4.0)
FACTORS: dict[str, tuple[Any, ...]] = {
    "rounds": ROUNDS,
    "threshold": THRESHOLDS,
    "remask": tuple(REMASK_RULES),
    "order_temperature": ORDER_TEMPERATURES,
}


def variants_of(
    base: EvaluateConfig, decode: DecodeConfig, factors: Mapping[str, tuple[Any, ...]]
) -> dict[str, EvaluateConfig]:
    """Folder name -> settings: the base, then each factor's other values. The base is not run twice."""
    found = {"base": replace(base, policy=replace(base.policy, decode=asdict(decode)))}
    for factor, values in factors.items():
        for value in values:
            changed = replace(decode, **{factor: value})
            if changed != decode:
                source = PolicySource(path=base.policy.path, decode=asdict(changed))
                found[f"{factor}-{value}"] = replace(base, policy=source)
    return found


def plot(rows: list[dict[str, Any]], decode: DecodeConfig, path: Path) -> None:
    """Success and milliseconds against each factor, a column a factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row["decoding"]: row for row in rows}
    figure, panels = pyplot.subplots(2, len(FACTORS), figsize=(3.2 * len(FACTORS), 5), layout="constrained", squeeze=False, sharey="row")
    for column, (factor, values) in enumerate(FACTORS.items()):
        known = [
            (str(value), by_name["base" if getattr(decode, factor) == value else f"{factor}-{value}"])
            for value in values
            if getattr(decode, factor) == value or f"{factor}-{value}" in by_name
        ]
        known = [(name, row) for name, row in known if row["n"]]
        names = [name for name, _ in known]
        rates = [row["success %"] for _, row in known]
        below = [row["success %"] - row["95 % low"] for _, row in known]
        above = [row["95 % high"] - row["success %"] for _, row in known]
        panels[0][column].errorbar(names, rates, yerr=[below, above], marker="o", capsize=3)
        panels[1][column].plot(names, [row["ms per chunk"] for _, row in known], marker="o")
        panels[1][column].set(xlabel=factor)
        for panel in panels[:, column]:
            panel.tick_params(axis="x", rotation=30)
    panels[0][0].set(ylabel="success, % [95 %]", ylim=(-2, 102))
    panels[1][0].set(ylabel="ms per chunk", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_study_options(arguments)
    arguments.add_argument("--base", default="{}", help="JSON: what the base changes of the policy's own decoding")
    arguments.add_argument("--factors", nargs="+", default=list(FACTORS), choices=list(FACTORS))
    options = arguments.parse_args(argv)
    from vla.policy import load_policy

    policy = load_policy(options.policy)
    decode = policy.assets.decode.changed(json.loads(options.base))
    root = options.root or remask_home() / "bench" / f"decode-{options.suite}-{policy.content_hash[:8]}"
    variants = variants_of(base_config(options), decode, {name: FACTORS[name] for name in options.factors})
    found = evaluate_variants(variants, root)
    milliseconds = variants_milliseconds(variants, options)
    rows = [[*row, milliseconds[row[0]]] for row in study_rows(found, "base")]
    columns = ["decoding", *COLUMNS, "ms per chunk"]
    plot([dict(zip(columns, row, strict=True)) for row in rows], decode, root / "decode_study.png")
    report(
        "decode_study", columns, rows, options.output, suite=options.suite, split="validation", base=asdict(decode),
        checkpoint=policy.content_hash, evaluations=str(root.name), episodes=options.episodes,
    )  # fmt: skip
    print(f"plot: {root / 'decode_study.png'}; evaluations: {root}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
