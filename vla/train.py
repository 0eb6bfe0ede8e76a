"""Frame cache -> policy: settings, what a run begins with, and the run itself on multimodal.training (`vla train`)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from multimodal.compressor import KEEP_ALL, CompressorConfig
from multimodal.config import get_preset
from multimodal.decoder import count_parameters
from multimodal.images import ImageConfig
from multimodal.losses import build_objective
from multimodal.tokenizer import train_tokenizer
from multimodal.schedule import progress
from multimodal.training import TrainingConfig, train
from multimodal.training_state import last_checkpoint, read_position
from multimodal.vlm_checkpoint import is_vlm
from vla.action_head import HeadConfig
from vla.action_tokenizer import DEFAULT_NUM_BINS, ActionTokenizer
from vla.backbone import BackboneConfig
from vla.cli import parse_config
from vla.data import ActionWindows, WindowMixture, chosen_episodes
from vla.frame_cache import FrameCache
from vla.heads import HEADS
from vla.held_out import held_out_error, held_out_loss
from vla.home import remask_home
from vla.interface import RobotSpec
from vla.model import VLA, VLAConfig
from vla.normalization import Statistics
from vla.policy import PolicyAssets, load_model, load_policy
from vla.policy_loss import Collator, PolicyBatch, PolicyLoss
from vla.start import Start, add_compressor, begin_on_published, begin_on_vlm
from vla.transforms import clean_instruction
from vla.unmasking import DecodeConfig


MOST_WORDS = 65_536  # of a policy's own vocabulary, which is as long as its instructions' words are many


@dataclass(frozen=True)
class DatasetConfig:
    """Which demonstrations."""

    root: list[Path] | Path | None = None  # data set folder, or its cache; a list is mixed
    weights: list[float] | None = None  # share of each root; default by size
    tasks: list[int] | None = None  # of the suite; default: all
    held_out_fraction: float = 0.05  # whole episodes kept from training, for the held-out error
    episodes_per_task: int | None = None  # train on the first so many of each task and root; default: all


@dataclass(frozen=True)
class ModelConfig:
    """The backbone by preset, and the shape of an action chunk."""

    preset: str = "desk"  # see multimodal/config.py
    action_horizon: int = 8  # steps of a chunk
    num_bins: int = DEFAULT_NUM_BINS  # per continuous action dimension, odd
    text_slack: int = 4  # instruction ids beyond the longest training instruction
    pretrained: str | None = None  # weights of the image tower, see VisionConfig
    compressor: CompressorConfig = KEEP_ALL  # of each camera's tokens before the prefix: {mode: pool, pool_ratio: 4}; lossy


@dataclass(frozen=True)
class PolicyConfig:
    """What the policy is built on."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)  # a published checkpoint instead of model.preset


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `vla train`."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    objective: dict[str, Any] = field(default_factory=lambda: {"type": "cross_entropy"})  # see multimodal/losses.py
    decode: DecodeConfig = field(default_factory=DecodeConfig)  # how the trained policy decodes by default
    images: ImageConfig = field(default_factory=ImageConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=20_000))
    start_from: Path | None = None  # policy folder whose weights, shapes, tokenizers and statistics this run begins with, or a
    # folder of `vla train-vlm`, whose weights, shapes and words become the policy's backbone
    output_dir: Path | None = None  # default: REMASK_HOME/runs/policy
    resume: bool = False  # continue from the last checkpoint in output_dir


def build_assets(config: TrainConfig, mixture: WindowMixture) -> PolicyAssets:
    """Everything of the policy that follows from the data and the settings."""
    provenance = {
        "datasets": [source.cache.root.name for source in mixture.sources],
        "tasks": config.dataset.tasks,
        "frames": len(mixture),
        "episodes": sum(source.num_episodes for source in mixture.sources),
        "seed": config.training.seed,
        "objective": config.objective,
        "training": asdict(config.training),
    }
    spec = mixture.sources[0].cache.spec
    return assemble_assets(config, spec, mixture.statistics(), instructions_of(mixture), provenance)


def assemble_assets(
    config: TrainConfig,
    spec: RobotSpec,
    statistics: tuple[Statistics, Statistics],
    instructions: Sequence[str],
    provenance: dict[str, Any],
) -> PolicyAssets:
    """A fresh policy's assets for one robot; `statistics` are those of (state, action) over the training frames."""
    state_statistics, action_statistics = statistics
    instructions = sorted({clean_instruction(text) for text in instructions})
    text_tokenizer = train_tokenizer(instructions, vocab_size=MOST_WORDS)
    action_tokenizer = ActionTokenizer.from_statistics(
        action_statistics, binary=spec.binary_actions, num_bins=config.model.num_bins
    )
    preset = get_preset(config.model.preset)
    vision = replace(preset.vision, image_size=config.images.output_size, pretrained=config.model.pretrained)
    vlm = replace(preset, vision=vision, vocab_size=text_tokenizer.vocab_size, num_cameras=len(spec.cameras))
    model = VLAConfig(
        vlm=vlm,
        state_dim=spec.state_dim,
        text_length=max(len(text_tokenizer.encode(text)) for text in instructions) + config.model.text_slack,
        action_horizon=config.model.action_horizon,
        action_dim=spec.action_dim,
        num_action_ids=action_tokenizer.vocab_size,
        slots=HEADS[config.head.type].slots,
        compressor=config.model.compressor,
    )
    return PolicyAssets(
        model, spec, state_statistics, action_tokenizer, text_tokenizer, config.images, config.head, config.decode, provenance
    )


