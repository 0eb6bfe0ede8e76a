"""Online-logit distillation: the target runs on the batch, the draft learns its features and its law, several drafted tokens
deep.

Loss of a supervised position (EAGLE, arXiv 2401.15077; online teacher: SpecVLM, arXiv 2509.11815): 0.1 * soft cross-entropy to
the target's law + 1.0 * Smooth L1 to its feature. At inference the second drafted token stands on the draft's own estimate of a
feature, so the loss is rolled out: step s reads the features that step s - 1 estimated, weighted 0.8^(s - 1) (the training-time
test of EAGLE-3, arXiv 2503.01840). Features of the first step carry uniform noise, as in EAGLE.

Noise and Smooth L1 have a scale of their own, and the recipe's is that of features of order one. The final norm of a VLM of
ours starts at 0.11 (multimodal.train_vlm.build_vlm): there the noise would drown the feature, and Smooth L1 vanish beside the
cross-entropy. So both are in units of the features' rms over the batch, which is a function of batch and target alone:
nothing to store, and a resumed run measures the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.attention import KVCache, causal_mask
from multimodal.kernels.distillation import linear_distillation
from multimodal.training import LossTerms
from multimodal.vlm import IMAGE
from serve.draft_model import DraftModel, prompt_entries
from serve.image_cache import ImageCache, image_key
from serve.target import Target


@dataclass(frozen=True)
class Dialogue:
    """Questions about some images and their answers, as ids."""

    images: tuple[np.ndarray, ...]  # uint8 [H, W, 3]
    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]  # of each id; an answer's end id is part of it


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of the loss, and what is drawn at random while training."""

    soft_weight: float = 0.1  # of the soft cross-entropy
    feature_weight: float = 1.0  # of the Smooth L1
    rollout: int = 3  # drafted tokens deep, 1 .. 3 pay
    rollout_decay: float = 0.8
    feature_noise: float = 0.2  # uniform in +- half of this * 512 / length * the features' rms
    gate_share: float = 0.5  # of batches in which the gate picks; the others train one branch drawn at random

    def __post_init__(self) -> None:
        if self.rollout < 1:
            raise ValueError(f"DistillationConfig.rollout is {self.rollout}; it must be at least 1.")


@dataclass(frozen=True)
class Lesson:
    """What the target gives for a batch, padded on the right to T positions."""

    ids: list[list[int]]  # expanded
    is_answer: Tensor  # bool [B, T], expanded likewise
    embeddings: Tensor  # [B, T, width]
    features: Tensor  # [B, T, width]
    images: list[Tensor]  # of each dialogue [N, P, width], place marked

    @cached_property
    def unit(self) -> float:
        """Root mean square of the features, padding left out."""
        known = torch.cat([row[: len(ids)] for row, ids in zip(self.features, self.ids, strict=True)])
        return float(known.double().square().mean().sqrt())


class Teacher:
    """The frozen target on dialogues; images are encoded once while the cache holds them."""

    def __init__(self, target: Target, image_cache_bytes: int = 2**30) -> None:
        self.target = target
        self.vlm = target.vlm.eval().requires_grad_(False)
        self._cache = ImageCache(image_cache_bytes)

    @torch.no_grad()
    def __call__(self, dialogues: Sequence[Dialogue]) -> Lesson:
        vlm = self.vlm
        ids = [vlm.expand_prompt(dialogue.ids, len(dialogue.images)) for dialogue in dialogues]
        longest = max(map(len, ids))
        is_answer = torch.zeros(len(ids), longest, dtype=torch.bool)
        for row, (expanded, dialogue) in enumerate(zip(ids, dialogues, strict=True)):
            pairs = zip(dialogue.ids, dialogue.is_answer, strict=True)
            text = [told for token, told in pairs if token != vlm.config.image_token_id]
            is_answer[row, : len(expanded)].masked_scatter_(torch.tensor(expanded) != IMAGE, torch.tensor(text))
        features = [self._features(dialogue) for dialogue in dialogues]
        rows = []
        for row, found in zip(ids, features, strict=True):
            embedded = vlm.embed_prompt(row, found)
            rows.append(torch.cat([embedded, embedded.new_zeros(longest - len(row), embedded.shape[1])]))
        embeddings = torch.stack(rows)
        images = [embeddings[:0, :0] if found is None else vlm.place_images(found) for found in features]
        features = vlm.hidden(embeddings, ids).to(embeddings.dtype)
        return Lesson(ids, is_answer.to(embeddings.device), embeddings, features, images)

    def _features(self, dialogue: Dialogue) -> Tensor | None:
        found = []
        for image in dialogue.images:
            key = image_key(image)
            features = self._cache.get(key)
            if features is None:
                features = self.vlm.image_features(self.target.prepare_all([image]))[0]
                self._cache.put(key, features)
            found.append(features)
        return torch.stack(found) if found else None


