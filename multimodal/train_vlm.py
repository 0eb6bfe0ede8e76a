"""Corpus -> vision-language model: its loss step and batches on multimodal.training (`vla train-vlm`).

The contract between training and generation:

- The sequence is all image tokens, camera by camera, then `<bos>` and the text (multimodal/dialogue.py). Image tokens stand
  at positions 0 .. P - 1 and see each other; text stands at P, P + 1, ... and sees the images and its own past.
- Text is causal, questions included: so a cache grows by plain appending over several turns, a draft tree needs no other
  mask, and the image tokens, which see no text, are encoded once per image and not once per question.
- Logits are hidden . text embedding, the head being tied, without scale or bias; `<answer>` ends a prompt, `<eos>` an answer.
- Only answers are supervised, each answer's `<eos>` included.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from multimodal.answering import summary, tally_answers, text_hidden
from multimodal.config import get_preset
from multimodal.corpus_file import HELD_OUT, TRAIN, Manifest, read_manifest, read_scenes, split_files
from multimodal.data import SceneTexts, TextRows
from multimodal.decoder import EMBEDDING_STD, count_parameters
from multimodal.dialogue import SPECIAL_TOKENS
from multimodal.images import ImageConfig, prepare_images
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.tokenizer import TextTokenizer, train_tokenizer
from multimodal.training import LossTerms, TrainingConfig, train
from multimodal.vlm import VLM
from multimodal.vlm_checkpoint import VLMAssets, load_vlm

TOKENIZER = "tokenizer.json"  # in the run folder: made once, so that a resumed run has the same ids
SCORES = (
    ("seen_templates", ("training",)),
    ("new_templates", ("held_out",)),
    ("old_layouts", ("layout", "old")),
    ("new_layouts", ("layout", "new")),
)


@dataclass(frozen=True)
class VLMModelConfig:
    """The backbone by preset, and its vocabulary."""

    preset: str = "desk-vlm"  # see multimodal/config.py
    vocab_size: int = 8192  # ids of the BPE that is trained on the corpus and, for what it lacks, on general English
    pretrained: str | None = None  # weights of the image tower, see VisionConfig


@dataclass(frozen=True)
class TrainVLMConfig:
    """Settings of `vla train-vlm`."""

    corpus: Path  # made by `vla corpus`
    output_dir: Path  # run folder
    model: VLMModelConfig = field(default_factory=VLMModelConfig)
    images: ImageConfig = field(default_factory=lambda: ImageConfig(crop=120, size=112))
    texts_per_scene: int = 4  # texts of a row, which share the cost of its images; divides training.batch_size
    length_power: float = 0.5  # an answer of n ids weighs n^(1 - p): 0 lets captions rule, 1 weighs answers alike
    held_out_scenes: int = 60  # of the corpus's, evenly spaced, scored at each checkpoint
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=4000, batch_size=32, learning_rate=1e-3, warmup_steps=200)
    )
    resume: bool = False  # continue from the last checkpoint in output_dir

    def __post_init__(self) -> None:
        if self.training.batch_size % self.texts_per_scene:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} texts are not a multiple of texts_per_scene "
                f"{self.texts_per_scene}; change one of them."
            )


class AnswerLoss:
    """The loss step handed to the training loop."""

    def __init__(self, images: ImageConfig) -> None:
        self._images = images

    def __call__(self, model: nn.Module, batch: TextRows, generator: torch.Generator) -> LossTerms:
        images = prepare_images(batch.images, self._images, generator)
        hidden = text_hidden(model, images, batch.ids, batch.segment, batch.position)
        loss = linear_cross_entropy(
            hidden, model.text_embedding.weight, batch.targets, token_weight=batch.weight, reduction="sum"
        )
        return LossTerms(loss, batch.weight.sum())


def build_vlm(assets: VLMAssets) -> VLM:
    """A fresh model whose first logits are of order one.

    The tied head would make them of order EMBEDDING_STD * sqrt(width), and the loss an order of magnitude too large;
    the final norm's scale takes that off, and is free to grow back.
    """
    model = VLM(assets.config)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(1 / (EMBEDDING_STD * assets.config.decoder.hidden_size**0.5))
    return model


def train_vlm(config: TrainVLMConfig) -> Path:
    """Train as configured; the folder of the last checkpoint's model. Raises what `multimodal.training.train` raises."""
    corpus, run = config.corpus.expanduser(), config.output_dir.expanduser()
    manifest = read_manifest(corpus)
    check_crop(config.images, manifest)
    tokenizer = load_or_train_tokenizer(run / TOKENIZER, corpus, config.model.vocab_size)
    scenes = SceneTexts(corpus, TRAIN, tokenizer)
    held_out = SceneTexts(corpus, HELD_OUT, tokenizer, limit=config.held_out_scenes)
    assets = build_assets(config, manifest, tokenizer)
    torch.manual_seed(config.training.seed)
    model = build_vlm(assets)
    print(
        f"{config.model.preset}: {count_parameters(model) / 1e6:.1f} M parameters (image tower "
        f"{count_parameters(model.vision) / 1e6:.1f} M, vocabulary {tokenizer.vocab_size}); {len(scenes)} scenes, "
        f"{sum(map(len, scenes.texts))} texts"
    )
    rows = config.training.batch_size // config.texts_per_scene

    def batch(index: int) -> TextRows:
        return scenes.batch(
            index,
            scenes=rows,
            texts_per_scene=config.texts_per_scene,
            seed=config.training.seed,
            length_power=config.length_power,
        )

    def on_checkpoint(folder: Path, step: int) -> dict[str, float]:
        """Bits per token and exact answers of the weights just saved, and exact answers to other scenes' images.

        In the precision of training; float32 products cost a CPU with bfloat16 instructions several times as much.
        """
        device = next(model.parameters()).device
        saved = load_vlm(folder / "policy", device=str(device)).model
        with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
            scores = summary(tally_answers(saved, held_out, config.images), SCORES)
            blind = summary(tally_answers(saved, held_out, config.images, swap_images=True), SCORES[:1])
        return scores | {f"{name}_wrong_images": value for name, value in blind.items()}

    last = train(
        model, AnswerLoss(config.images), batch, config.training, run,
        save_model=assets.save, on_checkpoint=on_checkpoint, resume=config.resume,
    )  # fmt: skip
    return last / "policy"


