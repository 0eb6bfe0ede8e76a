"""What a training run says: progress bar, log.jsonl, TensorBoard scalars, and the curve at the end."""

import json
import sys
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


class TrainingLog:
    """One row per `log_every` steps in log.jsonl (the record), the same numbers in TensorBoard and on the bar.

    A resumed run drops the rows after its first step, so each step is written once.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 1 s of imports that inference does not need
        from tqdm import tqdm

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG
        kept = [row for row in read_log(folder) if row["step"] <= first_step]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._validated = {row["step"] for row in kept if "loss" not in row}  # a row of training always has its loss
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        every = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines than a terminal
        self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, mininterval=every, smoothing=0.05)

    def step(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def is_validated(self, step: int) -> bool:
        """Whether the run that is resumed got as far as the validation after `step`."""
        return step in self._validated

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record scalars measured after `step` steps. Names may hold a slash (`validation/success`)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)
        shown = {"loss": f"{values['loss']:.4f}"} if "loss" in values else {}
        shown |= {"samples/s": f"{values['samples_per_second']:.0f}"} if "samples_per_second" in values else {}
        shown |= {"budget": f"{values['progress']:.0%}"} if self._bar.total is None and "progress" in values else {}
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of log.jsonl in order; none without the file. A last line cut off by a crash is left out."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines) - 1:
                raise ValueError(f"{path} line {number + 1} is no JSON: {error}. Repair or delete the file.") from error
    return rows


def plot_curve(folder: Path) -> Path | None:
    """Draw loss and learning rate over steps from log.jsonl into training_curve.png; None if nothing was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in read_log(folder) if "loss" in row]
    if not rows:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=folder.name)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="tab:orange", linewidth=1)
    rate.set_ylabel("learning rate", color="tab:orange")
    path = folder / "training_curve.png"
    figure.savefig(path, dpi=120)
    return path
