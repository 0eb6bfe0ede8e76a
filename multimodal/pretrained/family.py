"""What a family of published checkpoints is: its settings in our words, its table of names, its prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from multimodal.config import DecoderConfig, VLMConfig, VisionConfig
from multimodal.pretrained.keys import Table
from multimodal.prompt import PromptFormat

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP clip.py


@dataclass(frozen=True)
class Family:
    """One layout. `build` takes the transformers config object (Prismatic: the dict); ValueError for what is not ours."""

    name: str
    model_types: tuple[str, ...]  # config.json's model_type
    build: Callable[[Any], VLMConfig]
    table: Table
    prompt: PromptFormat = PromptFormat()
    mean: tuple[float, ...] = HALF  # image normalisation where the folder has no preprocessor_config.json
    std: tuple[float, ...] = HALF
    knows_transformers: bool = True  # False: config.json is read as it is


_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")


def decoder_config(text: Any) -> DecoderConfig:
    """Our settings of a transformers text config. Raises ValueError naming a setting without counterpart in our decoder."""
    if text.model_type not in _DECODERS:
        raise ValueError(f"the text model is a {text.model_type!r}; readable are {', '.join(_DECODERS)}.")
    kind, is_gemma = text.model_type, text.model_type == "gemma"
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    if is_gemma and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # Gemma's released weights were trained so, whatever their first config said
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {activation!r}; readable are {', '.join(_ACTIVATIONS)}.")
    has_bias = bool(getattr(text, "attention_bias", False))
    return DecoderConfig(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None),
        mlp_size=text.intermediate_size,
        norm_eps=text.rms_norm_eps,
        norm_offset=1.0 if is_gemma else 0.0,
        activation=_ACTIVATIONS[activation],
        qkv_bias=has_bias or kind.startswith("qwen2"),
        output_bias=has_bias and not kind.startswith("qwen2"),
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=_window(text),
        **_rotary(text),
    )


def _rotary(text: Any) -> dict[str, Any]:
    """Base, scaling and sections; transformers 5 keeps them in one rope_parameters, 4 in rope_theta and rope_scaling."""
    settings = getattr(text, "rope_parameters", None)
    if settings is None:
        settings = {"rope_theta": text.rope_theta, **(getattr(text, "rope_scaling", None) or {})}
    kind = settings.get("rope_type", settings.get("type", "default"))
    sections = tuple(settings.get("mrope_section", ()))
    scalings = {"default": "none", "mrope": "none", "linear": "linear", "llama3": "llama3"}
    if kind not in scalings or settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope settings {settings}; readable are the whole head's with rope_type {', '.join(scalings)}.")
    found: dict[str, Any] = {
        "positions": "mrotary" if sections else "rotary",
        "rotary_base": float(settings["rope_theta"]),
        "rotary_sections": sections,
        "rotary_scaling": scalings[kind],
    }
    if kind in ("linear", "llama3"):
        found["rotary_factor"] = float(settings["factor"])
    if kind == "llama3":
        found["rotary_low_factor"] = float(settings["low_freq_factor"])
        found["rotary_high_factor"] = float(settings["high_freq_factor"])
        found["rotary_length"] = int(settings["original_max_position_embeddings"])
    return found


def _window(text: Any) -> int | None:
    """The sliding window of all layers. Raises ValueError if only some have one."""
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or [])
    if window is None or not getattr(text, "use_sliding_window", True) or kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ValueError(f"layer_types mixes {sorted(kinds)}; readable are models whose layers all see alike.")
    return window


def ties_embeddings(config: Any, text: Any) -> bool:
    """Does the config allow a checkpoint without a language head?

    transformers asks the text config, old files the outer one.
    """
    return bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False))


def transformers_vision(
    name: str, vision: Any, options: dict[str, Any], *, stage: int = -1, keep_class_token: bool = False
) -> VisionConfig:
    """A tower of transformers at the image size it was trained with."""
    return VisionConfig(
        library="transformers", name=name, stage=stage, image_size=vision.image_size, options=options,
        keep_class_token=keep_class_token,
    )  # fmt: skip
