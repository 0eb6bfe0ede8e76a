"""Bound corpus -> encoders of one shared space: the loss step and batches on multimodal.training (`vla train-bind`).

Every sensor's trunk is pulled towards what the text tower says of the object: its class, its shape, its material (so that
words alone place a class that training never saw), and towards the image of the same sample (ImageBind's InfoNCE). After
training the text tower is frozen, and what it says of each class are the semantic centers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.bound_checkpoint import BoundAssets, load_bound
from multimodal.bind.centers import build_centers
from multimodal.bind.corpus_file import LABEL, TRAIN, UNSEEN, VALIDATION, BoundManifest, read_manifest
from multimodal.bind.data import BoundSamples, augment
from multimodal.bind.encoders import BindConfig, BoundModel, TrunkConfig
from multimodal.bind.sensors import SENSORS
from multimodal.decoder import count_parameters
from multimodal.tokenizer import train_tokenizer
from multimodal.training import LossTerms, TrainingConfig, train

MEASURED = 256  # samples whose mean and deviation standardise a sensor
SHAPE_PROMPTS = ("a {}", "a thing that is a {}", "something shaped like a {}")
MATERIAL_PROMPTS = ("{}", "a thing made of {}", "something of {}")


@dataclass(frozen=True)
class BindingConfig:
    """Settings of `vla train-bind`."""

    corpus: Path  # made by `vla corpus --bind`
    output_dir: Path  # run folder
    modalities: list[str] = field(default_factory=lambda: list(SENSORS))  # image among them: the others are bound to it
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    word_weight: float = 0.5  # of the cross-entropy to shapes and to materials, beside 1 to classes
    image_weight: float = 0.25  # of InfoNCE to the image of the same sample
    mask_same_class: bool = True  # samples of one class are no negatives of each other
    label_smoothing: float = 0.05
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=500, batch_size=64, learning_rate=1.5e-3, warmup_steps=50, ema_decay=0.99, save_every=500
        )
    )
    resume: bool = False  # continue from the last checkpoint in output_dir

    def __post_init__(self) -> None:
        unknown = sorted(set(self.modalities) - set(SENSORS))
        if unknown or "image" not in self.modalities:
            raise ValueError(f"--modalities={self.modalities}: choose from {', '.join(SENSORS)}, image among them.")


@dataclass(frozen=True)
class Words:
    """Sentences that classes are told apart by: of classes, shapes and materials, and which shape and material a class has."""

    groups: tuple[tuple[tuple[str, ...], ...], ...]  # per group, per entry: its sentences
    index: Tensor  # int64 [groups, classes]: a class's entry in each group; seen classes only

    @classmethod
    def of(cls, manifest: BoundManifest) -> "Words":
        seen = [kind for kind in manifest.classes if kind.is_seen]
        shapes, materials = (sorted({getattr(kind, name) for kind in seen}) for name in ("shape", "material"))
        groups = (
            tuple(kind.prompts for kind in seen),
            tuple(tuple(prompt.format(word) for prompt in SHAPE_PROMPTS) for word in shapes),
            tuple(tuple(prompt.format(word) for prompt in MATERIAL_PROMPTS) for word in materials),
        )
        words = [(shapes.index(kind.shape), materials.index(kind.material)) for kind in seen]
        return cls(groups, torch.tensor([[index, *pair] for index, pair in enumerate(words)]).T.contiguous())

    def draw(self, generator: torch.Generator) -> list[list[str]]:
        """One sentence of each entry of each group."""

        def pick(sentences: Sequence[str]) -> str:
            return sentences[int(torch.randint(len(sentences), (), generator=generator, device=generator.device))]

        return [[pick(sentences) for sentences in group] for group in self.groups]


class BindingLoss:
    """The loss step handed to the training loop; the mean over modalities."""

    def __init__(self, config: BindingConfig, words: Words) -> None:
        self._config, self._words = config, words

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator) -> LossTerms:
        config, labels = self._config, batch[LABEL]
        anchors = [model.text.embed_sentences(sentences) for sentences in self._words.draw(generator)]
        index = self._words.index.to(labels.device)
        embeddings = {
            name: model.encoder(name).embed(augment(name, batch[name], generator)) for name in config.modalities
        }
        image, scale, total, metrics = embeddings["image"], config.trunk.logit_scale, 0.0, {}
        classmates = labels if config.mask_same_class else None
        for name, embedding in embeddings.items():
            loss = 0.0
            for group, centers in enumerate(anchors):
                logits = scale * embedding @ centers.T
                entropy = F.cross_entropy(logits, index[group][labels], label_smoothing=config.label_smoothing, reduction="sum")
                loss = loss + (1.0 if group == 0 else config.word_weight) * entropy
                if group == 0:
                    metrics[f"accuracy_{name}"] = (logits.argmax(-1) == labels).float().mean()
            if name != "image" and config.image_weight:
                loss = loss + config.image_weight * info_nce(embedding, image, scale, classmates)
            total = total + loss
        return LossTerms(total / len(embeddings), float(len(labels)), metrics)


def info_nce(first: Tensor, second: Tensor, scale: float, labels: Tensor | None = None) -> Tensor:
    """Both directions of InfoNCE between pairs of unit vectors [B, D], summed over the batch and halved. With `labels` [B]
    samples of one class are no negatives of each other."""
    logits = scale * first @ second.T
    if labels is not None:
        same = labels[:, None] == labels[None]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target, reduction="sum") + F.cross_entropy(logits.T, target, reduction="sum")) / 2


def train_bind(config: BindingConfig) -> Path:
    """Train as configured; the folder of the last checkpoint's model. Raises what `multimodal.training.train` raises."""
    corpus, run = config.corpus.expanduser(), config.output_dir.expanduser()
    manifest = read_manifest(corpus)
    samples, validation = BoundSamples(corpus, TRAIN), BoundSamples(corpus, VALIDATION)
    words = Words.of(manifest)
    sentences = [sentence for group in words.groups for entry in group for sentence in entry]
    sentences += [prompt for kind in manifest.classes for prompt in kind.prompts]
    tokenizer = train_tokenizer(sentences, 512, "word")
    bind = BindConfig({name: manifest.shapes[name] for name in config.modalities}, config.trunk)
    provenance = {"corpus": dict(manifest.source), "training": asdict(config.training), "rows": dict(manifest.rows)}
    assets = BoundAssets(bind, tokenizer, manifest.classes, provenance)
    torch.manual_seed(config.training.seed)
    model = BoundModel(bind, tokenizer)
    measure(model, samples)
    print(
        f"{len(bind.shapes)} trunks of {count_parameters(model.encoder('image')) / 1e6:.2f} M parameters, text "
        f"{count_parameters(model.text) / 1e6:.2f} M, in all {count_parameters(model) / 1e6:.2f} M; {len(samples)} samples"
    )

    def batch(index: int) -> dict[str, Tensor]:
        return samples.batch(index, size=config.training.batch_size, seed=config.training.seed, modalities=config.modalities)

    def on_checkpoint(folder: Path, step: int) -> dict[str, float]:
        bound = load_bound(folder / "policy")
        return accuracies(bound.model, validation)

    last = train(
        model, BindingLoss(config, words), batch, config.training, run,
        save_model=assets.save, on_checkpoint=on_checkpoint, resume=config.resume,
    )  # fmt: skip
    return last / "policy"