def instructions_of(mixture: WindowMixture) -> list[str]:
    """Every instruction of the episodes that the windows are of, cleaned, once."""
    return sorted({clean_instruction(text) for source in mixture.sources for text in source.instructions})


def begin(config: TrainConfig, mixture: WindowMixture) -> Start:
    """The policy of the settings before its first step: from scratch, on a published backbone, or on what `start_from` holds.

    Raises ValueError if both a backbone and `start_from` are given, and what the two ways raise.
    """
    if config.start_from is not None and config.policy.backbone.path is not None:
        raise ValueError("Both --start_from and --policy.backbone.path are given; a run begins with one. Drop the other.")
    if config.policy.backbone.path is None and config.policy.backbone != BackboneConfig():
        raise ValueError("policy.backbone has settings but no path; they are a published checkpoint's: give --policy.backbone.path.")
    fresh = build_assets(config, mixture)
    torch.manual_seed(config.training.seed)
    if config.start_from is not None and is_vlm(config.start_from):
        return begin_on_vlm(config.start_from.expanduser(), fresh, instructions_of(mixture), config.model.text_slack)
    if config.start_from is not None:
        return begin_from(config, fresh, instructions_of(mixture))
    if config.policy.backbone.path is not None:
        return begin_on_published(config.policy.backbone, fresh, instructions_of(mixture), config.model.text_slack)
    return Start(fresh, VLA(fresh.model), fresh.save)


def check_same_data(fresh: PolicyAssets, folder: Path) -> None:
    """Raise ValueError naming what a resumed run's data would change under the weights of the policy in `folder`."""

    def facts(assets: PolicyAssets) -> dict[str, Any]:
        state = assets.statistics
        return {
            "state ranges": [state.q01.tolist(), state.q99.tolist()],
            "action ranges and bins": assets.action_tokenizer,
            "words of the instructions": assets.text_tokenizer.to_json(),
            "number of frames": assets.provenance["frames"],
        }

    saved = facts(PolicyAssets.load(folder)[0])
    changed = [name for name, value in facts(fresh).items() if value != saved[name]]
    if changed:
        raise ValueError(
            f"{folder} was trained on other data than this run's: {', '.join(changed)} differ. Restore the data sets and their "
            "settings, or train on these in another --output_dir, with --start_from for the weights."
        )


def begin_from(config: TrainConfig, fresh: PolicyAssets, instructions: Sequence[str]) -> Start:
    """The policy in `start_from`, trained on whole with this run's head, decoding and crops; adapters are merged first.

    A policy without a compressor takes this run's, fresh; one that has its own keeps it. fresh: what the data alone would
    give; instructions: the data's. Raises ValueError if the policy's robot, instructions or slots are not the data's, or if it
    compresses otherwise than this run asks.
    """
    folder = Path(config.start_from).expanduser()
    found, weights = PolicyAssets.load(folder)
    is_published = bool(found.model.prompt.pad_token)
    # A published tower has its own size and range of values, whatever the crops.
    tower = {"size": found.images.size, "mean": found.images.mean, "std": found.images.std} if is_published else {}
    images = replace(config.images, **tower)
    if found.spec != fresh.spec:
        raise ValueError(f"--start_from drives {found.spec}; the data set shows {fresh.spec}. Collect data of that robot.")
    if HEADS[found.head.type].slots != HEADS[config.head.type].slots or found.images.output_size != images.output_size:
        raise ValueError(
            f"--start_from has a {found.head.type} head on {found.images.output_size} pixels, this run asks for "
            f"{config.head.type} on {images.output_size}; heads over tokens and over steps, and other sizes, have "
            "different weights."
        )
    if found.model.action_horizon != config.model.action_horizon:
        raise ValueError(
            f"--start_from acts in chunks of {found.model.action_horizon} steps, this run asks for {config.model.action_horizon}: "
            f"give --model.action_horizon={found.model.action_horizon}."
        )
    own, asked = found.model.compressor, config.model.compressor
    adds = asked.mode != "none" and asked != own
    if adds and own.mode != "none":
        raise ValueError(
            f"--start_from compresses its images by {own}, this run asks for {asked}; leave out model.compressor to keep the "
            "former, or start from a policy without one."
        )
    unknown = [word for word in fresh.text_tokenizer.vocabulary if word not in found.text_tokenizer.vocabulary]
    if unknown and not is_published:  # a published tokenizer spells any word
        raise ValueError(f"--start_from has never read the words {unknown[:8]} of these instructions; train from scratch.")
    longest = max(len(found.text_tokenizer.encode(text)) for text in instructions)
    if longest > found.model.text_length:
        raise ValueError(
            f"An instruction of the data has {longest} ids, --start_from has room for {found.model.text_length}; shorten it, "
            "or train from scratch."
        )
    provenance = fresh.provenance | {"start_from": str(config.start_from)}
    if "backbone" in found.provenance:
        provenance["backbone"] = found.provenance["backbone"]  # its licence binds what is trained on, too
    model = load_model(found, weights, folder).float()
    if adds:
        model, found = add_compressor(model, asked), replace(found, model=replace(found.model, compressor=asked))
    assets = replace(found, head=config.head, decode=config.decode, images=images, provenance=provenance, base=None)
    return Start(assets, model, assets.save)


