"""A policy as three graphs: vision tower, prefix prefill (key/value cache out), action step (tokens or values and cache in).

    vision    images [B, C, 3, h, w] -> image_tokens [B, C * P, width], compressed if the policy does
    prefill   image_tokens, state [B, S], text_ids, text_mask [B, T] -> is_real [B, P'], keys.i, values.i [B, kv, P', d]
    step      of the head's kind, with is_real and the cache as further inputs:
      tokens    tokens [B, L] -> logits [B, L, V]
      causal    previous [B, 1], slot [1], slot_keys.i, slot_values.i [B, kv, L, d]
                -> logits [B, 1, V], new_keys.i, new_values.i
      steps     values [B, H, D], times [B, H] -> predictions [B, H, D]

One cache entry per layer i. B, T and P' are dynamic. Logits of ids that a slot may not hold are in: who decodes masks them.
Borders are float32 but for image tokens and cache, which stay in the model's precision.
"""

import torch
from torch import Tensor, nn

from multimodal.attention import KVCache, key_padding_mask
from multimodal.onnx_writer import OnnxGraph
from vla.model import VLA, Prefix

STEP_KINDS = {
    "discrete_diffusion": "tokens",
    "parallel": "tokens",
    "autoregressive": "causal",
    "l1": "steps",
    "flow": "steps",
}  # head -> kind of its step graph

# What int8 leaves in float32: layers that read the product of an activation and its gate, whose range is wide, and those
# that write what is decoded. On a libero_object policy it halves the error of the actions (vla/onnx_parity.py measures).
SENSITIVE = ("mlp.down", "action_head", "step_slots.predict")


def policy_graphs(model: VLA, head: str) -> list[OnnxGraph]:
    """The graphs of a policy with that head, in the order they run."""
    return [vision_graph(model), prefill_graph(model), STEP_GRAPHS[STEP_KINDS[head]](model)]


class Vision(nn.Module):
    """Tower, projector, camera and place, compressor."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed_images(images.to(next(self.model.vlm.projector.parameters()).dtype))


class Prefill(nn.Module):
    """`VLA.prefill` of whatever length it is given: cutting off what is padding in every row is the caller's."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_tokens: Tensor, state: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        state = state.to(self.model.state_projector.weight.dtype)
        embeddings, is_real = self.model.join_prefix(image_tokens, state, text_ids, text_mask)
        decoder = self.model.vlm.decoder
        cache = decoder.new_cache()
        positions = self.model.positions(embeddings.shape[0], 0, embeddings.shape[1], embeddings.device)
        decoder.fill(embeddings, key_padding_mask(is_real), positions, cache)
        return is_real, *cache.keys, *cache.values