def measure(model: BoundModel, samples: BoundSamples) -> None:
    """Set what standardises each sensor from the first training samples' values."""
    index = torch.linspace(0, len(samples) - 1, min(MEASURED, len(samples))).long()
    for name, trunk in model.trunks.items():
        with torch.no_grad():
            trunk.patches.standardise.measure(trunk.patches.features(samples.inputs(name, index)))


@torch.no_grad()
def accuracies(
    model: BoundModel, samples: BoundSamples, classes: Sequence[int] | None = None, batch: int = 128
) -> dict[str, float]:
    """Share of samples whose own center is nearest, per modality.

    classes: what is chosen among; none: those that the split has.
    """
    device = next(model.parameters()).device
    chosen = sorted(set(samples.labels.tolist())) if classes is None else list(classes)
    centers = build_centers([samples.manifest.classes[index] for index in chosen], model.text.embed_sentences)
    target = torch.tensor([chosen.index(label) for label in samples.labels.tolist()])
    shares = {}
    for name in model.trunks:
        found = []
        for first in range(0, len(samples), batch):
            inputs = samples.inputs(name, slice(first, first + batch)).to(device)
            found.append(centers.scores(model.encoder(name).embed(inputs)).argmax(-1).cpu())
        shares[name] = float((torch.cat(found) == target).float().mean())
    return shares


def run(config: BindingConfig) -> int:
    """`vla train-bind`."""
    folder = train_bind(config)
    bound = load_bound(folder)
    for split, classes in ((VALIDATION, None), (UNSEEN, None)):
        shares = accuracies(bound.model, BoundSamples(config.corpus, split), classes)
        print(f"{split}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))
    print(f"model: {folder}")
    return 0
