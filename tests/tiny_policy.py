"""An untrained debug-preset policy: a checkpoint folder made in a fraction of a second, and observations for it."""

from pathlib import Path

import numpy as np
import torch

from multimodal.config import get_preset
from multimodal.images import ImageConfig
from multimodal.tokenizer import train_tokenizer
from tests.reaching import SPEC
from vla.action_tokenizer import ActionTokenizer
from vla.decoding import DecodeConfig
from vla.interface import Observation
from vla.model import VLA, VLAConfig
from vla.normalization import Statistics
from vla.policy import PolicyAssets

ACTION_HORIZON = 4


def write_policy(folder: Path, *, seed: int = 0, horizon: int = ACTION_HORIZON) -> Path:
    """The folder of a policy for tests.reaching.SPEC; another seed gives other weights."""
    generator = np.random.default_rng(0)
    spread = Statistics.of(generator.uniform(-1, 1, (200, 3)))
    tokenizer = ActionTokenizer.from_statistics(spread, binary=SPEC.binary_actions, num_bins=31)
    text = train_tokenizer(["go to the bright side", "stay where you are"])
    preset = get_preset("debug")
    model = VLAConfig(
        vlm=type(preset)(vision=preset.vision, decoder=preset.decoder, vocab_size=text.vocab_size, num_cameras=2),
        state_dim=SPEC.state_dim,
        text_length=8,
        action_horizon=horizon,
        action_dim=SPEC.action_dim,
        num_action_ids=tokenizer.vocab_size,
    )
    assets = PolicyAssets(
        model=model,
        spec=SPEC,
        statistics=spread,
        action_tokenizer=tokenizer,
        text_tokenizer=text,
        images=ImageConfig(crop=32),
        decode=DecodeConfig(rounds=3, token_temperature=0.7),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        assets.save(folder, VLA(model).state_dict())
    return folder


def observations(count: int, *, seed: int = 0) -> list[Observation]:
    """Different ones, the same for the same seed."""
    generator = np.random.default_rng(seed)
    size = SPEC.image_size
    return [
        Observation(
            {camera: generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in SPEC.cameras},
            generator.uniform(-1, 1, SPEC.state_dim).astype(np.float32),
            "go to the bright side",
        )
        for _ in range(count)
    ]
