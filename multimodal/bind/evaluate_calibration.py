"""`vla calibrate eval`: an encoder, frozen and calibrated, judged on the same test samples by the same attacks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from multimodal.bind.calibration import CalibratedEncoder, load_calibration
from multimodal.bind.certificate import SmoothingConfig, certify
from multimodal.bind.classifier import Classifier, check_modality
from multimodal.bind.intervals import Share
from multimodal.bind.reference_attacks import REDUCED, AutoAttackConfig
from multimodal.bind.robustness import AttackSuite, retrieve, share_of
from multimodal.bind.robustness_report import AccuracyRow, CertificateRow, Making, RetrievalRow, RobustnessReport
from multimodal.bind.sanity import SanityConfig, sanity_checks
from multimodal.bind.task import BindTask, Bound, count_weights, trunk_of
from multimodal.bind.train_calibration import embed_all, task_weights
from multimodal.checkpoint import checkpoint_hash
from multimodal.config import check_choice


@dataclass(frozen=True)
class EvaluateCalibrationConfig:
    """Settings of `vla calibrate eval`."""

    task: str | None = None  # "module:function" that returns a multimodal.bind.task.BindTask
    task_options: dict[str, Any] = field(default_factory=dict)  # what the function is called with
    modality: str = "image"
    calibration: Path | None = None  # RUN/checkpoints/last/policy of `vla calibrate train`; none: the frozen encoder alone
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)  # 255ths, in the modality's unit
    samples: int = 128  # of seen classes, per seed; as many of unseen ones, if there are
    seeds: tuple[int, ...] = (0, 1, 2)  # each takes other samples, while they last, and other random numbers
    reference: str = "reduced"  # AutoAttack: reduced (20 steps, 3 targets, 200 queries, no FAB) | standard
    steps: int = 40  # of our own attacks
    gallery: str | None = None  # modality that retrieval looks in; default: the task's first other one
    retrieval_samples: int = 100
    certified_samples: int = 32  # 0: no smoothing certificate
    smoothing: SmoothingConfig = field(default_factory=SmoothingConfig)
    sanity_samples: int = 64
    sanity: SanityConfig = field(default_factory=SanityConfig)
    threads: int | None = None  # of torch; none leaves torch's choice, which is slow beside another job: give 1 there
    output_dir: Path | None = None  # default: REMASK_HOME/evaluations/calibration-MODALITY

    def __post_init__(self) -> None:
        check_choice("EvaluateCalibrationConfig", "reference", self.reference, ("reduced", "standard"))
        if not self.epsilons or not self.seeds or self.samples < 1 or (self.threads is not None and self.threads < 1):
            raise ValueError("An evaluation needs at least one epsilon, one seed, one sample and one thread.")

    @property
    def suite(self) -> AttackSuite:
        return AttackSuite(steps=self.steps, auto=REDUCED if self.reference == "reduced" else AutoAttackConfig())


def evaluate_calibration(config: EvaluateCalibrationConfig, task: BindTask) -> RobustnessReport:
    """Judge the encoder(s) of one modality. Raises ValueError on a task or folder that does not fit."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    frozen = task.check(config.modality)
    encoders = {"frozen": frozen}
    shares = f"{config.modality}: nothing trained, {count_weights(trunk_of(frozen))} weights in its tower"
    if config.calibration is not None:
        calibrated: CalibratedEncoder = load_calibration(config.calibration, frozen)
        shares = calibrated.shares(task_weights(task))
        encoders["calibrated"] = calibrated.merged()
    models = {name: Classifier(encoder, task.centers).eval() for name, encoder in encoders.items()}
    parts = {"seen": ~task.is_unseen(task.splits["test"])} | ({"unseen": task.is_unseen(task.splits["test"])} if task.unseen else {})
    accuracy: list[AccuracyRow] = []
    flags: list[str] = []
    with tqdm(total=len(models) * len(parts) * (1 + len(config.epsilons)), desc=config.modality, unit="cell") as bar:
        for name, model in models.items():
            for part, mask in parts.items():
                for epsilon in (0.0, *config.epsilons):
                    warned: list[str] = []
                    accuracy.append(accuracy_row(config, task, model, models["frozen"], name, part, mask, epsilon, warned))
                    flags += [f"{name}, {part}, {epsilon:g}/255: {flag}" for flag in dict.fromkeys(warned)]
                    bar.update()
    inputs, labels = sample(task.splits["test"], config.modality, parts["seen"], 0, config.sanity_samples)
    blocks = {name: sanity_checks(model, models["frozen"], inputs, labels, config.sanity) for name, model in models.items()}
    certificates = []
    if config.certified_samples:
        certificates = [certificate_row(config, task, name, model, parts["seen"]) for name, model in models.items()]
    return RobustnessReport(
        config.modality, frozen.box.unit, frozen.box.norm, shares, made_with(config), blocks, tuple(accuracy),
        tuple(retrieval_rows(config, task, encoders)), tuple(certificates), tuple(flags),
    )  # fmt: skip


