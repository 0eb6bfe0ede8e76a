"""What `vla calibrate eval` writes: JSON, Markdown and plots of one evaluation, headed by its sanity block."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.bind.intervals import Share
from multimodal.bind.robustness import AUTOATTACK, NAIVE
from multimodal.bind.sanity import SanityBlock


@dataclass(frozen=True)
class AccuracyRow:
    """Zero-shot accuracy of one encoder on one part of the test split under one epsilon, seeds pooled."""

    encoder: str  # "frozen" or "calibrated"
    part: str  # "seen" or "unseen" classes
    epsilon: float  # 255ths, in the modality's unit; 0: clean
    radius: float  # the same in the box's unit
    survivors: Mapping[str, Share]  # attack -> share that survives it; "worst": all of them
    per_seed: tuple[float, ...]  # worst case of each seed

    def to_dict(self) -> dict:
        shares = {name: share.to_dict() for name, share in self.survivors.items()}
        return {**vars(self), "survivors": shares, "per_seed": list(self.per_seed)}


@dataclass(frozen=True)
class RetrievalRow:
    """Recall of one encoder's queries in another modality's gallery."""

    encoder: str
    gallery: str
    epsilon: float
    recall: Mapping[int, Share]

    def to_dict(self) -> dict:
        return {**vars(self), "recall": {str(rank): share.to_dict() for rank, share in self.recall.items()}}


@dataclass(frozen=True)
class CertificateRow:
    """Share of samples that the smoothed classifier gets right for every perturbation up to each l2 radius."""

    encoder: str
    sigma: float  # box's unit
    certified: Mapping[float, float]  # radius (box's unit) -> share
    samples: int

    def to_dict(self) -> dict:
        return {**vars(self), "certified": {f"{radius:.6g}": share for radius, share in self.certified.items()}}


@dataclass(frozen=True)
class Making:
    """How the figures of a report came about."""

    task: str | None  # "module:function"
    task_options: Mapping[str, Any]
    calibration: str | None  # content hash of the folder; none: the frozen encoder alone
    reference: str  # AutoAttack: "reduced" or "standard"
    steps: int  # of our own attacks
    samples: int  # of each part, for one seed, at most
    seeds: tuple[int, ...]

    def line(self) -> str:
        options = f" {json.dumps(dict(self.task_options))}" if self.task_options else ""
        return (
            f"Task {self.task}{options}, calibration {self.calibration or 'none'}; at most {self.samples} samples for each of the seeds "
            f"{', '.join(map(str, self.seeds))}. AutoAttack ({self.reference}) saw all of them, other attacks ({self.steps} steps) what "
            "it left."
        )


@dataclass(frozen=True)
class RobustnessReport:
    """One modality's evaluation. A sanity block per encoder is no option: there is no report without."""

    modality: str
    unit: str
    norm: str
    shares: str  # how much was trained
    made: Making
    sanity: Mapping[str, SanityBlock]  # encoder -> block
    accuracy: tuple[AccuracyRow, ...]
    retrieval: tuple[RetrievalRow, ...]
    certificates: tuple[CertificateRow, ...]
    flags: tuple[str, ...] = ()  # what AutoAttack's own checks said

    def __post_init__(self) -> None:
        judged = {row.encoder for row in self.accuracy}
        if missing := sorted(judged - self.sanity.keys()):
            raise ValueError(f"No sanity block for {missing}; a robustness figure is not printed without. Run sanity_checks.")

    @property
    def passed(self) -> bool:
        return all(block.passed for block in self.sanity.values())

    def to_dict(self) -> dict:
        return {
            "modality": self.modality, "unit": self.unit, "norm": self.norm, "trained": self.shares, "made": vars(self.made),
            "sanity_passed": self.passed,
            "sanity": {name: [vars(check) for check in block.checks] for name, block in self.sanity.items()},
            "accuracy": [row.to_dict() for row in self.accuracy], "retrieval": [row.to_dict() for row in self.retrieval],
            "certificates": [row.to_dict() for row in self.certificates], "flags": list(self.flags),
        }  # fmt: skip

    def markdown(self) -> str:
        lines = [f"# Robustness of the {self.modality} encoder", "", self.shares, "", self.made.line(), ""]
        for name, block in self.sanity.items():
            lines += [f"## Sanity: {name}", "", block.markdown(), ""]
        lines += [f"## Zero-shot accuracy, % [95 % Clopper-Pearson]; {self.norm}, radius in {self.unit}", ""]
        auto = f"AutoAttack ({self.made.reference})"
        lines += [f"| encoder | classes | epsilon /255 | radius | clean | worst case | {auto} | naive attack says | seeds |"]
        lines += ["|---" * 9 + "|"]
        for row in self.accuracy:
            cells = [str(row.survivors.get(name, "-")) for name in ("clean", "worst", AUTOATTACK, NAIVE)]
            seeds = ", ".join(f"{100 * value:.1f}" for value in row.per_seed)
            lines.append(f"| {row.encoder} | {row.part} | {row.epsilon:g} | {row.radius:.4g} | {' | '.join(cells)} | {seeds} |")
        if self.retrieval:
            ranks = sorted({rank for row in self.retrieval for rank in row.recall})
            lines += ["", f"## Retrieval {self.modality} -> another modality, %, attacked on the query side", ""]
            lines += [f"| encoder | gallery | epsilon /255 | {' | '.join(f'R@{rank}' for rank in ranks)} |"]
            lines += ["|---" * (3 + len(ranks)) + "|"]
            for row in self.retrieval:
                recalls = " | ".join(str(row.recall.get(rank, "-")) for rank in ranks)
                lines.append(f"| {row.encoder} | {row.gallery} | {row.epsilon:g} | {recalls} |")
        for row in self.certificates:
            shown = ", ".join(f"{100 * share:.1f} % at {radius:.3g}" for radius, share in row.certified.items())
            lines += ["", f"Certified (smoothing, sigma {row.sigma:.3g} {self.unit}, l2, n = {row.samples}), {row.encoder}: {shown}."]
        lines += ["", *(f"AutoAttack's flag: {flag}" for flag in self.flags)]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> Path:
        """robustness.json, robustness.md and robustness.png in the folder; returns the Markdown's path."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "robustness.json").write_text(json.dumps(self.to_dict(), indent=1))
        (folder / "robustness.md").write_text(self.markdown())
        self.plot(folder / "robustness.png")
        return folder / "robustness.md"

    def plot(self, path: Path) -> None:
        """Worst-case accuracy over epsilon with its interval, one line per encoder and part; the naive attack's dashed."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, key in enumerate(dict.fromkeys((row.encoder, row.part) for row in self.accuracy)):
            rows = sorted((row for row in self.accuracy if (row.encoder, row.part) == key), key=lambda row: row.epsilon)
            at, worst = [row.epsilon for row in rows], [row.survivors["worst"] for row in rows]
            low, high = zip(*(share.interval for share in worst), strict=True)
            axes.plot(at, [share.value for share in worst], color=f"C{number}", marker="o", label=", ".join(key))
            axes.fill_between(at, low, high, color=f"C{number}", alpha=0.15)
            axes.plot(at, [row.survivors[NAIVE].value for row in rows], color=f"C{number}", linestyle=":")
        axes.set(xlabel="epsilon / 255, in the modality's unit", ylabel="accuracy under attack", ylim=(0, 1), title=self.modality)
        axes.legend(title="dotted: what a naive attack says", fontsize="small")
        figure.savefig(path, dpi=120)
