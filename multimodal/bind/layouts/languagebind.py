"""LanguageBind-style encoders: a CLIP picture trunk, attention over time in front of each layer, low-rank adapters.

Zhu et al. 2024. Frames go through the trunk side by side; before each layer every place attends to itself at other times (a
trained embedding per frame, a norm, attention, all added to the stream); the class tokens' outputs are averaged over frames
and projected. Modalities without time are films of one frame. What binding trains is low-rank (peft), and merges.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.layouts.published import CLIP_MEAN, CLIP_STD, PreparedPictures
from multimodal.bind.modalities import box_of
from multimodal.checkpoint import load_weights

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class TimeAttention(nn.Module):
    """Self-attention over frames, with CLIP's names of its layers."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        heads = [layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in layers]
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class TimedLayer(nn.Module):
    """A layer of CLIP's, behind attention over time; called as the layer is, on hidden states [B T, N, width]."""

    def __init__(self, layer: nn.Module, frames: int, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.layer, self.frames = layer, frames
        self.temporal_embedding = nn.Parameter(torch.randn(1, frames, width) * width**-0.5)
        self.temporal_layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.temporal_attn = TimeAttention(width, num_heads)

    def forward(self, hidden_states: Tensor, *arguments: Any, **settings: Any) -> Any:
        places = hidden_states.shape[1]
        over_time = hidden_states.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1)  # [B N, T, width]
        over_time = over_time + self.temporal_embedding
        over_time = over_time + self.temporal_attn(self.temporal_layer_norm1(over_time))
        back = over_time.unflatten(0, (-1, places)).transpose(1, 2).flatten(0, 1)
        return self.layer(back, *arguments, **settings)


class LanguageBindEncoder(nn.Module):
    """A ModalityEncoder over transformers' CLIPVisionModelWithProjection."""

    def __init__(self, model: nn.Module, modality: str, frames: int, logit_scale: float) -> None:
        super().__init__()
        settings = model.config
        self.modality, self.frames, self.logit_scale = modality, frames, logit_scale
        self.box, self.dimension = box_of(modality), settings.projection_dim
        self.prepare = PreparedPictures(self.box, settings.image_size, CLIP_MEAN, CLIP_STD)
        self.model = model
        if frames > 1:
            layers = model.vision_model.encoder.layers
            for index, layer in enumerate(layers):
                layers[index] = TimedLayer(
                    layer, frames, settings.hidden_size, settings.num_attention_heads, settings.layer_norm_eps
                )

    def embed(self, inputs: Tensor) -> Tensor:
        """Pictures [B, C, H, W], or films [B, C, T, H, W], in the box -> unit vectors [B, dimension]."""
        film = inputs if inputs.ndim == 5 else inputs[:, :, None]
        if film.shape[2] != self.frames:
            raise ValueError(
                f"This {self.modality} encoder takes {self.frames} frames, got {film.shape[2]}; sample the film anew."
            )
        pixels = self.prepare(film.transpose(1, 2).flatten(0, 1))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output.unflatten(0, (-1, self.frames)).mean(1)
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    forward = embed

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a LanguageBind checkpoint (vision_model.*, visual_projection.*). Raises ValueError listing what
        does not fit. Before `add_lora`."""
        ours = {name: name.replace(".layer.", ".") for name in self.model.state_dict()}
        kept = {name: state[theirs] for name, theirs in ours.items() if theirs in state}
        load_weights(self.model, kept, "the LanguageBind checkpoint")

    def add_lora(self, rank: int, alpha: float) -> None:
        """Freeze the encoder and put an adapter beside every linear layer of the trunk; nothing changes yet. Raises ValueError
        without peft."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ValueError(
                "Low-rank adapters need peft: pip install 'peft>=0.14' (or the extra: pip install -e .[train])."
            ) from error
        self.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_LAYERS)), self.model.vision_model)

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Add the adapters to the weights that they stand beside, and remove them."""
        from peft.tuners.lora import LoraLayer

        for name, module in list(self.model.vision_model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                self.model.vision_model.set_submodule(name, module.get_base_layer())


def languagebind_encoder(
    model: nn.Module, modality: str, *, frames: int = 1, logit_scale: float = 1 / 0.07
) -> LanguageBindEncoder:
    """Wrap a CLIPVisionModelWithProjection. Raises ValueError for another kind of model."""
    if not hasattr(model, "visual_projection") or not hasattr(model, "vision_model"):
        raise ValueError(
            f"{type(model).__name__} has no vision_model and visual_projection; give a CLIPVisionModelWithProjection."
        )
    return LanguageBindEncoder(model, modality, frames, logit_scale).eval()