def open_windows(config: TrainConfig, *, held_out: bool) -> list[ActionWindows]:
    """The windows of every data set; of the held-out ones, those of the data sets that have any (a small one has none).

    Raises FileNotFoundError naming the command that makes a missing one.
    """
    given, fraction, tasks = config.dataset.root, config.dataset.held_out_fraction, config.dataset.tasks
    most = config.dataset.episodes_per_task
    if not given:
        raise ValueError("No data set: give --dataset.root=FOLDER (made by `vla collect`).")
    roots = [Path(root).expanduser() for root in (given if isinstance(given, list) else [given])]
    return [
        ActionWindows(
            cache, config.model.action_horizon, tasks=tasks, held_out_fraction=fraction, held_out=held_out, episodes_per_task=most
        )  # fmt: skip
        for cache in map(FrameCache.open, roots)
        if not held_out or chosen_episodes(cache, tasks, fraction, held_out=True).any()
    ]


def train_policy(config: TrainConfig) -> Path:
    """Train as configured; returns the last checkpoint's policy folder. Raises what `multimodal.training.train` raises."""
    mixture = WindowMixture(open_windows(config, held_out=False), config.dataset.weights)
    start = begin(config, mixture)
    assets, model = start.assets, start.model
    last = last_checkpoint(output_folder(config))
    if config.resume and last is not None:
        check_same_data(assets, last / "policy")
    tower = count_parameters(model.vlm.vision)
    basis = config.policy.backbone.path or f"preset {config.model.preset}"
    print(
        f"{assets.head.type} policy, {basis}: {count_parameters(model) / 1e6:.2f} M parameters "
        f"(image tower {tower / 1e6:.2f} M), {len(mixture)} frames of {assets.provenance['episodes']} episodes"
    )
    kept = open_windows(config, held_out=True)
    held_out = WindowMixture(kept) if kept else None
    if held_out is not None:
        assets.encode_instructions(instructions_of(held_out))  # one too long is refused now, not at the first checkpoint

    collate, loss = Collator(assets), PolicyLoss(assets, build_objective(config.objective))

    def on_checkpoint(folder: Path, step: int) -> dict[str, float]:
        """Held-out error and loss of the weights just saved, if anything is held out."""
        if held_out is None:
            return {}
        policy = load_policy(folder / "policy", device=str(next(model.parameters()).device))
        return held_out_error(policy, held_out) | {"loss": held_out_loss(policy, loss, held_out)}

    def batch(index: int) -> PolicyBatch:
        return collate(mixture.batch(index, batch_size=config.training.batch_size, seed=config.training.seed))

    last = train(
        model, loss, batch, config.training, output_folder(config),
        save_model=start.save, on_checkpoint=on_checkpoint, resume=config.resume,
    )  # fmt: skip
    return last / "policy"


def finished_policy(config: TrainConfig) -> Path | None:
    """The policy of output_dir if its run reached the end of its budget, else None."""
    last = last_checkpoint(output_folder(config))
    if last is None:
        return None
    position = read_position(last / "training_state")
    is_done = progress(position.step, config.training.steps, position.elapsed, config.training.minutes) >= 1
    return last / "policy" if is_done else None


def output_folder(config: TrainConfig) -> Path:
    return Path(config.output_dir or remask_home() / "runs" / "policy").expanduser()


def main(argv: Sequence[str]) -> int:
    """`vla train`; `--steps` is short for `--training.steps`."""
    argv = [f"--training.{word[2:]}" if word.split("=")[0] == "--steps" else word for word in argv]
    folder = train_policy(parse_config(TrainConfig, argv, verb="train"))
    print(f"policy: {folder}\nnext: vla eval --policy.path={folder} --suite=... --episodes=50")
    return 0
