"""How far a training run is, and the learning rate there: pure functions of numbers."""

import math


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
