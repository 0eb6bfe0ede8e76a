"""VLA = vision-language model + action slots: encode the prefix once, run only the slots in every round.

The prefix (images, state, text) never sees the actions, in training as in inference, so its key/value cache is exact
and a chunk costs P + T * L token passes instead of T * (P + L).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.attention import KVCache, causal_mask, key_padding_mask
from multimodal.compressor import ALIKE, KEEP_ALL, CompressorConfig, VisualCompressor
from multimodal.config import VLMConfig, check_choice
from multimodal.decoder import arange_positions, initialise
from multimodal.prompt import PromptConfig
from multimodal.sequences import segment_positions
from multimodal.vlm import VLM
from vla.step_slots import StepSlots

SLOTS = ("tokens", "steps")


@dataclass(frozen=True)
class VLAConfig:
    """Everything that decides parameter shapes. Ids 0 .. num_action_ids - 1 can be predicted; the next one is the mask."""

    vlm: VLMConfig = field(default_factory=VLMConfig)
    state_dim: int = 8
    text_length: int = 16  # instruction ids, padded to this
    action_horizon: int = 8
    action_dim: int = 7
    num_action_ids: int = 257
    slots: str = "tokens"  # tokens: H x D slots of one token each; steps: H slots of one action vector each
    prompt: PromptConfig = field(default_factory=PromptConfig)  # what a published backbone reads around images and instruction
    compressor: CompressorConfig = KEEP_ALL  # makes each camera's tokens fewer before the prefix is filled; lossy

    def __post_init__(self) -> None:
        check_choice("VLAConfig", "slots", self.slots, SLOTS)
        mode = self.compressor.mode
        if mode not in ALIKE:
            raise ValueError(
                f"model.compressor.mode is {mode!r}; a prefix has no question for a gate, sees something, and holds as many "
                f"tokens of every image. Allowed: {', '.join(ALIKE)}."
            )
        if mode in ("prune", "concat") and self.compressor.prune == "guided":
            raise ValueError(
                "model.compressor.prune is 'guided'; a prefix has no question whose attention would guide it. Set prune: "
                "uniform, or mode: resample, whose own queries choose what to look at."
            )

    @property
    def num_slots(self) -> int:
        """Token slots, H x D."""
        return self.action_horizon * self.action_dim

    @property
    def mask_id(self) -> int:
        return self.num_action_ids

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as YAML writes them; no compressor if it keeps all: older versions know none."""
        values = _plain(asdict(self))
        if self.compressor == KEEP_ALL:
            del values["compressor"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VLAConfig":
        """Inverse of `to_dict`. Raises TypeError on a missing or unknown field."""
        rest = {key: value for key, value in values.items() if key not in ("vlm", "prompt", "compressor")}
        prompt = PromptConfig.from_dict(values.get("prompt", {}))
        compressor = CompressorConfig(**values["compressor"]) if "compressor" in values else KEEP_ALL
        return cls(vlm=VLMConfig.from_dict(values["vlm"]), prompt=prompt, compressor=compressor, **rest)


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Prefix:
    """An encoded observation: the cache of its positions and which of them are real (not padding)."""

    cache: KVCache
    is_real: Tensor  # bool [B, P']; P' <= P, positions that are padding in every row are left out
    has_padding: bool  # some position is padding in some row

    def mask(self, num_more: int) -> Tensor | None:
        """Which of the prefix and `num_more` further positions a query may see: [B, 1, 1, P' + num_more], None = all."""
        if not self.has_padding:
            return None
        more = torch.ones(self.is_real.shape[0], num_more, dtype=torch.bool, device=self.is_real.device)
        return key_padding_mask(torch.cat([self.is_real, more], dim=1))

    def repeat(self, times: int) -> "Prefix":
        return Prefix(self.cache.repeat(times), self.is_real.repeat_interleave(times, dim=0), self.has_padding)

    def select(self, rows: Tensor) -> "Prefix":
        """Rows of the batch; the prefix itself when they are all of it, in order."""
        if rows.numel() == self.is_real.shape[0]:
            return self
        return Prefix(self.cache.select(rows), self.is_real.index_select(0, rows), self.has_padding)


class VLA(nn.Module):
    """Action slots after an encoded prefix, same-position prediction (no shift): tokens step by step, or whole steps."""

    def __init__(self, config: VLAConfig, vlm: VLM | None = None) -> None:
        """vlm: a backbone that was read already, of config.vlm (vla/backbone.py)."""
        super().__init__()
        self.config = config
        self.vlm = VLM(config.vlm) if vlm is None else vlm
        width = config.vlm.decoder.hidden_size
        self.state_projector = nn.Linear(config.state_dim, width)
        initialise(self.state_projector)
        if config.slots == "steps":
            self.step_slots = StepSlots(config.action_horizon, config.action_dim, width)
        else:
            self.action_embedding = nn.Embedding(config.num_action_ids + 1, width)  # the last row is the trainable mask
            self.step_embedding = nn.Embedding(config.action_horizon, width)
            self.dim_embedding = nn.Embedding(config.action_dim, width)
            self.action_head = nn.Linear(width, config.num_action_ids, bias=False)
            for module in (self.action_embedding, self.step_embedding, self.dim_embedding, self.action_head):
                initialise(module)
        # Last, so that a seed gives policies with and without one the same other weights.
        self.compressor = VisualCompressor(config.compressor, width, self.vlm.tokens_per_image)
        if config.vlm.decoder.positions == "mrotary":
            self.register_buffer("grid_positions", self._grid_positions(), persistent=False)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of all cameras in the prefix, after the compressor."""
        return self.config.vlm.num_cameras * self.compressor.num_tokens(self.config.compressor.mode)

    @property
    def prefix_length(self) -> int:
        """Positions of images, state and padded text, P: where the action slots' positions begin."""
        prompt, cameras = self.config.prompt, self.config.vlm.num_cameras
        around = len(prompt.before_ids) + cameras * (len(prompt.image_before_ids) + len(prompt.image_after_ids))
        return around + self.num_image_tokens + 1 + self.config.text_length

    def positions(self, batch: int, start: int, length: int, device: torch.device) -> Tensor:
        """Positions start .. start + length - 1 of prefix and slots: int64 [batch, length]; M-RoPE: [3, batch, length]."""
        if self.config.vlm.decoder.positions != "mrotary":
            return arange_positions(batch, start, length, device)
        return self.grid_positions[:, None, start : start + length].expand(-1, batch, -1)

    def _grid_positions(self) -> Tensor:
        """M-RoPE positions of the whole prefix and all slots: int64 [3, P + L]. Compressed tokens stand in a row, like text."""
        prompt, size, mode = self.config.prompt, self.config.vlm.vision.image_size, self.config.compressor.mode
        tokens = self.vlm.image_grid(size, size) if mode == "none" else self.compressor.num_tokens(mode)
        image = (len(prompt.image_before_ids), tokens, len(prompt.image_after_ids))
        rest = 1 + self.config.text_length + self.config.num_slots
        return segment_positions([len(prompt.before_ids), *image * self.config.vlm.num_cameras, rest])

    # ---------------------------------------------------------------------------------------------------------- prefix

    def embed_prefix(self, images: Tensor, state: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """images float [B, C, 3, h, w]; state [B, S]; text_ids, text_mask [B, text_length].

        Returns embeddings [B, P, width] in the order images, state, text, and is_real bool [B, P].
        """
        return self.join_prefix(self.embed_images(images), state, text_ids, text_mask)

    def embed_images(self, images: Tensor) -> Tensor:
        """images float [B, C, 3, h, w] -> what the prefix holds of them, place marked, then compressed: [B, C * P', width].

        Uniform pruning keeps the same patches of every frame (seed 0): a chunk is a function of its observation, and a patch
        that is seen does not change from frame to frame.
        """
        tokens = self.vlm.embed_images(images)
        if self.config.compressor.mode == "none":
            return tokens
        cameras = tokens.to(self.state_projector.weight.dtype).unflatten(1, (self.config.vlm.num_cameras, -1))
        return self.compressor.alike(cameras.flatten(0, 1)).unflatten(0, (-1, cameras.shape[1])).flatten(1, 2)

    def join_prefix(
        self, image_tokens: Tensor, state: Tensor, text_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`embed_prefix` once the images are embedded: image_tokens [B, C * P', width] of `embed_images`."""
        parts = (self._frame_images(image_tokens), self.state_projector(state)[:, None], self.vlm.embed_text(text_ids))
        seen = torch.ones(state.shape[0], parts[0].shape[1] + 1, dtype=torch.bool, device=state.device)
        return torch.cat([part.to(parts[1].dtype) for part in parts], dim=1), torch.cat([seen, text_mask], dim=1)

    def _frame_images(self, tokens: Tensor) -> Tensor:
        """The prompt's beginning, and each camera's tokens between what the prompt puts around an image: [B, P', width]."""
        prompt = self.config.prompt
        if prompt.image_before_ids or prompt.image_after_ids:
            cameras = tokens.unflatten(1, (self.config.vlm.num_cameras, -1))
            before, after = (self._embed_ids(ids, cameras) for ids in (prompt.image_before_ids, prompt.image_after_ids))
            tokens = torch.cat([before, cameras, after], dim=2).flatten(1, 2)
        return torch.cat([self._embed_ids(prompt.before_ids, tokens), tokens], dim=1) if prompt.before_ids else tokens

    def _embed_ids(self, ids: tuple[int, ...], like: Tensor) -> Tensor:
        """The same ids for every row of `like` [..., T, width]: [..., len(ids), width], in its dtype."""
        embedded = self.vlm.embed_text(torch.tensor([ids], dtype=torch.long, device=like.device))[0]
        return embedded.to(like.dtype).expand(*like.shape[:-2], -1, -1)

    def prefill(self, embeddings: Tensor, is_real: Tensor) -> Prefix:
        """Run the prefix once; every position sees all real ones.

        Padding stands at the end, so what is padding in every row is cut off: nobody would look at it.
        """
        length = int(is_real.any(0).sum())
        embeddings, is_real = embeddings[:, :length], is_real[:, :length]
        cache = self.vlm.decoder.new_cache()
        prefix = Prefix(cache, is_real, has_padding=not bool(is_real.all()))
        positions = self.positions(embeddings.shape[0], 0, length, embeddings.device)
        self.vlm.decoder.fill(self._entering(embeddings), prefix.mask(0), positions, cache)
        return prefix

    def _entering(self, x: Tensor) -> Tensor:
        """A backbone in half precision beside new parts in float32: what enters it takes its dtype."""
        dtype = self.vlm.decoder.norm.weight.dtype
        return x.to(dtype) if dtype.itemsize < 4 else x

    def _decode(self, x: Tensor, mask: Tensor | None, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """The decoder on embeddings [B, T, width]; what leaves it has their dtype again."""
        return self.vlm.decoder(self._entering(x), mask, positions, cache).to(x.dtype)

    # --------------------------------------------------------------------------------------------------------- actions

    def embed_slots(self, tokens: Tensor, first_slot: int = 0) -> Tensor:
        """Token ids [B, T] standing at slots first_slot .. first_slot + T - 1 -> [B, T, width]."""
        slots = torch.arange(first_slot, first_slot + tokens.shape[1], device=tokens.device)
        place = self.step_embedding(slots // self.config.action_dim) + self.dim_embedding(slots % self.config.action_dim)
        return self.action_embedding(tokens) + place

    def action_hidden(self, tokens: Tensor, prefix: Prefix) -> Tensor:
        """One round: all slots [B, L] see the prefix and each other. Leaves the prefix as it is. [B, L, width]"""
        return self.slots_hidden(self.embed_slots(tokens), prefix)

    def predict_steps(self, values: Tensor, times: Tensor, prefix: Prefix) -> Tensor:
        """One pass of a continuous head: values [B, H, D] at times [B, H] -> a prediction per step [B, H, D], float32."""
        hidden = self.slots_hidden(self.step_slots(values, times), prefix)
        return self.step_slots.predict(hidden).float()

    def slots_hidden(self, slots: Tensor, prefix: Prefix) -> Tensor:
        """Embedded slots [B, L, width] see the prefix and each other: hidden states [B, L, width]."""
        positions = self.positions(slots.shape[0], self.prefix_length, slots.shape[1], slots.device)
        return self._decode(slots, prefix.mask(slots.shape[1]), positions, prefix.cache.view())

    def action_hidden_uncached(self, tokens: Tensor, embeddings: Tensor, is_real: Tensor) -> Tensor:
        """The definition of `action_hidden`: prefix and slots in one pass, the prefix blind to the slots."""
        batch, num_slots = tokens.shape
        length = is_real.shape[1]
        slots = self.embed_slots(tokens)
        real = torch.cat([is_real, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        mask = key_padding_mask(real).repeat(1, 1, length + num_slots, 1)
        mask[:, :, :length, length:] = False
        positions = self.positions(batch, 0, length + num_slots, tokens.device)
        hidden = self._decode(torch.cat([embeddings.to(slots.dtype), slots], dim=1), mask, positions)
        return hidden[:, length:]

    def causal_hidden(self, previous: Tensor, prefix: Prefix, cache: KVCache, first_slot: int = 0) -> Tensor:
        """Autoregressive slots: the input of a slot is the token before it (the mask id before the first).

        previous [B, T]: tokens that precede slots first_slot .. first_slot + T - 1. cache: a view of the prefix's cache
        that holds the slots before first_slot; the new ones are appended. Returns [B, T, width].
        """
        batch, count = previous.shape
        past = causal_mask(count, first_slot + count, previous.device)
        seen = key_padding_mask(prefix.is_real).expand(-1, -1, count, -1)
        mask = torch.cat([seen, past.expand(batch, 1, -1, -1)], dim=3)
        positions = self.positions(batch, self.prefix_length + first_slot, count, previous.device)
        return self._decode(self.embed_slots(previous, first_slot), mask, positions, cache)

    def action_logits(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """hidden [..., width] -> float32 logits [..., V], -inf where `allowed` (bool, broadcastable) is False."""
        return self.action_head(hidden).float().masked_fill(~allowed, -torch.inf)