class TokenStep(nn.Module):
    """One round of the discrete diffusion or parallel head."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, is_real: Tensor, *cache: Tensor) -> Tensor:
        hidden = self.model.action_hidden(tokens, Prefix(as_cache(cache), is_real, has_padding=True))
        return self.model.action_head(hidden).float()


class CausalStep(nn.Module):
    """One slot of the autoregressive head.

    The cache of earlier slots comes in as buffers as long as the chunk, of which the first `slot` entries count: every
    length but the batch's and the prefix's is fixed.
    """

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, previous: Tensor, slot: Tensor, is_real: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        model, half = self.model, len(tensors) // 2
        prefix, slots = as_cache(tensors[:half]), as_cache(tensors[half:])
        cache = KVCache(half // 2)
        cache.keys = [torch.cat(pair, dim=2) for pair in zip(prefix.keys, slots.keys, strict=True)]
        cache.values = [torch.cat(pair, dim=2) for pair in zip(prefix.values, slots.values, strict=True)]
        is_filled = (torch.arange(model.config.num_slots, device=slot.device) < slot).expand(previous.shape[0], -1)
        seen = torch.cat([is_real, is_filled, torch.ones_like(previous, dtype=torch.bool)], dim=1)
        place = model.step_embedding(slot // model.config.action_dim) + model.dim_embedding(slot % model.config.action_dim)
        position = model.prefix_length + slot
        if model.config.vlm.decoder.positions == "mrotary":
            positions = model.grid_positions[:, position][:, None].expand(-1, previous.shape[0], -1)
        else:
            positions = position.expand(previous.shape[0], 1)
        hidden = model.vlm.decoder(model.action_embedding(previous) + place, key_padding_mask(seen), positions, cache)
        new = [tensor[:, :, -1:] for tensor in (*cache.keys, *cache.values)]
        return model.action_head(hidden).float(), *new


class ValueStep(nn.Module):
    """One pass of a continuous head."""

    def __init__(self, model: VLA) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, times: Tensor, is_real: Tensor, *cache: Tensor) -> Tensor:
        return self.model.predict_steps(values, times, Prefix(as_cache(cache), is_real, has_padding=True))


def vision_graph(model: VLA) -> OnnxGraph:
    vlm = model.config.vlm
    images = torch.zeros(2, vlm.num_cameras, 3, vlm.vision.image_size, vlm.vision.image_size)
    return OnnxGraph("vision", Vision(model), {"images": images}, ("image_tokens",), {"images": {0: "batch"}}, SENSITIVE)


def prefill_graph(model: VLA) -> OnnxGraph:
    text = torch.zeros(2, 3, dtype=torch.long)
    width, dtype = model.config.vlm.decoder.hidden_size, next(model.vlm.projector.parameters()).dtype
    inputs = {
        "image_tokens": torch.zeros(2, model.num_image_tokens, width, dtype=dtype),
        "state": torch.zeros(2, model.config.state_dim),
        "text_ids": text,
        "text_mask": torch.ones_like(text, dtype=torch.bool),
    }
    dynamic = {name: {0: "batch", 1: "text"} if name.startswith("text") else {0: "batch"} for name in inputs}
    return OnnxGraph("prefill", Prefill(model), inputs, ("is_real", *cache_names(model)), dynamic, SENSITIVE)


def token_step_graph(model: VLA) -> OnnxGraph:
    tokens = torch.zeros(2, model.config.num_slots, dtype=torch.long)
    cache, dynamic = _prefix_inputs(model)
    dynamic |= {"tokens": {0: "batch"}}
    return OnnxGraph("step", TokenStep(model), {"tokens": tokens} | cache, ("logits",), dynamic, SENSITIVE)


def causal_step_graph(model: VLA) -> OnnxGraph:
    previous = {"previous": torch.zeros(2, 1, dtype=torch.long), "slot": torch.zeros(1, dtype=torch.long)}
    cache, dynamic = _prefix_inputs(model)
    buffers = {f"slot_{name}": _cache_entry(model, model.config.num_slots) for name in cache_names(model)}
    outputs = ("logits", *(f"new_{name}" for name in cache_names(model)))
    dynamic = {"previous": {0: "batch"}} | dynamic | {name: {0: "batch"} for name in buffers}
    return OnnxGraph("step", CausalStep(model), previous | cache | buffers, outputs, dynamic, SENSITIVE)


def value_step_graph(model: VLA) -> OnnxGraph:
    horizon, dim = model.config.action_horizon, model.config.action_dim
    inputs = {"values": torch.zeros(2, horizon, dim), "times": torch.zeros(2, horizon)}
    cache, dynamic = _prefix_inputs(model)
    dynamic |= {name: {0: "batch"} for name in inputs}
    return OnnxGraph("step", ValueStep(model), inputs | cache, ("predictions",), dynamic, SENSITIVE)


STEP_GRAPHS = {"tokens": token_step_graph, "causal": causal_step_graph, "steps": value_step_graph}


def cache_names(model: VLA) -> list[str]:
    """keys.0 ..., then values.0 ..."""
    layers = range(model.config.vlm.decoder.num_layers)
    return [f"{kind}.{layer}" for kind in ("keys", "values") for layer in layers]


def as_cache(tensors: tuple[Tensor, ...]) -> KVCache:
    """Keys of every layer, then values of every layer -> a cache."""
    layers = len(tensors) // 2
    cache = KVCache(layers)
    cache.keys, cache.values = list(tensors[:layers]), list(tensors[layers:])
    return cache


def _cache_entry(model: VLA, length: int) -> Tensor:
    decoder = model.config.vlm.decoder
    return torch.zeros(2, decoder.kv_heads, length, decoder.head_dim, dtype=next(model.vlm.projector.parameters()).dtype)


def _prefix_inputs(model: VLA) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """is_real and the cache of a prefix: examples and dynamic axes."""
    length = model.prefix_length
    inputs = {"is_real": torch.ones(2, length, dtype=torch.bool)}
    inputs |= {name: _cache_entry(model, length) for name in cache_names(model)}
    axes = {name: {0: "batch", 1 if name == "is_real" else 2: "prefix"} for name in inputs}
    return inputs, axes
