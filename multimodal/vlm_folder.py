"""A vision-language model by its folder, whoever made it: `vla train-vlm`, or a published layout of multimodal/pretrained."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.config import ImageConfig, VLMConfig
from multimodal.dialogue import encode_dialogue
from multimodal.images import prepare_images, scale_frame
from multimodal.prompt import PromptConfig
from multimodal.questions import encode_question, end_id
from multimodal.tokenizer import TextTokenizer
from multimodal.vlm import VLM


@dataclass(frozen=True)
class AskableVLM:
    """What it takes to ask a model something."""

    model: VLM  # in eval mode
    tokenizer: TextTokenizer
    images: ImageConfig
    frame_size: int  # pixels; the shorter side of an image is scaled to it before `images` prepares it
    eos_ids: tuple[int, ...]
    prompt: PromptConfig | None  # of a published model; None: multimodal/dialogue.py
    provenance: dict[str, Any]
    content_hash: str  # of the folder

    def encode(self, question: str, num_images: int = 0) -> list[int]:
        """Ids of a prompt, an image marked by the model's own id if it has one; `VLM.expand_prompt` comes next."""
        return encode_question(self.tokenizer, question, num_images, self.model.config.image_token_id)

    def encode_turns(self, turns: Sequence[tuple[str, str]], num_images: int = 0) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue and which of them are answers; of a published model, whose prompt holds one question, its first."""
        if self.prompt is None:
            return encode_dialogue(self.tokenizer, turns)
        asked = self.encode(turns[0][0], num_images)
        told = [*self.tokenizer.encode_plain(turns[0][1]), *self.eos_ids[:1]]
        return [*asked, *told], [False] * len(asked) + [True] * len(told)

    def prepare(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> float32 [N, 3, h, w] in the tower's range."""
        frames = [scale_frame(torch.as_tensor(np.ascontiguousarray(image)), self.frame_size) for image in images]
        size = self.images.output_size
        prepared = [prepare_images(frame, self.images) for frame in frames]
        return torch.stack(prepared) if prepared else torch.zeros(0, 3, size, size)

    @property
    def places(self) -> int | None:
        """Images that a sequence may hold; None: any number."""
        return most_images(self.model)


def check_answers(config: VLMConfig) -> None:
    """Raise ValueError naming the settings that neither the answer engine nor the ONNX graphs have a cache for."""
    reasons = {
        "positions on a grid (DecoderConfig.positions 'mrotary', Qwen2-VL)": config.decoder.positions == "mrotary",
        "prompts that see themselves whole (VLMConfig.bidirectional_prompt, PaliGemma)": config.bidirectional_prompt,
        "a sliding window (DecoderConfig.sliding_window)": config.decoder.sliding_window is not None,
    }
    found = [name for name, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"the model has {' and '.join(found)}, for which the answer engine and the ONNX graphs have no cache. Read it with "
            "multimodal.sequences, or take a model whose prompt is causal: SmolVLM, LLaVA, Llama, Qwen2, Qwen3, or one of "
            "`vla train-vlm`."
        )


def most_images(vlm: VLM) -> int | None:
    """Images that a sequence may hold: none without a tower, the cameras of a model that marks their places, or any number."""
    if vlm.config.vision is None:
        return 0
    return vlm.config.num_cameras if vlm.config.image_positions else None


def open_vlm(path: str | Path, *, dtype: torch.dtype = torch.float32) -> AskableVLM:
    """The model of a checkpoint folder of `vla train-vlm`, of a published model's folder, or of a Hub repository.

    dtype: a published model's weights are read in; one of ours comes in float32. Raises FileNotFoundError, OSError or
    ValueError saying what is wrong with it.
    """
    folder = Path(path).expanduser()
    if (folder / "language.onnx").is_file():
        raise ValueError(f"{folder} is an exported model, which answers without torch: vla ask --vlm={folder} --prompt=...")
    is_published = (folder / "config.json").is_file() or not folder.exists() and is_hub_name(str(path))
    return open_published(path, dtype) if is_published else open_trained(folder)


def is_hub_name(name: str) -> bool:
    """owner/name, with no folder `owner` here."""
    from multimodal.pretrained.source import is_repository

    return is_repository(name) and not Path(name).parent.is_dir()


def open_trained(folder: Path) -> AskableVLM:
    """See `open_vlm`."""
    from multimodal.vlm_checkpoint import load_vlm

    loaded = load_vlm(folder)
    assets = loaded.assets
    return AskableVLM(
        model=loaded.model,
        tokenizer=assets.tokenizer,
        images=assets.images,
        frame_size=assets.image_size,
        eos_ids=(end_id(assets.tokenizer),),
        prompt=None,
        provenance=assets.provenance,
        content_hash=loaded.content_hash,
    )


def open_published(path: str | Path, dtype: torch.dtype) -> AskableVLM:
    """See `open_vlm`. One tile per image: it is scaled to the tower's size and its centre is taken."""
    from multimodal.pretrained.load import fingerprint, load_published

    published = load_published(path, dtype=dtype)
    tokenizer = published.tokenizer()
    vision = published.vlm.config.vision
    size = 224 if vision is None else vision.image_size
    images = ImageConfig(crop=size, brightness=0.0, contrast=0.0, saturation=0.0, mean=published.mean, std=published.std)
    return AskableVLM(
        model=published.vlm,
        tokenizer=tokenizer,
        images=images,
        frame_size=size,
        eos_ids=published_ends(published.folder, published.raw),
        prompt=tokenizer.prompt,
        provenance={"published": published.family},
        content_hash=fingerprint(published.folder),
    )


def published_ends(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, or else those of the model's or the text model's settings."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    for settings in (generation, raw, raw.get("text_config") or {}):
        ends = settings.get("eos_token_id")
        if ends is not None:
            return tuple(ends) if isinstance(ends, Sequence) else (int(ends),)
    return ()
