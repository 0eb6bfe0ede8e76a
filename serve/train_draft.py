"""Target and corpus -> draft: online-logit distillation on multimodal.training (`vla train-draft`)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from multimodal.decoder import count_parameters
from multimodal.training import TrainingConfig, train
from multimodal.training_log import read_log
from serve.controller import FixedController
from serve.draft_checkpoint import DraftAssets, load_draft
from serve.draft_data import CorpusDialogues
from serve.draft_loss import Dialogue, DistillationConfig, DistillationLoss, Teacher
from serve.draft_model import DraftModel, DraftModelConfig
from serve.drafters import DraftLimits
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.request import Finished, Request
from serve.target import Target, load_target
from vla.cli import parse_config

HELD_OUT_TREE = DraftLimits(max_nodes=12, max_depth=5, width=3)  # the tree that accepted lengths are quoted for
HEAD_IDS = "head_ids.json"  # in the run folder: counted once


@dataclass(frozen=True)
class TrainDraftConfig:
    """Settings of `vla train-draft`."""

    vlm: Path  # the target: a checkpoint folder of `vla train-vlm`
    corpus: Path  # made by `vla corpus`
    output_dir: Path  # run folder
    model: DraftModelConfig = field(default_factory=DraftModelConfig)
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    regenerate: int = 0  # dialogues whose answers the target gives itself before training; 0: as written in the corpus
    held_out_prompts: int = 12  # on which the accepted length is measured at each checkpoint
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=2000, batch_size=8, learning_rate=1e-3, warmup_steps=50, weight_decay=0.0, clip_norm=0.5
        )
    )
    resume: bool = False  # continue from the last checkpoint in output_dir


def train_draft(config: TrainDraftConfig) -> Path:
    """Train as configured; the folder of the last checkpoint's draft. Raises what `multimodal.training.train` raises."""
    run = config.output_dir.expanduser()
    device = "cuda" if config.training.device == "auto" and torch.cuda.is_available() else "cpu"
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    target = load_target(config.vlm, device=device)
    dialogues = CorpusDialogues(config.corpus, "train", target)
    unseen = CorpusDialogues(config.corpus, "held_out", target)
    held_out = unseen.questions(config.held_out_prompts, least_tokens=40, max_tokens=160)
    if config.regenerate:
        dialogues.regenerate(partial(answer, target), config.regenerate, run / "answers.jsonl")
    torch.manual_seed(config.training.seed)
    model = DraftModel(config.model, target.vlm, head_ids(run, dialogues, config.model.head_size)).to(device)
    print(
        f"draft: {count_parameters(model) / 1e6:.2f} M parameters for a target of {count_parameters(target.vlm) / 1e6:.1f} M "
        f"(compressor {count_parameters(model.compressor) / 1e6:.2f} M); {len(dialogues)} dialogues"
    )
    provenance = {"loss": asdict(config.loss), "training": asdict(config.training), "regenerated": config.regenerate}
    assets = DraftAssets(config.model, target.name, provenance)

    def batch(index: int) -> list[Dialogue]:
        return dialogues.batch(index, config.training.batch_size, config.training.seed)

    def on_checkpoint(folder: Path, step: int) -> dict[str, float]:
        """Tokens a round on held-out questions with the weights just saved, greedy."""
        return accepted_lengths(load_draft(folder / "policy", target), target, held_out)

    last = train(
        model, DistillationLoss(Teacher(target), config.loss), batch, config.training, run,
        save_model=assets.save, on_checkpoint=on_checkpoint, resume=config.resume,
    )  # fmt: skip
    plot_accepted_length([run], run / "accepted_length.png")
    return last / "policy"


def answer(target: Target, requests: Sequence[Request]) -> list[Finished]:
    """What the target says to some requests, by an engine that holds the longest of them."""
    return Engine(target, EngineConfig(max_batch=8, context=context_for(requests, target))).run(requests)


def context_for(requests: Sequence[Request], target: Target) -> int:
    """Positions that the longest of some requests can take."""
    images = max(len(request.images) for request in requests) * target.vlm.tokens_per_image
    return images + max(len(request.prompt) + request.max_tokens for request in requests) + 64


def head_ids(run: Path, dialogues: CorpusDialogues, size: int | None) -> list[int] | None:
    """The ids that a trimmed head keeps: those that answers hold most; None for a whole head."""
    if size is None:
        return None
    path = run / HEAD_IDS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dialogues.frequent_ids(size)))
    return json.loads(path.read_text())


def accepted_lengths(draft: DraftModel, target: Target, requests: Sequence[Request]) -> dict[str, float]:
    """Tokens a round (the target's own included) under HELD_OUT_TREE, and the share of rounds that accept 1, 2, ... drafted
    ones.
    """
    context, tree = context_for(requests, target), HELD_OUT_TREE
    drafter = EagleDrafter(draft, target.vlm, num_slots=4, capacity=context + tree.width * tree.max_depth)
    settings = EngineConfig(max_batch=4, context=context, max_nodes=tree.max_nodes)
    engine = Engine(target, settings, drafter, FixedController(tree))
    engine.run(requests)
    stats = engine.stats()
    depths = {
        f"accepted_{depth}": count / stats.spec_decode_num_drafts
        for depth, count in enumerate(stats.spec_decode_num_accepted_tokens_per_pos, 1)
    }
    return {"tokens_per_round": stats.tokens_per_round, **depths}


def plot_accepted_length(runs: Sequence[Path], path: Path) -> Path | None:
    """Tokens a round against minutes of distillation, a line a run; None if nothing was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    found = False
    for run in runs:
        rows = read_log(run)
        clock = [(row["step"], row["elapsed"] / 60) for row in rows if "elapsed" in row]
        points = [(row["step"], row["validation/tokens_per_round"]) for row in rows if "validation/tokens_per_round" in row]
        if points:
            found = True
            steps, lengths = zip(*points, strict=True)
            axes.plot(np.interp(steps, *zip(*clock, strict=True)), lengths, marker="o", label=run.name)
    axes.set(xlabel="minutes of distillation", ylabel="tokens a round, the target's own included")
    axes.set_title("held-out questions, greedy")
    axes.grid(alpha=0.3)
    if not found:
        return None
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def main(argv: Sequence[str]) -> int:
    """`vla train-draft`; `--steps` is short for `--training.steps`."""
    argv = [f"--training.{word[2:]}" if word.split("=")[0] == "--steps" else word for word in argv]
    folder = train_draft(parse_config(TrainDraftConfig, argv, verb="train-draft"))
    print(f"draft: {folder}\nnext: vla bench spec --vlm=... --draft={folder} --corpus=...")
    return 0
