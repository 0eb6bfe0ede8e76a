"""The visual compressor: each primitive, the gate and any other draft on the same questions under one tree.

What it does to the draft: image tokens before and after, tokens accepted, milliseconds. It cannot change an answer, which is
checked. Runs are interleaved; medians over repetitions. Without --draft one is trained first for each of --modes, by --config
for --minutes, into REMASK_HOME/bench/compressor, resumable. Mode select: every batch a branch drawn at random or the gate's;
none: all tokens.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from multimodal.compressor import MODES
from serve.controller import FixedController
from serve.draft_checkpoint import load_draft
from serve.draft_data import CorpusDialogues
from serve.draft_model import DraftModel
from serve.drafters import DraftLimits
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.generate import DTYPES
from serve.request import Request
from serve.stats import EngineStats
from serve.target import Target, load_target
from serve.train_draft import HELD_OUT_TREE, TrainDraftConfig, context_for, train_draft
from tests.benchmarks.harness import parser, quiet_machine, report
from vla.cli import parse_config
from vla.home import remask_home

COLUMNS = (
    "draft", "compressor", "visual tokens", "after", "tokens a round", "accepted at 1, 2, ... %", "draft ms a round",
    "draft prefill ms", "decode ms a token", "gate chose", "answers that differ",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--vlm", type=Path, required=True, help="checkpoint folder of `vla train-vlm`")
    arguments.add_argument("--draft", type=Path, nargs="*", default=[], help="checkpoint folders of `vla train-draft`")
    add_training_options(arguments)
    arguments.add_argument("--modes", nargs="+", default=["select"], choices=MODES, help="of the compressors that are trained")
    arguments.add_argument("--corpus", type=Path, required=True)
    arguments.add_argument("--prompts", type=int, default=12)
    arguments.add_argument("--least-tokens", type=int, default=60, help="of the corpus's own answer to a prompt")
    arguments.add_argument("--max-tokens", type=int, default=160)
    arguments.add_argument("--type", default="bfloat16", choices=list(DTYPES))
    arguments.add_argument("--device", default="cpu")
    arguments.set_defaults(repetitions=5)
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    target = load_target(options.vlm, dtype=DTYPES[options.type], device=options.device)
    drafts = options.draft or [trained(options, target, mode) for mode in options.modes]
    corpus = CorpusDialogues(options.corpus, "held_out", target)
    asked = corpus.questions(options.prompts, least_tokens=options.least_tokens, max_tokens=options.max_tokens)
    variants = [variant for path in drafts for variant in build_variants(path, target, asked)]
    plain = [each.token_ids for each in plain_engine(target, asked).run(asked)]
    with quiet_machine():
        for repetition in range(options.repetitions + 1):
            for variant in variants:
                print(f"\rrepetition {repetition} of {options.repetitions}, {variant.name:<12}", end="", flush=True)
                run(variant, asked, keep=repetition > 0)
    print()
    rows = [row(variant, plain) for variant in variants]
    report("compressor", COLUMNS, rows, options.output, prompts=len(asked), type=options.type, threads=options.threads)
    return 0


def trained(options: argparse.Namespace, target: Target, mode: str) -> Path:
    """The checkpoint folder of a draft for the target, trained now or before."""
    folder = remask_home() / "bench" / "compressor" / f"{mode}-{options.minutes:g}min-{target.name[:8]}"
    return train_for_minutes(options, folder, **{"training.seed": 0, "model.compressor.mode": mode})


def train_for_minutes(options: argparse.Namespace, folder: Path, **changes: Any) -> Path:
    """`vla train-draft` under options.config, some settings changed, into a run folder that names the target; the checkpoint
    folder. A finished run is taken as it is, an interrupted one goes on.
    """
    if not (folder / "done").exists():
        settings = {
            "config_path": options.config, "vlm": options.vlm, "corpus": options.corpus, "output_dir": folder,
            "training.minutes": options.minutes, "training.steps": 10**6, "training.threads": options.threads,
            "training.device": "cpu" if options.device == "cpu" else "auto", **changes,
        }  # fmt: skip
        config = parse_config(TrainDraftConfig, [f"--{name}={value}" for name, value in settings.items()])
        train_draft(replace(config, resume=(folder / "checkpoints").exists()))
        (folder / "done").touch()
    return folder / "checkpoints" / "last" / "policy"


def add_training_options(arguments: argparse.ArgumentParser) -> None:
    """What a benchmark that trains drafts asks for."""
    arguments.add_argument("--config", type=Path, default=Path("configs/desk_draft.yaml"), help="of `vla train-draft`")
    arguments.add_argument("--minutes", type=float, default=20.0, help="of training of a draft")


@dataclass
class Variant:
    """One draft and how it sees images, and what its runs gave."""

    draft: str
    name: str
    engine: Engine
    drafter: EagleDrafter
    draft_ms: list[float] = field(default_factory=list)  # a round, prompts left out
    prompt_ms: list[float] = field(default_factory=list)  # a prompt
    token_ms: list[float] = field(default_factory=list)  # a token, target included, prompts left out
    answers: list[tuple[int, ...]] = field(default_factory=list)


def build_variants(path: Path, target: Target, asked: Sequence[Request]) -> list[Variant]:
    """A draft as it is (its gate or mode), then each branch it is made of."""
    model: DraftModel = load_draft(path, target)
    mode, context = model.config.compressor.mode, context_for(asked, target)
    capacity = context + HELD_OUT_TREE.width * HELD_OUT_TREE.max_depth
    variants = []
    for branch in (None, *(model.compressor.branches if mode == "select" else ())):
        drafter = EagleDrafter(model, target.vlm, num_slots=1, capacity=capacity, branch=branch)
        engine = Engine(target, EngineConfig(max_batch=1, context=context), drafter, FixedController(HELD_OUT_TREE))
        name = branch or ("gate" if mode == "select" else mode)
        variants.append(Variant(run_name(path), name, engine, drafter))
    return variants


def run_name(path: Path) -> str:
    """Of the run that made a checkpoint folder RUN/checkpoints/STEP/policy; the folder's own for any other."""
    folder = path.resolve()
    return folder.parents[2].name if folder.parent.parent.name == "checkpoints" else folder.name


