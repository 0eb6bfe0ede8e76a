"""How well a model answers: bits per token and exactly right answers, on every text of a split.

An answer is exact if greedy decoding would give it token by token. That needs no decoding: greedy decoding gives the right
answer if and only if each right token is the likeliest one after the right tokens before it, which one pass tells.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.attention import prefix_mask
from multimodal.data import IGNORED, SceneTexts, TextRows
from multimodal.decoder import arange_positions
from multimodal.images import ImageConfig, prepare_images
from multimodal.packed_texts import PackedTexts
from multimodal.vlm import VLM

LN2 = 0.6931471805599453


def text_hidden(model: VLM, images: Tensor, ids: Tensor, segment: Tensor, position: Tensor) -> Tensor:
    """Hidden states of packed texts after their images, [R, T, width].

    images: float [R, C, 3, h, w], prepared. ids, segment, position: int64 [R, T], see multimodal.data. Image tokens stand at
    positions 0 .. P - 1 and see each other; a text stands at P, P + 1, ... and sees the images and its own past. Image
    tokens never see text, so they are encoded once, whatever is asked of them.
    """
    embeddings = model.embed_images(images)
    rows, prefix = embeddings.shape[:2]
    cache = model.decoder.new_cache()
    model.decoder.fill(embeddings, None, arange_positions(rows, 0, prefix, embeddings.device), cache)
    texts = PackedTexts(segment, prefix)
    told, places = (texts.pad(values.flatten()[texts.places])[None] for values in (ids, prefix + position))
    hidden = model.decoder(model.embed_text(told), texts, places, cache.joined())[0, : len(texts.places)]
    spread = hidden.new_zeros(ids.numel(), hidden.shape[-1]).index_copy(0, texts.places, hidden)
    return spread.view(*ids.shape, -1)


def text_hidden_reference(model: VLM, images: Tensor, ids: Tensor) -> Tensor:
    """The definition: one text per row, ids [R, T], one pass over images and text under a prefix mask. [R, T, width]"""
    embeddings = torch.cat([model.embed_images(images), model.embed_text(ids)], dim=1)
    prefix, length = embeddings.shape[1] - ids.shape[1], embeddings.shape[1]
    mask = prefix_mask(prefix, length, ids.device)
    return model.decoder(embeddings, mask, arange_positions(len(ids), 0, length, ids.device))[:, prefix:]


@dataclass
class Tally:
    """Sums over the texts of one group."""

    texts: int = 0
    tokens: int = 0
    nats: float = 0.0
    asked: int = 0  # texts with one right answer
    right: int = 0

    @property
    def bits_per_token(self) -> float:
        return self.nats / self.tokens / LN2

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


@torch.inference_mode()
def tally_answers(
    model: VLM,
    scenes: SceneTexts,
    images: ImageConfig,
    *,
    texts_per_row: int = 6,
    rows: int = 8,
    swap_images: bool = False,
) -> dict[tuple[str, ...], Tally]:
    """Sums per group of texts. A text counts in ("all",), (half,), (half, kind), (half, family) and ("layout", old or new).

    swap_images: show each row the images of the scene half the split away; what is still right was guessed.
    """
    model.eval()
    device = next(model.parameters()).device
    tallies: dict[tuple[str, ...], Tally] = defaultdict(Tally)
    for chosen, batch in scenes.every(texts_per_row, rows):
        if swap_images:
            other = [(scene + len(scenes) // 2) % len(scenes) for scene, _ in chosen]
            batch = batch._replace(images=torch.stack([scenes.image(scene) for scene in other]))
        nats, is_right = score(model, TextRows(*(column.to(device) for column in batch)), images)
        for row, (scene, texts) in enumerate(chosen):
            for number, index in enumerate(texts):
                own = (batch.segment[row] == number) & (batch.targets[row] != IGNORED)
                text = scenes.texts[scene][index]
                groups = {("all",), (text.half,), (text.half, text.kind), (text.half, text.family)}
                groups.add(("layout", "new" if scenes.is_new_layout[scene] else "old"))
                for group in groups:
                    tally = tallies[group]
                    tally.texts += 1
                    tally.tokens += int(own.sum())
                    tally.nats += float(nats[row][own].sum())
                    tally.asked += text.is_exact
                    tally.right += text.is_exact and bool(is_right[row][own].all())
    return dict(tallies)


def score(model: VLM, batch: TextRows, images: ImageConfig) -> tuple[Tensor, Tensor]:
    """Per position, on the CPU: nats [R, T] of the target and whether it is the likeliest id [R, T]; 0, False elsewhere.

    Hidden states are computed in the caller's precision (autocast or not), logits always in float32.
    """
    hidden = text_hidden(model, prepare_images(batch.images, images), batch.ids, batch.segment, batch.position)
    told = batch.targets != IGNORED
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[told].float() @ model.text_embedding.weight.float().T  # [n, V]
    targets = batch.targets[told]
    nats = torch.zeros(batch.targets.shape, device=logits.device)
    nats[told] = torch.logsumexp(logits, dim=1) - logits.gather(1, targets[:, None])[:, 0]
    is_right = torch.zeros(batch.targets.shape, dtype=torch.bool, device=logits.device)
    is_right[told] = logits.argmax(dim=1) == targets
    return nats.cpu(), is_right.cpu()


def summary(tallies: dict[tuple[str, ...], Tally], names: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, float]:
    """Scalars to log: for each (name, group) bits per token, and accuracy where the group has questions."""
    values: dict[str, float] = {}
    for name, group in names:
        tally = tallies.get(group)
        if tally is not None and tally.tokens:
            values[f"bits_{name}"] = tally.bits_per_token
        if tally is not None and tally.asked:
            values[f"exact_{name}"] = tally.accuracy
    return values
