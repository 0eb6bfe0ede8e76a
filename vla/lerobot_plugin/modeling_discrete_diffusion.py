"""The policy as a LeRobot 0.4 PreTrainedPolicy. Its folder is a checkpoint of ours plus LeRobot's files.

So `lerobot-eval --policy.path=FOLDER` and `vla eval --policy.path=FOLDER` run the same weights, and act through the same
TorchPolicy: the same observation gives the same chunk, bit for bit.
"""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from multimodal.checkpoint import load_weights
from multimodal.letterbox import fit_square
from multimodal.losses import build_objective
from vla.chunking import ActionQueue
from vla.interface import Observation
from vla.lerobot_plugin.configuration_discrete_diffusion import DiscreteDiffusionConfig
from vla.lerobot_plugin.dataset_assets import assets_from_dataset, policy_cameras
from vla.model import VLA
from vla.normalization import normalize
from vla.policy import PolicyAssets, TorchPolicy, replace_pretrained
from vla.policy_loss import PolicyLoss, policy_batch
from vla.transforms import clean_instruction

SEEDS = 2**31


class DiscreteDiffusionPolicy(PreTrainedPolicy):
    """See vla.interface.Policy for what it does; here it keeps, per environment of a batch, the running chunk."""

    config_class = DiscreteDiffusionConfig
    name = "discrete_diffusion"

    def __init__(
        self,
        config: DiscreteDiffusionConfig,
        *,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        assets: PolicyAssets | None = None,
        **_: Any,  # dataset_stats, which lerobot passes: its quantiles are not those of all frames
    ) -> None:
        """A fresh policy for the data set, or with `assets` (see `from_pretrained`) one whose weights come afterwards."""
        super().__init__(config)
        config.validate_features()
        if assets is None and dataset_meta is None:
            raise ValueError(
                "A policy is made for a data set (lerobot-train --dataset.root=...) or loaded: give --policy.path=FOLDER."
            )
        if assets is None:
            self.assets = assets_from_dataset(config, dataset_meta)
            self.model = VLA(self.assets.model)
        else:
            self.assets = _with_settings(assets, config)
            self.model = VLA(replace_pretrained(self.assets.model))
        self._cameras = policy_cameras(config)
        self._check_features()
        self._loss_step = PolicyLoss(self.assets, build_objective(config.objective))
        self.reset()

    # ----------------------------------------------------------------------------------------------------- training

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The loss of a LeRobot batch: images float [B, 3, H, W] in [0, 1], state [B, S], action [B, H, D], task."""
        if reduction != "mean":
            raise ValueError(f"reduction is {reduction!r}; this policy gives the mean loss only (so no use_rabc).")
        actions = batch[ACTION]
        is_pad = batch.get(f"{ACTION}_is_pad", torch.zeros(actions.shape[:2], dtype=torch.bool))
        inputs = policy_batch(
            self.assets,
            images=torch.stack(list(self._images(batch).values()), dim=1),
            state=normalize(batch[OBS_STATE].cpu().numpy(), self.assets.statistics),
            instructions=[clean_instruction(text) for text in batch["task"]],
            actions=actions.cpu().numpy(),
            is_pad=is_pad.cpu().numpy(),
        )
        # from torch's generator, which LeRobot seeds with --seed and keeps in its checkpoints
        generator = torch.Generator(actions.device).manual_seed(int(torch.randint(SEEDS, ())))
        terms = self._loss_step(self.model, send_to_device(inputs, actions.device), generator)
        loss = terms.loss_sum / terms.normalizer
        return loss, {"loss": loss.item()}

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Weight decay on matrices only, as `vla train`."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        return [{"params": matrices}, {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}]

    def _get_default_peft_targets(self) -> dict[str, str]:
        """Adapters (--peft.r=16 on a loaded policy) go into the backbone's attention and MLP."""
        return {"target_modules": r".*\.decoder\.blocks\..*\.(query|key|value|output|gate|up|down)"}

    # ------------------------------------------------------------------------------------------------------- acting

    def reset(self) -> None:
        """Forget the running chunks; call it when episodes start."""
        self._queues: list[ActionQueue] = []

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action of each environment, [B, D]; asks the model once per n_action_steps."""
        rows = len(batch[OBS_STATE])
        if len(self._queues) != rows:
            self._queues = [ActionQueue(self.config.n_action_steps, self.config.num_known) for _ in range(rows)]
        if self._queues[0].needs_chunk:
            known = [queue.known_tail() for queue in self._queues]
            for queue, chunk in zip(self._queues, self.predict_action_chunk(batch, known=known), strict=True):
                queue.push(chunk.cpu().numpy())
        return torch.stack([torch.from_numpy(queue.pop()) for queue in self._queues]).to(batch[OBS_STATE].device)

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], *, known: list | None = None, **kwargs: Any) -> Tensor:
        """Chunks [B, H, D] in robot units; known: per row None or the actions [k, D] that its chunk must start with."""
        policy = TorchPolicy(self.assets, self.model)  # switches to evaluation mode
        seeds = torch.randint(SEEDS, (len(batch[OBS_STATE]),)).tolist()
        chunks = policy.act(self._observations(batch), known=known, seeds=seeds)
        return torch.stack([torch.from_numpy(chunk.actions) for chunk in chunks]).to(batch[OBS_STATE].device)

    def _observations(self, batch: dict[str, Any]) -> list[Observation]:
        images = {camera: frames.cpu().numpy() for camera, frames in self._images(batch).items()}
        state = batch[OBS_STATE].cpu().numpy()
        return [
            Observation({camera: frames[row] for camera, frames in images.items()}, state[row], batch["task"][row])
            for row in range(len(state))
        ]

    def _images(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """camera -> uint8 [B, size, size, 3], exactly the frames that LeRobot divided by 255, fitted if they are no squares."""
        images = {}
        for camera in self.assets.spec.cameras:
            key = self._cameras[camera]
            if key not in batch:
                got = sorted(name for name in batch if name.startswith("observation."))
                raise ValueError(
                    f"The batch lacks {key}; it has {got}. The policy was trained with {list(self._cameras.values())}: say "
                    f"which is which with --rename_map='{{\"observation.images.NAME\": \"{key}\"}}'."
                )
            frames, expected = batch[key], self.config.input_features[key].shape
            if tuple(frames.shape[1:]) != tuple(expected) and not self.config.fit_images:
                raise ValueError(
                    f"{key} is {list(frames.shape[1:])}; the policy was trained with {list(expected)}. Let the environment "
                    f"draw that size (--env.image_size={expected[-1]} with --env.type=remask), or have it scaled: "
                    "--policy.fit_images=true."
                )
            pixels = frames if frames.dtype == torch.uint8 else (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
            images[camera] = fit_square(pixels.permute(0, 2, 3, 1), self.assets.spec.image_size)
        return images

    # -------------------------------------------------------------------------------------------------------- files

    def _save_pretrained(self, save_directory: Path) -> None:
        """config.json for LeRobot, and our checkpoint's files beside it; other files of the folder stay."""
        save_directory = Path(save_directory)
        self.config._save_pretrained(save_directory)
        staged = Path(tempfile.mkdtemp(prefix=".saving-", dir=save_directory))
        try:
            self.assets.save(staged / "policy", self.model.state_dict())
            for path in sorted((staged / "policy").iterdir()):
                os.replace(path, save_directory / path.name)
        finally:
            shutil.rmtree(staged)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> "DiscreteDiffusionPolicy":
        """The policy of a folder, or of a repository of the hub, in evaluation mode; weights must fit exactly.

        Raises FileNotFoundError or ValueError saying what is wrong with the folder.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "revision": revision}
            folder = Path(snapshot_download(str(pretrained_name_or_path), force_download=force_download, **options))
        assets, weights = PolicyAssets.load(folder)
        if assets.base is not None:
            raise ValueError(f"{folder} lies over published weights, {assets.base.path}; give what `vla merge` makes of it.")
        policy = cls(config or PreTrainedConfig.from_pretrained(folder), assets=assets, **kwargs)
        load_weights(policy.model, weights, folder)
        return policy.to(policy.config.device).eval()

    def _check_features(self) -> None:
        """Raise ValueError unless LeRobot's features are the robot's that the assets were made for."""
        spec, config = self.assets.spec, self.config
        found = {
            "cameras": (sorted(self._cameras), sorted(spec.cameras)),
            "state": (list(config.robot_state_feature.shape), [spec.state_dim]),
            "action": (list(config.action_feature.shape), [spec.action_dim]),
            "chunk_size": (config.chunk_size, self.assets.model.action_horizon),
        }
        for name, (got, expected) in found.items():
            if got != expected:
                raise ValueError(f"The policy has {name} {expected} (robot {spec.name!r}); LeRobot's config says {got}.")


def _with_settings(assets: PolicyAssets, config: DiscreteDiffusionConfig) -> PolicyAssets:
    """Saved assets with what the command line may change: training of the head, decoding, augmentation."""
    if config.head.type != assets.head.type:
        raise ValueError(f"The saved policy has head {assets.head.type!r}; {config.head.type!r} would need new weights.")
    if config.images.output_size != assets.images.output_size:
        saved, asked = assets.images.output_size, config.images.output_size
        raise ValueError(f"The saved policy sees {saved} pixels; --policy.images says {asked}.")
    return replace(assets, head=config.head, decode=config.decode, images=config.images)