def made_with(config: EvaluateCalibrationConfig) -> Making:
    folder = None if config.calibration is None else checkpoint_hash(config.calibration)
    return Making(config.task, config.task_options, folder, config.reference, config.steps, config.samples, config.seeds)


def sample(bound: Bound, modality: str, mask: Tensor, place: int, count: int) -> tuple[Tensor, Tensor]:
    """The `place`-th run of `count` samples where the mask holds, in one fixed random order; it wraps at the end."""
    rows = shuffled_rows(mask)
    if len(rows) == 0:
        raise ValueError("The split has no sample of these classes; make it larger.")
    count = min(count, len(rows))
    rows = rows[(torch.arange(count) + place * count) % len(rows)]
    return bound.inputs[modality][rows], bound.labels[rows]


def shuffled_rows(mask: Tensor) -> Tensor:
    """Where the mask holds, in one fixed random order: files stand class by class, views of one body side by side."""
    rows = mask.nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def accuracy_row(
    config: EvaluateCalibrationConfig,
    task: BindTask,
    model: Classifier,
    frozen: Classifier,
    name: str,
    part: str,
    mask: Tensor,
    epsilon: float,
    flags: list[str],
) -> AccuracyRow:
    """One cell. The interval pools the seeds, which share no sample: each takes fewer where the split holds too few for all."""
    radius, totals, per_seed = model.encoder.box.radius(epsilon), {}, []
    count = min(config.samples, max(1, int(mask.sum()) // len(config.seeds)))
    for place, seed in enumerate(config.seeds):
        inputs, labels = sample(task.splits["test"], config.modality, mask, place, count)
        survived = config.suite.run(model, inputs, labels, radius, seed, None if model is frozen else frozen, flags)
        per_seed.append(float(survived["worst"].float().mean()))
        for attack, values in survived.items():
            totals.setdefault(attack, []).append(values)
    shares = {attack: share_of(torch.cat(values)) for attack, values in totals.items()}
    return AccuracyRow(name, part, epsilon, radius, shares, tuple(per_seed))


def retrieval_rows(config: EvaluateCalibrationConfig, task: BindTask, encoders: Mapping) -> list[RetrievalRow]:
    others = [name for name in task.encoders if name != config.modality and name in task.splits["test"].inputs]
    gallery_name = config.gallery or (others[0] if others else None)
    if gallery_name is None:
        return []
    bound = task.splits["test"]
    chosen = shuffled_rows(torch.ones_like(bound.labels, dtype=torch.bool))[: config.retrieval_samples]
    gallery = embed_all(check_modality(task.encoders, gallery_name), bound.inputs[gallery_name][chosen])
    queries, seed = bound.inputs[config.modality][chosen], config.seeds[0]
    rows = []
    for name, encoder in encoders.items():
        for epsilon in (0.0, *config.epsilons):
            found = retrieve(encoder, queries, gallery, steps_of_255=epsilon, attack_steps=config.steps, seed=seed)
            rows.append(RetrievalRow(name, gallery_name, epsilon, found.recall))
    return rows


def certificate_row(config: EvaluateCalibrationConfig, task: BindTask, name: str, model: Classifier, mask: Tensor) -> CertificateRow:
    inputs, labels = sample(task.splits["test"], config.modality, mask, 0, config.certified_samples)
    box = model.encoder.box
    found = certify(model, inputs, box, config.smoothing, torch.Generator().manual_seed(config.seeds[0]))
    sigma = config.smoothing.sigma * (box.high - box.low) / 255
    return CertificateRow(name, sigma, {at * sigma: found.certified_share(labels, at * sigma) for at in (0.0, 0.5, 1.0, 2.0)}, len(labels))


def headline(report: RobustnessReport, epsilon: float) -> dict[str, Share]:
    """Worst-case shares at one epsilon over seen classes: encoder -> share. Raises LookupError if it was not evaluated."""
    found = {row.encoder: row.survivors["worst"] for row in report.accuracy if row.part == "seen" and row.epsilon == epsilon}
    if not found:
        raise LookupError(f"Epsilon {epsilon} was not evaluated; there are {sorted({row.epsilon for row in report.accuracy})}.")
    return found
