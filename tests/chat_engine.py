"""An engine on a random debug-sized vision-language model, as `vla serve` runs it; made the same way in every process."""

from dataclasses import replace
from functools import cache

import torch

from serve.drafters import NgramDrafter
from serve.engine import Engine, EngineConfig
from serve.target import Target
from tests.tiny_vlm import target

CONTEXT = 256


@cache
def named_target(seed: int = 0) -> Target:
    """float32, as served."""
    return replace(target(seed, torch.float32), name=f"tiny-{seed}")


def build(seed: int = 0, max_batch: int = 4, max_waiting: int = 64) -> Engine:
    """`--vlm.factory=tests.chat_engine:build`."""
    return Engine(
        named_target(seed), EngineConfig(max_batch=max_batch, context=CONTEXT, max_waiting=max_waiting), NgramDrafter()
    )
