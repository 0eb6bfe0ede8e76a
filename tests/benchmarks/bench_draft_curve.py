"""Accepted length against distillation time, the paper's scaling effect: drafts of several seeds for one target, their plot.

Trains `vla train-draft` for --minutes a seed (finished runs are taken as they are, interrupted ones go on), or reads the runs
that --runs names. Tokens a round are those of each checkpoint's held-out questions, greedy, the target's own token included.
"""

import argparse
from pathlib import Path

import torch

from multimodal.training_log import read_log
from serve.target import load_target
from serve.train_draft import plot_accepted_length
from tests.benchmarks.bench_compressor import add_training_options, train_for_minutes
from tests.benchmarks.harness import parser, report
from vla.home import remask_home

COLUMNS = ("run", "step", "minutes", "tokens a round", "accepted at 1, 2, ... %", "loss")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--vlm", type=Path, help="checkpoint folder of `vla train-vlm`")
    arguments.add_argument("--corpus", type=Path)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    add_training_options(arguments)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--runs", type=Path, nargs="+", help="run folders of `vla train-draft` instead of training")
    options = arguments.parse_args(argv)
    if options.runs is None and (options.vlm is None or options.corpus is None):
        arguments.error("give --vlm and --corpus to train, or --runs to read")
    torch.set_num_threads(options.threads)
    runs = options.runs or train_seeds(options)
    rows = [row for run in runs for row in curve(run)]
    output = options.output or Path("outputs") / "bench" / "draft_curve.json"
    report("draft_curve", COLUMNS, rows, output, runs=[run.name for run in runs])
    print(f"wrote {plot_accepted_length(runs, output.with_suffix('.png'))}")
    return 0


def train_seeds(options: argparse.Namespace) -> list[Path]:
    """The run folders of the seeds, trained now or before."""
    root, name = remask_home() / "bench" / "draft_curve", load_target(options.vlm).name[:8]
    folders = [root / f"seed-{seed}-{options.minutes:g}min-{name}" for seed in options.seeds]
    for folder, seed in zip(folders, options.seeds, strict=True):
        train_for_minutes(options, folder, **{"training.seed": seed})
    return folders


def curve(run: Path) -> list[list]:
    """A row for each checkpoint of a run. Raises ValueError for a run that measured nothing."""
    log = read_log(run)
    rows, minutes, loss = [], 0.0, float("nan")
    for entry in log:
        minutes, loss = entry.get("elapsed", 60 * minutes) / 60, entry.get("loss", loss)
        if "validation/tokens_per_round" in entry:
            depths = sorted(name for name in entry if name.startswith("validation/accepted_"))
            accepted = " ".join(f"{100 * entry[name]:.0f}" for name in depths)
            rows.append([run.name, entry["step"], minutes, entry["validation/tokens_per_round"], accepted, loss])
    if not rows:
        raise ValueError(f"{run} holds no measured checkpoint; let `vla train-draft` reach training.save_every steps.")
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