def plain_engine(target: Target, asked: Sequence[Request], batch: int = 1) -> Engine:
    config = EngineConfig(max_batch=batch, context=context_for(asked, target))
    return Engine(target, config, None, FixedController(DraftLimits(0, 0, 0)))


def run(variant: Variant, asked: Sequence[Request], keep: bool) -> None:
    """All questions once; the first run warms up."""
    before = variant.engine.stats()
    variant.answers = [finished.token_ids for finished in variant.engine.run(asked)]
    after: EngineStats = variant.engine.stats()
    if not keep:
        return
    parts = ("draft_seconds", "verify_seconds", "overhead_seconds")
    decoding = sum(getattr(after, name) - getattr(before, name) for name in parts)
    variant.draft_ms.append(1e3 * (after.draft_seconds - before.draft_seconds) / max(1, after.rounds - before.rounds))
    variant.prompt_ms.append(1e3 * (after.draft_read_seconds - before.draft_read_seconds) / len(asked))
    variant.token_ms.append(1e3 * decoding / max(1, sum(len(answer) - 1 for answer in variant.answers)))


def row(variant: Variant, plain: Sequence[tuple[int, ...]]) -> list:
    stats, drafter = variant.engine.stats(), variant.drafter
    images = max(1, sum(drafter.branches.values()))
    before, after = (total / images for total in drafter.visual_tokens)
    shares = [100 * count / stats.spec_decode_num_drafts for count in stats.spec_decode_num_accepted_tokens_per_pos]
    chosen = ", ".join(f"{name} {100 * count / images:.0f} %" for name, count in sorted(drafter.branches.items()))
    return [
        variant.draft, variant.name, before, after, stats.tokens_per_round, " ".join(f"{share:.0f}" for share in shares),
        statistics.median(variant.draft_ms), statistics.median(variant.prompt_ms), statistics.median(variant.token_ms),
        chosen if variant.name == "gate" else "",
        sum(mine != right for mine, right in zip(variant.answers, plain, strict=True)),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
