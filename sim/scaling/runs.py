"""What a training run's folder says of its size (parameters, demonstrations, samples) and worth (loss, error, success)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST_SHARE = 0.1  # of the logged losses, over which the final one is averaged
POLICY = Path("checkpoints") / "last" / "policy"


@dataclass(frozen=True)
class Run:
    """One training run."""

    folder: str
    checkpoint: str  # content hash, as rows of evaluations name it
    parameters: int
    demonstrations: int  # episodes
    frames: int
    samples: int  # windows seen in training, repeats included
    loss: float | None  # mean of the last tenth of the log
    held_out_loss: float | None  # last, see vla/held_out.py
    held_out_error: float | None
    solved: int = 0  # of the evaluations of this checkpoint, see sim/scaling/evaluations.py
    episodes: int = 0

    @property
    def compute(self) -> float:
        """6 x parameters x samples: training operations for each position of a sample (Kaplan et al. 2020, arXiv 2001.08361).

        Runs whose samples have the same number of positions differ by it alone.
        """
        return 6.0 * self.parameters * self.samples

    @property
    def failure(self) -> float | None:
        """Share of episodes not solved, (failures + 1/2) / (episodes + 1): a power law has no zero."""
        return (self.episodes - self.solved + 0.5) / (self.episodes + 1) if self.episodes else None


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Run folders among `folders` and one folder below. Raises FileNotFoundError for one that holds none."""
    found: list[Path] = []
    for folder in folders:
        candidates = (folder, *sorted(folder.glob("*")))
        here = [path for path in candidates if (path / "log.jsonl").exists() and (path / POLICY).exists()]
        if not here:
            raise FileNotFoundError(f"no run in {folder} or one folder below: log.jsonl and {POLICY} make one (`vla train`).")
        found += [path for path in here if path not in found]
    return found


def read_run(folder: Path) -> Run:
    """A run without evaluations. Raises ValueError for a damaged folder."""
    from multimodal.checkpoint import checkpoint_hash

    policy = folder / POLICY
    provenance = json.loads((policy / "provenance.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    if not log:
        raise ValueError(f"{folder / 'log.jsonl'} is empty; the run has not begun.")
    last = losses[-max(1, round(LAST_SHARE * len(losses))) :]
    training = provenance["training"]
    return Run(
        folder=folder.name,
        checkpoint=checkpoint_hash(policy),
        parameters=count_parameters(policy / "model.safetensors"),
        demonstrations=provenance["episodes"],
        frames=provenance["frames"],
        samples=log[-1]["step"] * training["batch_size"] * training.get("accumulation", 1),
        loss=sum(last) / len(last) if last else None,
        held_out_loss=last_of(log, "validation/loss"),
        held_out_error=last_of(log, "validation/action_error"),
    )


def last_of(log: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The last value logged under that name."""
    return next((row[name] for row in reversed(log) if name in row), None)


def count_parameters(path: Path) -> int:
    """Numbers in a safetensors file, read off its header: 8 bytes of its length, little endian, then JSON."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for length in entry["shape"]:
                size *= length
            total += size
    return total
