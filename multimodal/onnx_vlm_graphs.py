"""A vision-language model as two graphs: image features, and the language side that reads and decodes with a static cache.

    vision     images [N, 3, h, w], places [N] -> features [N, P, width]
    language   ids [B, T], features [M, P, width], start [B], last [B], keys.i, values.i [B, kv, C, d]
               -> logits [B, V], new_keys.i, new_values.i [B, kv, C, d]

Prefill and decode step are one graph, called with T the prompt's length and with T = 1: two would hold the weights twice. The
cache has a fixed capacity C; a call writes positions start .. start + T - 1 of each row and gives the buffers back, so a caller
who binds the same memory to `keys.i` and `new_keys.i` has nothing copied. `ids` holds IMAGE where the features of the call's M
images stand, row by row. `last` is the offset of the row's last real id, whose logits come out; what a shorter row holds behind
it is written over by its next call and seen by nobody. N, B, T, M and C are dynamic. Borders are float32 but for features and
cache, which stay in the model's precision. Models
without image positions have no `places`, models without a tower neither `vision` nor `features`.
"""

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from multimodal.onnx_writer import OnnxGraph
from multimodal.questions import IMAGE
from multimodal.vlm import VLM
from multimodal.vlm_folder import check_answers

# What int8 leaves in float32: layers that read the product of an activation and its gate, and what is read between tower,
# decoder and ids.
SENSITIVE = ("mlp.down", "head", "projector")


def vlm_graphs(vlm: VLM) -> list[OnnxGraph]:
    """The graphs of a model; without a tower only the language side. Raises ValueError for what they cannot hold."""
    check_answers(vlm.config)
    return [*([] if vlm.config.vision is None else [vision_graph(vlm)]), language_graph(vlm)]


class Vision(nn.Module):
    """Tower, projector and the trained place of an image among the sequence's images."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        has_padding = vlm.config.vision.library == "transformers" and vlm.config.vision.name in ("idefics3", "smolvlm")
        self.vlm = with_whole_images(vlm) if has_padding else vlm

    def forward(self, images: Tensor, *places: Tensor) -> Tensor:
        features = self.vlm.image_features(images.to(self.vlm.text_embedding.weight.dtype))
        return features + self.vlm.image_positions[places[0]] if places else features


class WholeImages(nn.Module):
    """Stands where an Idefics3 tower was, whose loop over each image's padding no graph can hold.

    Images of the tower's size have no padding, so all have the same positions and see all of themselves.
    """

    def __init__(self, tower: nn.Module, size: int) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.post_layernorm = tower.embeddings, tower.encoder, tower.post_layernorm
        wide, found = copy.deepcopy(tower.embeddings).float(), []
        wide.position_embedding.register_forward_hook(lambda module, given, result: found.append(result[0]))
        with torch.no_grad():
            mask = torch.ones(1, *(size // wide.patch_size,) * 2, dtype=torch.bool)
            wide(pixel_values=torch.zeros(1, 3, size, size), patch_attention_mask=mask)
        self.register_buffer("positions", found[0].to(tower.embeddings.position_embedding.weight.dtype))

    def forward(self, images: Tensor) -> SimpleNamespace:
        patches = self.embeddings.patch_embedding(images).flatten(2).transpose(1, 2)
        states = self.encoder(inputs_embeds=patches + self.positions, attention_mask=None).last_hidden_state
        return SimpleNamespace(last_hidden_state=self.post_layernorm(states))


def with_whole_images(vlm: VLM) -> VLM:
    """The same weights with `WholeImages` as the tower; the model itself stays as it is."""
    return replaced(vlm, ["vision", "tower", "model"], WholeImages(vlm.vision.tower.model, vlm.config.vision.image_size))


def replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    """A module that shares all of `module`'s parts but the one at `path`."""
    if not path:
        return new
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    clone._modules[path[0]] = replaced(module._modules[path[0]], path[1:], new)
    return clone