def build_assets(config: TrainVLMConfig, manifest: Manifest, tokenizer: TextTokenizer) -> VLMAssets:
    preset = get_preset(config.model.preset)
    vision = replace(preset.vision, image_size=config.images.output_size, pretrained=config.model.pretrained)
    vlm = replace(preset, vision=vision, vocab_size=tokenizer.vocab_size, num_cameras=len(manifest.cameras))
    provenance = {
        "corpus": dict(manifest.source),
        "seed": config.training.seed,
        "training": asdict(config.training),
        "texts_per_scene": config.texts_per_scene,
        "length_power": config.length_power,
    }
    return VLMAssets(vlm, tokenizer, config.images, manifest.cameras, manifest.image_size, provenance)


def check_crop(images: ImageConfig, manifest: Manifest) -> None:
    """Raise ValueError if a crop could cut off what the texts tell of."""
    if manifest.image_size - images.crop > manifest.rim:
        raise ValueError(
            f"images.crop {images.crop} of {manifest.image_size} pixels may cut off more than the corpus's rim of "
            f"{manifest.rim}, which its texts leave out. Set it to {manifest.image_size - manifest.rim} or more, and "
            "images.size to what the tower takes."
        )


def load_or_train_tokenizer(path: Path, corpus: Path, vocab_size: int) -> TextTokenizer:
    """The run's tokenizer; learnt from the corpus's training texts and general English where the run has none yet.

    The corpus has a few thousand words. The rest of the ids go to what else English has, so that a user's words are not
    spelt letter by letter, and so that most of the head is idle on the task, as in any large model.
    """
    if path.exists():
        return TextTokenizer.from_json(path.read_text())
    tokenizer = train_tokenizer([*corpus_words(corpus), *general_english()], vocab_size, "bpe", SPECIAL_TOKENS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.to_json())
    return tokenizer


def corpus_words(corpus: Path) -> Iterator[str]:
    """Every question and answer of the training scenes."""
    for path in split_files(corpus, TRAIN):
        for scene in read_scenes(path, images=False, truth=False):
            for text in scene.texts:
                for turn in text.turns:
                    yield from turn


def general_english() -> Iterator[str]:
    """Half a megabyte of prose that every Python brings along: its language reference."""
    from pydoc_data.topics import topics

    for topic in topics.values():
        yield from topic.split("\n\n")


def run(config: TrainVLMConfig) -> int:
    """`vla train-vlm`."""
    folder = train_vlm(config)
    print(f"model: {folder}")
    return 0
