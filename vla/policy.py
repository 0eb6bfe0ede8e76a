"""A checkpoint folder becomes a Policy: observations in, action chunks in robot units out."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.checkpoint import checkpoint_hash, load_checkpoint, load_weights, save_checkpoint
from multimodal.device import check_device
from multimodal.images import ImageConfig, prepare_images
from multimodal.pretrained.source import local_folder
from multimodal.pretrained.text import PublishedTokenizer
from multimodal.tokenizer import TextTokenizer
from vla.action_head import HeadConfig
from vla.action_tokenizer import ActionTokenizer
from vla.backbone import Base, rebuild
from vla.decision import Decision, KnownActions, action_chunks, known_actions
from vla.heads import build_head
from vla.interface import ActionChunk, Observation, RobotSpec
from vla.model import VLA, VLAConfig
from vla.normalization import Statistics
from vla.transforms import Transforms
from vla.unmasking import DecodeConfig

FORMAT = "remask-policy-1"
PACKAGES = ("torch", "timm", "numpy", "tokenizers", "remask")


@dataclass(frozen=True)
class PolicyAssets:
    """All of a policy but its weights: what a checkpoint folder holds beside model.safetensors."""

    model: VLAConfig
    spec: RobotSpec
    statistics: Statistics  # of the state
    action_tokenizer: ActionTokenizer
    text_tokenizer: TextTokenizer
    images: ImageConfig = field(default_factory=ImageConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    provenance: dict[str, Any] = field(default_factory=dict)  # data sets, seed, steps
    base: Base | None = None  # the published weights that the folder's own are to be laid over; None: the folder holds all

    @property
    def transforms(self) -> Transforms:
        return Transforms(self.spec, self.statistics)

    def encode_instructions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, text_length] and mask bool [B, text_length]. Raises ValueError for a text that is too long."""
        return self.text_tokenizer.encode_batch(texts, self.model.text_length)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the checkpoint folder, atomically."""
        config = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "head": asdict(self.head),
            "decode": asdict(self.decode),
            **({} if self.base is None else {"base": asdict(self.base)}),
            "images": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.images).items()},
        }
        blobs = {
            "schema.json": json.dumps(self.spec.to_dict(), indent=2),
            "statistics.json": self.statistics.to_json(),
            "action_tokenizer.json": json.dumps(self.action_tokenizer.to_dict()),
            "tokenizer.json": self.text_tokenizer.to_json(),
            "versions.json": json.dumps(package_versions(), indent=2),
            "provenance.json": json.dumps(self.provenance, indent=2),
        }
        save_checkpoint(folder, model_state=weights, config=config, blobs=blobs)

    @classmethod
    def load(cls, folder: Path) -> tuple["PolicyAssets", dict[str, Tensor]]:
        """The assets and the weights. Raises FileNotFoundError or ValueError saying what is wrong with the folder."""
        checkpoint = load_checkpoint(folder)
        config = checkpoint.config
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{checkpoint.folder} holds format {config.get('format')!r}; this version reads {FORMAT!r}. "
                "Train the policy again, or use the version in its versions.json."
            )
        images = {key: tuple(value) if isinstance(value, list) else value for key, value in config["images"].items()}
        model = VLAConfig.from_dict(config["model"])
        tokenizer = checkpoint.text("tokenizer.json")
        assets = cls(
            model=model,
            spec=RobotSpec.from_dict(json.loads(checkpoint.text("schema.json"))),
            statistics=Statistics.from_json(checkpoint.text("statistics.json")),
            action_tokenizer=ActionTokenizer.from_dict(json.loads(checkpoint.text("action_tokenizer.json"))),
            text_tokenizer=(
                PublishedTokenizer.from_json(tokenizer, model.prompt) if model.prompt.pad_token else TextTokenizer.from_json(tokenizer)
            ),
            images=ImageConfig(**images),
            head=HeadConfig(**config["head"]),
            decode=DecodeConfig(**config["decode"]),
            provenance=json.loads(checkpoint.text("provenance.json")),
            base=Base(**config["base"]) if "base" in config else None,
        )
        return assets, checkpoint.state


class TorchPolicy:
    """A `vla.interface.Policy` on torch."""

    def __init__(self, assets: PolicyAssets, model: VLA, *, content_hash: str = "") -> None:
        self.assets, self.model, self.content_hash = assets, model.eval(), content_hash
        self.spec = assets.spec
        self.action_horizon = assets.model.action_horizon
        self.device = next(model.parameters()).device
        self.head = build_head(assets.head, assets.action_tokenizer)

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        """See `vla.interface.Policy.act`. info: rounds, confidence [H, D] (token heads), milliseconds of the whole batch."""
        start = time.perf_counter()
        given = known_actions(known or [None] * len(observations), self.action_horizon, self.spec.action_dim)
        decision = self.decide(observations, given, list(seeds or [0] * len(observations)))
        return action_chunks(decision, given, 1e3 * (time.perf_counter() - start))

    @torch.inference_mode()
    def decide(self, observations: Sequence[Observation], known: KnownActions, seeds: Sequence[int]) -> Decision:
        """`act` with its tokens, before known actions are put back."""
        prefix = self.model.prefill(*self.embed(observations))
        return self.head.act(self.model, prefix, known, self.assets.decode, seeds)

    def embed(self, observations: Sequence[Observation]) -> tuple[Tensor, Tensor]:
        """Prefix embeddings [B, P, width] and is_real [B, P] of a batch; raises ValueError on a wrong observation."""
        inputs = [self.assets.transforms.forward(observation) for observation in observations]
        images = torch.as_tensor(np.stack([item.images for item in inputs])).to(self.device)
        state = torch.as_tensor(np.stack([item.state for item in inputs])).to(self.device)
        texts = [item.instruction for item in inputs]
        ids, mask = self.assets.encode_instructions(texts)
        return self.model.embed_prefix(
            prepare_images(images, self.assets.images), state, ids.to(self.device), mask.to(self.device)
        )


def load_policy(path: str | Path, *, device: str = "cpu", decode: dict[str, Any] | None = None) -> TorchPolicy:
    """The policy of a checkpoint folder, or Hub repository "owner/name"; `decode` overrides fields of its DecodeConfig.

    Raises FileNotFoundError for a folder without a checkpoint, ValueError for one that does not fit or a device that is not
    there, OSError for a repository that cannot be reached.
    """
    check_device(device)
    path = local_folder(path).resolve()  # checkpoints/last may move on meanwhile: weights and hash are of one
    assets, weights = PolicyAssets.load(path)
    if decode:
        assets = replace(assets, decode=assets.decode.changed(decode))
    model = load_model(assets, weights, path)
    return TorchPolicy(assets, model.to(device), content_hash=checkpoint_hash(path))


def load_model(assets: PolicyAssets, weights: dict[str, Tensor], source: str | Path) -> VLA:
    """The model of a policy folder, on a published backbone or on a preset. Raises ValueError if the weights do not fit it."""
    config = replace_pretrained(assets.model)
    if config.prompt.pad_token:
        return rebuild(config, assets.base, weights, source)
    model = VLA(config)
    load_weights(model, weights, source)
    return model


def replace_pretrained(config: VLAConfig) -> VLAConfig:
    """The same shapes without fetching a tower's published weights: the checkpoint holds the trained ones."""
    return replace(config, vlm=replace(config.vlm, vision=replace(config.vlm.vision, pretrained=None)))


def package_versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Of Python, of what a policy is made with and of `more`; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