class DistillationLoss:
    """The loss step handed to the training loop; the model is a DraftModel."""

    def __init__(self, teacher: Teacher, config: DistillationConfig) -> None:
        self.teacher, self.config = teacher, config

    def __call__(self, model: nn.Module, batch: Sequence[Dialogue], generator: torch.Generator) -> LossTerms:
        config, vlm = self.config, self.teacher.vlm
        lesson = self.teacher(batch)
        entries = self._entries(model, lesson, generator)
        steps = self._rollout(model, entries)
        weight, unit = model.head_weight(vlm), lesson.unit
        scale = vlm.config.logit_scale * unit  # logits are scale * weight @ (feature / unit)
        loss, metrics = torch.zeros((), device=weight.device), {}
        for step, (estimated, valid) in enumerate(zip(steps, entries.supervised(config.rollout), strict=True)):
            loss = loss + config.rollout_decay**step * linear_distillation(
                estimated.to(weight.dtype) / unit, weight, entries.features / unit, weight, divergence="soft_cross_entropy",
                temperature=1 / scale, divergence_weight=config.soft_weight * scale**2,  # the kernel multiplies by T^2
                feature_weight=config.feature_weight, valid=valid, reduction="sum",
            )  # fmt: skip
            metrics[f"agreement_{step + 1}"] = agreement(estimated, entries.features, valid, weight)
        count = max(1, int(entries.supervised(1)[0].sum()))
        if entries.gate is not None:
            penalty = model.compressor.gate_loss(entries.gate)
            loss = loss + penalty * count
        return LossTerms(loss, count, metrics)

    def _entries(self, model: DraftModel, lesson: Lesson, generator: torch.Generator) -> "_Entries":
        """Everything that enters the draft, padded to T' entries."""
        compressed, gate = self._compress(model, lesson, generator)
        rows = []
        for row, ids in enumerate(lesson.ids):
            known = lesson.features[row, : len(ids)]
            noise = torch.rand(known.shape, generator=generator, device=generator.device).to(known) - 0.5
            noisy = known + noise * (self.config.feature_noise * 512 / len(ids) * lesson.unit)
            rows.append(prompt_entries(model, ids, lesson.embeddings[row, : len(ids)], noisy, compressed[row]))
        longest = max(len(row.inputs) for row in rows)
        positions = torch.stack([_padded(row.positions, longest) for row in rows])
        is_text = torch.stack([_padded(row.is_text, longest) for row in rows])
        run = run_lengths(lesson.is_answer).gather(1, positions).masked_fill(~is_text, 0)
        goes_on = torch.cat([lesson.is_answer[:, 1:], torch.zeros_like(lesson.is_answer[:, :1])], dim=1).gather(1, positions)
        index = positions[..., None].expand(-1, -1, lesson.features.shape[-1])
        return _Entries(
            inputs=torch.stack([_padded(row.inputs, longest) for row in rows]),
            positions=positions,
            answer_tokens=run.masked_fill(~goes_on, 0),
            embeddings=lesson.embeddings.gather(1, index),
            features=lesson.features.gather(1, index),
            gate=gate,
        )

    def _compress(
        self, model: DraftModel, lesson: Lesson, generator: torch.Generator
    ) -> tuple[list[list[Tensor] | None], Tensor | None]:
        """Compressed tokens of each dialogue's images, and the gate's probabilities if it chose."""
        counts = [len(images) for images in lesson.images]
        if sum(counts) == 0:
            return [None] * len(counts), None
        images = torch.cat([images for images in lesson.images if len(images)])
        ends = lesson.features[torch.arange(len(counts)), lesson.is_answer.int().argmax(1) - 1]  # where the first answer begins
        question = torch.stack([end for end, count in zip(ends, counts, strict=True) for _ in range(count)])
        seeds = torch.randint(2**31, (len(images),), generator=generator, device=generator.device).tolist()
        branch, branches = None, model.compressor.branches
        if model.config.compressor.mode == "select":
            draw = float(torch.rand((), generator=generator, device=generator.device))
            if draw >= self.config.gate_share:
                branch = branches[int((draw - self.config.gate_share) / (1 - self.config.gate_share) * len(branches))]
        compressed = model.compress(images, question, seeds, branch=branch, generator=generator)
        tokens = iter(compressed.tokens)
        return [[next(tokens) for _ in range(count)] if count else None for count in counts], compressed.gate

    def _rollout(self, model: DraftModel, entries: "_Entries") -> list[Tensor]:
        """Estimated features [B, T', width] of each step."""
        cache, length = model.decoder.new_cache(), entries.positions.shape[1]
        inputs, steps = entries.inputs, []
        for step in range(self.config.rollout):
            mask = rollout_mask(step, length, inputs.device)
            steps.append(model.decoder(inputs, mask, entries.positions, cache))
            before = torch.cat([steps[-1].new_zeros(len(inputs), 1, inputs.shape[-1]), steps[-1][:, :-1]], dim=1)
            inputs = model.enter(entries.embeddings, before.to(entries.embeddings.dtype))
        return steps


