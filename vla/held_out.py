"""How well a policy does on demonstrations kept from training: error of decoded chunks, and the training loss itself."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import send_to_device

from vla.data import Batch, WindowMixture
from vla.interface import Observation
from vla.policy import TorchPolicy
from vla.policy_loss import Collator, PolicyLoss

COUNT = 256  # windows looked at
BATCH = 32


def evenly_spaced(windows: WindowMixture, count: int) -> Iterator[Batch]:
    """Batches of at most BATCH of `count` windows spread over all of them, in order."""
    indices = np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))
    for start in range(0, len(indices), BATCH):
        yield windows.gather(indices[start : start + BATCH])


def held_out_error(policy: TorchPolicy, windows: WindowMixture, count: int = COUNT) -> dict[str, float]:
    """Error of decoded chunks on `count` windows, evenly spaced over all held-out ones.

    action_error: mean |decoded - expert| over continuous dimensions, in units of each dimension's coded range;
    binary_accuracy: share of gripper commands that agree; rounds: mean passes over the slots.
    """
    errors, agreements, rounds = [], [], []
    reach = np.array(policy.assets.action_tokenizer.high) - np.array(policy.assets.action_tokenizer.low)
    binary = np.isin(np.arange(policy.spec.action_dim), policy.spec.binary_actions)
    moving = ~binary & (reach > 0)
    for batch in evenly_spaced(windows, count):
        observations = [
            Observation(dict(zip(policy.spec.cameras, images, strict=True)), state, text)
            for images, state, text in zip(batch.images, batch.state, batch.instructions, strict=True)
        ]
        for chunk, target, pad in zip(policy.act(observations), batch.actions, batch.is_pad, strict=True):
            difference = np.abs(chunk.actions - target)[~pad]
            errors.append((difference[:, moving] / reach[moving]).mean())
            agreements.append((difference[:, binary] < 1).mean() if binary.any() else 1.0)
            rounds.append(chunk.info["rounds"])
    return {
        "action_error": float(np.mean(errors)),
        "binary_accuracy": float(np.mean(agreements)),
        "rounds": float(np.mean(rounds)),
    }


@torch.no_grad()
def held_out_loss(policy: TorchPolicy, loss: PolicyLoss, windows: WindowMixture, count: int = COUNT) -> float:
    """The training loss on the same windows, without augmentation; masks are drawn from one seed, so equal weights have equal losses."""
    collate, generator = Collator(policy.assets), torch.Generator(device=policy.device).manual_seed(0)
    terms = [
        loss(policy.model, send_to_device(collate(batch), policy.device), generator, augment=False)
        for batch in evenly_spaced(windows, count)
    ]
    return float(sum(each.loss_sum for each in terms) / sum(each.normalizer for each in terms))
