"""What a pass costs on this machine: v(N) of the target, c(W) of a draft level, measured at start-up before any request."""

import time
from collections.abc import Sequence

import torch

from serve.controller import AdaptiveConfig, AdaptiveController, CostTable
from serve.drafters import Drafter
from serve.eagle_drafter import EagleDrafter
from serve.runner import Runner
from serve.tree import chain

TARGET_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DRAFT_ROWS = (1, 2, 4, 8, 16)
STATELESS_SECONDS = 2e-4  # of a drafter without a model: a search in a list; corrected by what rounds really take
PLAIN_OVERHEAD = 3e-4  # of a round beside its passes, before anything is measured


def measure_target(runner: Runner, past: int, rows: Sequence[int] = TARGET_ROWS, repetitions: int = 5) -> CostTable:
    """Seconds of a verification pass, head and argmax included, by its rows, `past` positions being in the slot. Slot 0 must be
    free.
    """
    if runner.cache.lengths[0]:
        raise ValueError("Slot 0 holds a request; measure before the first one is admitted.")
    rows = [count for count in rows if past + count <= runner.cache.capacity]

    def run(count: int) -> float:
        runner.cache.lengths[0] = past
        start = time.perf_counter()
        runner.verify([0], [chain(0, [0] * (count - 1), [0.0] * (count - 1))]).best()
        return time.perf_counter() - start

    try:
        return CostTable.measure(run, rows, repetitions)
    finally:
        runner.cache.lengths[0] = 0


@torch.inference_mode()
def measure_draft(drafter: Drafter, past: int, rows: Sequence[int] = DRAFT_ROWS, repetitions: int = 5) -> CostTable:
    """Seconds of one draft level, head and top-k included, by its rows."""
    if not isinstance(drafter, EagleDrafter):
        return CostTable((1,), (STATELESS_SECONDS,))
    return CostTable.measure(lambda count: drafter.time_level(count, past), rows, repetitions)


def build_controller(
    runner: Runner, drafter: Drafter, config: AdaptiveConfig | None = None, past: int = 128
) -> AdaptiveController:
    """An adaptive controller for this machine; takes about a hundred passes."""
    target, draft = measure_target(runner, past), measure_draft(drafter, past)
    return AdaptiveController(target, draft, PLAIN_OVERHEAD, config or AdaptiveConfig())
