"""`vla calibrate policy`: a policy's image tower keeps its token map under attack; all of the rest of the policy stays as it is.

A head on a pooled embedding protects nothing here, as a policy reads the tower's tokens. So low-rank adapters in the tower learn
to give, for attacked frames, the tokens of the clean ones (the squared distance over all tokens, FARE's loss, arXiv
2402.12336), and are merged: the result is an ordinary policy folder.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.bind.adapters import AdapterConfig, install, merged_state
from multimodal.bind.attacks import pgd_last
from multimodal.bind.ball import Ball
from multimodal.bind.calibration import InnerAttackConfig
from multimodal.bind.task import count_weights
from multimodal.bind.train_calibration import CalibrationTraining
from multimodal.config import ImageConfig
from multimodal.images import prepare_pixels
from multimodal.training import LossTerms, train
from vla.attacked_policy import GREY
from vla.data import ActionWindows, WindowMixture
from vla.home import remask_home
from vla.merge import PolicyPath
from vla.policy import TorchPolicy, load_policy
from vla.train import DatasetConfig, ModelConfig, TrainConfig, open_windows

TOWER = "vlm.vision."


@dataclass(frozen=True)
class PolicyCalibrationTraining(CalibrationTraining):
    """How a policy's tower is calibrated."""

    steps: int | None = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 50


@dataclass(frozen=True)
class CalibratePolicyConfig:
    """Settings of `vla calibrate policy`."""

    policy: PolicyPath = field(default_factory=PolicyPath)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)  # frames to calibrate on; their actions are not read
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    attack: InnerAttackConfig = field(default_factory=InnerAttackConfig)  # epsilon in grey levels of the frames
    clean_weight: float = 1.0  # of the clean frames' own drift
    training: PolicyCalibrationTraining = field(default_factory=PolicyCalibrationTraining)
    output_dir: Path | None = None  # default: REMASK_HOME/runs/calibrated-policy
    resume: bool = False


class TokenMap(nn.Module):
    """The tower with adapters, and the frozen one beside it (not among its weights). Stays in eval mode."""

    def __init__(self, tower: nn.Module, images: ImageConfig, adapters: AdapterConfig, seed: int) -> None:
        super().__init__()
        self.images, self._frozen = images, [tower.eval().requires_grad_(False)]
        self.tower = copy.deepcopy(tower).eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.adapted = install(self.tower, adapters)

    def train(self, mode: bool = True) -> "TokenMap":
        super().train(mode)
        self.tower.eval()
        return self

    def tokens(self, frames: Tensor) -> Tensor:
        """Float frames [B, C, H, W, 3] in grey levels -> calibrated tokens [B, C * P, width]."""
        return self.tower(prepare_pixels(frames, self.images))

    @torch.no_grad()
    def frozen_tokens(self, frames: Tensor) -> Tensor:
        return self._frozen[0].to(frames.device)(prepare_pixels(frames, self.images))


@dataclass(frozen=True)
class TokenMapLoss:
    """Squared distance to the clean frozen tokens, over all tokens, in units of their mean square; attacked + weight x clean."""

    attack: InnerAttackConfig
    clean_weight: float = 1.0

    def __call__(self, model: TokenMap, batch: Tensor, generator: torch.Generator) -> LossTerms:
        frames = batch.float()
        clean = model.frozen_tokens(frames)
        scale = clean.square().mean().clamp_min(1e-12)

        def drift(points: Tensor) -> Tensor:
            return (model.tokens(points) - clean).square().mean((1, 2)) / scale

        points = pgd_last(drift, Ball(frames, GREY, self.attack.epsilon), steps=self.attack.steps, generator=generator)
        attacked, still = drift(points), drift(frames)
        loss = attacked + self.clean_weight * still
        return LossTerms(loss.sum(), float(len(frames)), {"attacked_drift": attacked.detach().mean(), "clean_drift": still.detach().mean()})


def calibrate_policy(config: CalibratePolicyConfig) -> Path:
    """Train, merge and write; the calibrated policy's folder. Raises ValueError on settings that do not fit."""
    if config.policy.path is None:
        raise ValueError("Which policy? Give --policy.path=RUN/checkpoints/last/policy.")
    policy = load_policy(config.policy.path)
    windows = TrainConfig(dataset=config.dataset, model=ModelConfig(action_horizon=policy.action_horizon))
    mixture = WindowMixture(open_windows(windows, held_out=False), config.dataset.weights)
    model = TokenMap(policy.model.vlm.vision, policy.assets.images, config.adapters, config.training.seed)
    if not model.adapted:
        raise ValueError("Nothing to train: give --adapters.lora_rank or --adapters.tune_norms.")
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = count_weights(policy.model)
    tower = count_weights(model) - trainable
    print(f"image tower: {trainable} trainable weights, {trainable / tower:.2%} of it, {trainable / whole:.2%} of the policy")

    def frames(index: int) -> Tensor:
        batch = mixture.batch(index, batch_size=config.training.batch_size, seed=config.training.seed)
        return torch.as_tensor(policy.assets.transforms.forward_batch(batch).images)

    def save(folder: Path, state: dict[str, Tensor]) -> Path:
        return write_calibrated(folder, policy, model, state, config)

    loss = TokenMapLoss(config.attack, config.clean_weight)
    output = (config.output_dir or remask_home() / "runs" / "calibrated-policy").expanduser()
    kept = held_out_frames(policy, open_windows(windows, held_out=True))
    before = None if kept is None else measure(model, loss, kept)
    last = train(model, loss, frames, config.training, output, save_model=save, resume=config.resume)
    if before is None:
        print("drift: not measured, as no episode is held out (--dataset.held_out_fraction)")
    else:
        after = measure(model, loss, kept)
        drift = "; ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before)
        print(f"{drift} (squared, relative, on {len(kept)} held-out windows)")
    return last / "policy"


def held_out_frames(policy: TorchPolicy, kept: Sequence[ActionWindows], count: int = 64) -> Tensor | None:
    """uint8 [B, C, H, W, 3] of `count` windows, evenly spaced over all held-out ones; None if there are none."""
    if not kept:
        return None
    mixture = WindowMixture(kept)
    batch = mixture.gather(np.unique(np.linspace(0, len(mixture) - 1, count).astype(int)))
    return torch.as_tensor(policy.assets.transforms.forward_batch(batch).images)


def measure(model: TokenMap, loss: TokenMapLoss, frames: Tensor, batch: int = 16) -> dict[str, float]:
    """Drift of the frames' tokens under the training attack, and without: what the loss reports, mean over the frames."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    parts = [(len(part), loss(model, part.to(device), generator).metrics) for part in frames.split(batch)]
    return {name: sum(size * float(metrics[name]) for size, metrics in parts) / len(frames) for name in parts[0][1]}


def write_calibrated(folder: Path, policy: TorchPolicy, model: TokenMap, state: dict[str, Tensor], config: CalibratePolicyConfig) -> Path:
    """The policy's folder with the tower of `state` merged in; every other weight is the policy's own."""
    trained = copy.deepcopy(model)
    trained.load_state_dict(state)
    weights = dict(policy.model.state_dict())
    tower = {f"{TOWER}{name}": value for name, value in merged_state(trained.tower).items()}
    assert tower.keys() <= weights.keys(), "the policy keeps its tower elsewhere"
    weights |= {name: value.cpu() for name, value in tower.items()}
    calibrated = {"from": str(config.policy.path), "attack": asdict(config.attack), "adapters": asdict(config.adapters)}
    assets = replace(policy.assets, base=None, provenance=policy.assets.provenance | {"calibrated": calibrated})
    assets.save(folder, weights)
    return folder
