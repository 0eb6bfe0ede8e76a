"""Windows of demonstrations -> training batch -> the head's loss: what `vla train` and lerobot-train share."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.images import prepare_images
from multimodal.losses import Objective
from multimodal.training import LossTerms
from vla.action_head import ActionBatch
from vla.data import Batch
from vla.heads import build_head
from vla.policy import PolicyAssets


class PolicyBatch(NamedTuple):
    """A training batch; a tuple, so that the training loop moves it to its device whole."""

    images: Tensor  # uint8 [B, C, H, W, 3]
    state: Tensor  # float32 [B, S], normalised
    text_ids: Tensor
    text_mask: Tensor
    target: ActionBatch


class Collator:
    """numpy windows -> PolicyBatch, through the transforms that inference uses."""

    def __init__(self, assets: PolicyAssets) -> None:
        self.assets = assets

    def __call__(self, batch: Batch) -> PolicyBatch:
        inputs = self.assets.transforms.forward_batch(batch)
        images = torch.as_tensor(inputs.images)
        return policy_batch(self.assets, images, inputs.state, inputs.instructions, batch.actions, batch.is_pad)


def policy_batch(
    assets: PolicyAssets,
    images: Tensor,
    state: np.ndarray,
    instructions: Sequence[str],
    actions: np.ndarray,
    is_pad: np.ndarray,
) -> PolicyBatch:
    """images uint8 [B, C, H, W, 3]; state [B, S] normalised; instructions cleaned (both as by `Transforms`); actions
    [B, H, D] in robot units; is_pad [B, H]."""
    ids, mask = assets.encode_instructions(instructions)
    tokens = torch.as_tensor(assets.action_tokenizer.encode(actions))
    values = torch.as_tensor(assets.action_tokenizer.coordinates(actions))
    unit = torch.as_tensor(assets.action_tokenizer.to_unit(actions))
    target = ActionBatch(tokens, values, unit, torch.as_tensor(is_pad))
    return PolicyBatch(images, torch.as_tensor(state), ids, mask, target)


class PolicyLoss:
    """The loss step handed to the training loop."""

    def __init__(self, assets: PolicyAssets, objective: Objective) -> None:
        self.assets = assets
        self.head = build_head(assets.head, assets.action_tokenizer, objective)

    def __call__(
        self, model: nn.Module, batch: PolicyBatch, generator: torch.Generator, *, augment: bool = True
    ) -> LossTerms:
        """generator: of the masks, and of crops and colours unless `augment` is off."""
        images = prepare_images(batch.images, self.assets.images, generator if augment else None)
        prefix = model.prefill(*model.embed_prefix(images, batch.state, batch.text_ids, batch.text_mask))
        loss = self.head.loss(model, prefix, batch.target, generator)
        return LossTerms(loss.loss_sum, loss.normalizer, {})