@dataclass(frozen=True)
class _Entries:
    inputs: Tensor  # [B, T', width]
    positions: Tensor  # [B, T']
    answer_tokens: Tensor  # int64 [B, T']: answer tokens in a row up to here, 0 where the next token is none of the answer
    embeddings: Tensor  # [B, T', width] of the token at the entry
    features: Tensor  # [B, T', width]: the target's, which the entry's output estimates
    gate: Tensor | None

    def supervised(self, rollout: int) -> list[Tensor]:
        """bool [B, T'] for each step: as in drafting, the root and the s tokens on estimates before are of the same answer."""
        return [self.answer_tokens > step for step in range(rollout)]


def rollout_mask(step: int, length: int, device: torch.device | None = None) -> Tensor:
    """What entry e of rollout step `step` sees among the entries of steps 0 .. step: [length, (step + 1) * length].

    As in drafting: the true entries up to e - step, then the drafted ones that lead to e, one of each step, and itself.
    """
    parts = [causal_mask(length, length, device).tril(-step)]
    for later in range(1, step + 1):
        parts.append(torch.eye(length, dtype=torch.bool, device=device).roll(step - later, 0).tril(later - step))
    return torch.cat(parts, dim=1)


def run_lengths(flags: Tensor) -> Tensor:
    """How many True stand in a row up to each place: bool [B, T] -> int64 [B, T]."""
    places = torch.arange(1, flags.shape[1] + 1, device=flags.device).expand_as(flags)
    last_false = places.masked_fill(flags, 0).cummax(1).values
    return (places - last_false) * flags


@torch.no_grad()
def agreement(estimated: Tensor, features: Tensor, valid: Tensor, weight: Tensor, most: int = 64) -> Tensor:
    """Share of (up to `most`) supervised positions where draft and target find the same token likeliest."""
    mine, theirs = estimated[valid][:most].to(weight.dtype), features[valid][:most]
    if len(mine) == 0:
        return torch.zeros(())
    return ((mine @ weight.T).argmax(-1) == (theirs @ weight.T).argmax(-1)).float().mean()


def _padded(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
