"""Laws of the published sizes: the shapes that follow from a published config.json hold exactly the published number of weights.

Configs as on the Hub, without what has no bearing on shapes; numbers of parameters as the Hub shows them for the safetensors.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multimodal.pretrained.families import describe
from multimodal.vlm import VLM

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
SMOL_VISION = {
    "model_type": "idefics3", "hidden_size": 768, "image_size": 512, "num_attention_heads": 12, "patch_size": 16,
    "intermediate_size": 3072, "num_hidden_layers": 12,
}  # fmt: skip
SMOL = {"model_type": "idefics3", "image_token_id": 49190, "scale_factor": 4, "tie_word_embeddings": False, "vision_config": SMOL_VISION}
SMOL_TEXT = {
    "model_type": "llama", "head_dim": 64, "rope_theta": 100_000, "rms_norm_eps": 1e-5, "vocab_size": 49280,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_VL = {  # flat: these files know no text_config
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu",
    "use_sliding_window": False, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151_936,
    "image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653,
    "num_key_value_heads": 2,
}  # fmt: skip
QWEN_VISION = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_window_layers": 24, "sliding_window": 32_768,
        "use_sliding_window": False, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
        "vocab_size": 151_936, "hidden_act": "silu"},
    ),
    "meta-llama/Llama-3.2-1B": (
        1_235_814_400,
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling":
        {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "vocab_size": 128_256, "hidden_act":
        "silu"},
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 10000.0, "rms_norm_eps":
        1e-05, "tie_word_embeddings": False, "vocab_size": 32_000, "hidden_act": "silu"},
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1_000_000,
        "tie_word_embeddings": True, "vocab_size": 151_936, "attention_bias": False, "hidden_act": "silu", "sliding_window":
        None, "use_sliding_window": False, "max_window_layers": 28},
    ),
    "llava-hf/llava-1.5-7b-hf": (
        7_063_427_072,
        {"model_type": "llava", "ignore_index": -100, "image_token_index": 32_000, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096, "model_type": "llama",
        "rms_norm_eps": 1e-05, "vocab_size": 32_064}, "vision_config": CLIP},
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        256_484_928,
        {**SMOL, "text_config": {**SMOL_TEXT, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3}},
    ),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (
        507_482_304,
        {**SMOL, "text_config": {**SMOL_TEXT, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5}},
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        2_208_985_600,
        {**QWEN_VL, "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "vision_config": {**QWEN_VISION, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size":
        1536}},
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        3_754_622_976,
        {**QWEN_VL, "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "vision_config": {**QWEN_VISION, "hidden_act": "silu", "hidden_size": 1280,
        "intermediate_size": 3420, "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2}},
    ),
    "google/paligemma-3b-pt-224": (
        2_923_466_480,
        {"model_type": "paligemma", "bos_token_id": 2, "hidden_size": 2048, "image_token_index": 257_152, "projection_dim":
        2048, "pad_token_id": 0, "text_config": {"hidden_size": 2048, "intermediate_size": 16_384, "model_type": "gemma",
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size":
        257_216}, "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14, "projection_dim":
        2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_number_of_parameters(tmp_path: Path, name: str):
    number, config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        vlm = VLM(describe(tmp_path).vlm)
    assert sum(parameter.numel() for parameter in vlm.parameters()) == number
