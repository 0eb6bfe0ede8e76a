"""What a pass costs on this machine: v(N) of the target, c(W) of a draft level, measured at start-up before any request."""

import time

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
LEVELS, WIDTH, ROWS = 4, 2, 16  # levels drafted and nodes of each, rows verified, before what is measured


@torch.inference_mode()
def measure_costs(runner: Runner, drafter: Drafter | None, past: int, repetitions: int = 5) -> tuple[CostTable, CostTable]:
    """Seconds of a verification pass (head and argmax included) and of a draft level (head and top-k), by their rows.

    Measured as rounds run them: a pass of several rows follows draft levels, levels follow a pass, and only a pass of one row,
    plain decoding's, follows its like. Either model pushes the other out of the processor's caches: by itself a draft level
    was a fifth quicker, and speed-ups were predicted a third too high. `past` positions are in the slot, which is slot 0.
    Raises ValueError unless it is free.
    """
    if runner.cache.lengths[0]:
        raise ValueError("Slot 0 holds a request; measure before the first one is admitted.")
    model = drafter if isinstance(drafter, EagleDrafter) else None

    def verify(count: int) -> float:
        runner.cache.lengths[0] = past
        start = time.perf_counter()
        runner.verify([0], [chain(0, [0] * (count - 1), [0.0] * (count - 1))]).best()
        return time.perf_counter() - start

    def draft(count: int) -> float:
        return sum(model.time_level(count, past) for _ in range(LEVELS)) / LEVELS

    def verify_in_turn(count: int) -> float:
        if count > 1 and model is not None:
            draft(WIDTH)
        else:
            verify(count)
        return verify(count)

    def draft_in_turn(count: int) -> float:
        verify(ROWS)
        return draft(count)

    rows = [count for count in TARGET_ROWS if past + count <= runner.cache.capacity]
    try:
        target = CostTable.measure(verify_in_turn, rows, repetitions)
        if model is None:
            return target, CostTable((1,), (STATELESS_SECONDS,))
        return target, CostTable.measure(draft_in_turn, DRAFT_ROWS, repetitions)
    finally:
        runner.cache.lengths[0] = 0


def build_controller(
    runner: Runner, drafter: Drafter, config: AdaptiveConfig | None = None, past: int = 128
) -> AdaptiveController:
    """An adaptive controller for this machine; takes some hundred passes."""
    return AdaptiveController(*measure_costs(runner, drafter, past), PLAIN_OVERHEAD, config or AdaptiveConfig())
