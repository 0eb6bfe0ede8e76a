"""Embeddings of pictures by the image tower of a policy's checkpoint: a TensorModel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from multimodal.images import prepare_images
from serve.protocol.tensors import TensorSpec
from vla.policy import TorchPolicy, load_policy


class PolicyTower:
    """image UINT8 [B, S, S, 3] -> tokens FP32 [B, P, width], and their mean: embedding FP32 [B, width]."""

    def __init__(self, policy: TorchPolicy) -> None:
        self._policy, self.content_hash = policy, policy.content_hash
        size, vlm = policy.spec.image_size, policy.model.vlm
        width, tokens = vlm.config.decoder.hidden_size, vlm.tokens_per_image
        self.inputs = (TensorSpec("image", "UINT8", (-1, size, size, 3)),)
        self.outputs = (TensorSpec("tokens", "FP32", (-1, tokens, width)), TensorSpec("embedding", "FP32", (-1, width)))

    @torch.inference_mode()
    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        policy = self._policy
        pixels = torch.as_tensor(np.array(tensors["image"])).to(policy.device)
        tokens = policy.model.vlm.image_features(prepare_images(pixels, policy.assets.images))  # without the camera's embedding
        return {"tokens": tokens.float().cpu().numpy(), "embedding": tokens.float().mean(1).cpu().numpy()}


def policy_tower(path: str, device: str = "cpu") -> PolicyTower:
    """The tower of a checkpoint folder. Raises FileNotFoundError or ValueError saying what is wrong with it."""
    return PolicyTower(load_policy(Path(path).expanduser(), device=device))
