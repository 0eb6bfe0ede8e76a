"""Settings of a training run, and what follows from them: how far it is, the learning rate and average decay there."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """How a run optimises, how long, and what it writes. Give steps, minutes or both; whichever is spent first ends it."""

    steps: int | None = None  # optimiser steps
    minutes: float | None = None  # wall-clock budget of training, validation and pauses excluded; not bit-reproducible
    batch_size: int = 64  # samples of one micro-batch on one process
    accumulation: int = 1  # micro-batches per process and optimiser step
    learning_rate: float = 3e-4  # peak
    final_scale: float = 0.02  # learning rate at the end, as a share of the peak
    warmup_steps: int = 100  # linear warm-up
    weight_decay: float = 0.05  # on matrices only
    beta2: float = 0.95  # AdamW second-moment decay
    clip_norm: float = 1.0  # gradient norm; 0 switches clipping off
    ema_decay: float = 0.999  # of the saved policy's weight average; 0 saves the raw weights
    precision: str = "fp32"  # fp32 | bf16 (autocast, weights and moments stay float32)
    device: str = "auto"  # auto | cpu
    threads: int | None = None  # torch threads of this process; none leaves torch's choice
    seed: int = 0
    log_every: int = 20  # steps
    save_every: int = 500  # steps; the end of a run is always saved
    keep_last: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("TrainingConfig needs steps or minutes; both are empty.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"TrainingConfig.steps is {self.steps}; it must be at least 1, or null if minutes end the run.")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"TrainingConfig.minutes is {self.minutes}; it must be above 0, or null if steps end the run.")
        for name, choices in (("precision", ("fp32", "bf16")), ("device", ("auto", "cpu"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"TrainingConfig.{name} is {getattr(self, name)!r}; choose one of {list(choices)}.")
        for name in ("batch_size", "accumulation", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainingConfig.{name} is {getattr(self, name)}; it must be at least 1.")


def progress(step: int, steps: int | None, elapsed: float, minutes: float | None) -> float:
    """Share of the run that is spent, 0..1: of its steps, of its wall-clock budget, or the larger of both.

    elapsed: seconds of training so far, validation and checkpoints excluded.
    """
    shares = [step / steps if steps else 0.0, elapsed / (60 * minutes) if minutes else 0.0]
    return min(1.0, max(shares))


def learning_rate_scale(step: int, progress: float, *, warmup_steps: int, final_scale: float) -> float:
    """Factor on the peak learning rate: linear warm-up over steps times a cosine over the run's progress.

    The first step has 1 / warmup_steps, the end of the run final_scale. Warm-up counts steps even under a wall-clock
    budget, since what it waits for is Adam's second moment.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * (final_scale + (1 - final_scale) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(step: int, decay: float) -> float:
    """Decay of the weight average at a step: short memory first, (1 + step) / (10 + step), then `decay`."""
    return min(decay, (1 + step) / (10 + step))
