"""Language models without images: Llama, Mistral, Qwen2, Qwen3, Gemma."""

from typing import Any

from multimodal.config import VLMConfig
from multimodal.pretrained.family import Family, decoder_config, ties_embeddings
from multimodal.pretrained.keys import DECODER, under


def build(config: Any) -> VLMConfig:
    return VLMConfig(
        vision=None,
        decoder=decoder_config(config),
        vocab_size=config.vocab_size,
        tie_embeddings=ties_embeddings(config, config),
        image_positions=False,
        text_scale=config.hidden_size**0.5 if config.model_type == "gemma" else 1.0,
    )


DECODERS = Family(
    name="decoder",
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    build=build,
    table={**under("model.", DECODER), "lm_head.weight": "head.weight"},
)