class Language(nn.Module):
    """Embed ids and image features, run the decoder over a cache of fixed capacity, logits of each row's last id."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        has_images = self.vlm.config.vision is not None
        features = tensors[0] if has_images else None
        start, last, *cache = tensors[has_images:]
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        static = StaticCache(cache, positions)
        mask = self.mask(ids, start, positions, cache[0].shape[2])
        hidden = self.vlm.decoder(self.embed(ids, features), mask[:, None], positions, static)
        read = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        return self.vlm.logits(read).float(), *static.keys, *static.values

    def embed(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """`VLM.embed_prompt` of every row: ids [B, T], features [M, P, width] -> [B, T, width]."""
        embedded = self.vlm.embed_text(ids.clamp(min=0))
        if features is None:
            return embedded
        is_image = ids == IMAGE
        index = is_image.flatten().long().cumsum(0).view(ids.shape) * is_image  # from 1; 0 is the row of zeros, for text
        rows = features.flatten(0, 1)
        tokens = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])[index]
        return torch.where(is_image[..., None], tokens.to(embedded.dtype), embedded)

    def mask(self, ids: Tensor, start: Tensor, positions: Tensor, capacity: int) -> Tensor:
        """Who sees whom, `VLM.sequence_mask` of every row: bool [B, T, C]."""
        keys = torch.arange(capacity, device=ids.device)
        mask = keys <= positions[..., None]
        if self.vlm.config.vision is None or not self.vlm.config.bidirectional_images:
            return mask
        is_image = ids == IMAGE
        before = torch.cat([torch.zeros_like(is_image[:, :1]), is_image[:, :-1]], dim=1)
        run = (is_image & ~before).long().cumsum(1) * is_image  # number of the run of image tokens, from 1; 0 elsewhere
        offset = keys - start[:, None]  # [B, C] of each cached position among the call's ids
        is_new = (offset >= 0) & (offset < ids.shape[1])
        of_key = run.gather(1, torch.minimum(offset.clamp(min=0), torch.full_like(offset, ids.shape[1] - 1))) * is_new
        return mask | ((of_key[:, None] == run[..., None]) & is_image[..., None])


class StaticCache:
    """Buffers [B, kv_heads, C, head_dim] that a pass writes into; stands where `Attention` expects a KVCache."""

    def __init__(self, buffers: list[Tensor], positions: Tensor) -> None:
        """buffers: keys of every layer, then values; positions int64 [B, T] to write."""
        half = len(buffers) // 2
        self.keys, self.values = buffers[:half], buffers[half:]
        self.positions = positions

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, T, head_dim]; the whole buffers, of which the mask shows what is written."""
        self.keys[layer] = self._written(self.keys[layer], keys)
        self.values[layer] = self._written(self.values[layer], values)
        return self.keys[layer], self.values[layer]

    def _written(self, buffer: Tensor, new: Tensor) -> Tensor:
        return buffer.scatter(2, self.positions[:, None, :, None].expand(new.shape), new)


def vision_graph(vlm: VLM) -> OnnxGraph:
    size = vlm.config.vision.image_size
    inputs = {"images": torch.zeros(2, 3, size, size)}
    if vlm.config.image_positions:
        inputs["places"] = torch.zeros(2, dtype=torch.long)
    return OnnxGraph("vision", Vision(vlm), inputs, ("features",), {name: {0: "images"} for name in inputs}, SENSITIVE)


def language_graph(vlm: VLM) -> OnnxGraph:
    decoder, dtype = vlm.config.decoder, vlm.text_embedding.weight.dtype
    names = cache_names(decoder.num_layers)
    inputs = {"ids": torch.tensor([[IMAGE] * 3] * 2)}
    dynamic = {"ids": {0: "batch", 1: "length"}}
    if vlm.config.vision is not None:
        inputs["features"] = torch.zeros(3, vlm.tokens_per_image, decoder.hidden_size, dtype=dtype)
        dynamic["features"] = {0: "images"}
    for name in ("start", "last"):
        inputs[name], dynamic[name] = torch.zeros(2, dtype=torch.long), {0: "batch"}
    for name in names:
        inputs[name] = torch.zeros(2, decoder.kv_heads, 8, decoder.head_dim, dtype=dtype)
        dynamic[name] = {0: "batch", 2: "capacity"}
    return OnnxGraph("language", Language(vlm), inputs, ("logits", *(f"new_{name}" for name in names)), dynamic, SENSITIVE)


def cache_names(num_layers: int) -> list[str]:
    """keys.0 ..., then values.0 ..."""
    return [f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(num_layers)]
