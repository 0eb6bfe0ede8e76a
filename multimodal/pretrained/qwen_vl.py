"""Qwen2-VL and Qwen2.5-VL: a ViT for images of any size, a merger of 2 x 2 patches, a Qwen2 with M-RoPE (Wang et al. 2024)."""

from typing import Any

from multimodal.config import ProjectorConfig, VLMConfig, VisionConfig
from multimodal.pretrained.family import CLIP_MEAN, CLIP_STD, Family, decoder_config, ties_embeddings
from multimodal.pretrained.keys import DECODER, Table, under
from multimodal.prompt import PromptFormat
from multimodal.published_towers import tower_options

IMAGE_SIZE = 224  # of a camera image by default; any multiple of patch_size * spatial_merge_size does

_PARTS: Table = {
    "visual.merger.ln_q.**": "projector.norm.**",
    "visual.merger.mlp.0.**": "projector.layers.0.**",
    "visual.merger.mlp.2.**": "projector.layers.1.**",
    "visual.**": "vision.tower.model.**",
}
TABLE: Table = {
    **_PARTS,
    **under("model.", _PARTS),
    **under("model.language_model.", DECODER),
    **under("model.", DECODER),
    "lm_head.weight": "head.weight",
}


def build(config: Any) -> VLMConfig:
    text, vision = config.text_config, config.vision_config
    is_first = config.model_type == "qwen2_vl"
    patch_width = vision.embed_dim if is_first else vision.hidden_size
    side = vision.spatial_merge_size
    step = vision.patch_size * side
    return VLMConfig(
        vision=VisionConfig(
            library="transformers",
            name=config.model_type,
            image_size=max(round(IMAGE_SIZE / step), 1) * step,
            options=tower_options(config.model_type, vision),
        ),
        decoder=decoder_config(text),
        vocab_size=text.vocab_size,
        num_cameras=1,
        tie_embeddings=ties_embeddings(config, text),
        image_token_id=config.image_token_id,
        projector=ProjectorConfig(
            hidden_sizes=(patch_width * side**2,), group_side=side, norm="layer" if is_first else "rms", norm_eps=1e-6
        ),
        image_positions=False,
        bidirectional_images=False,
    )


QWEN_VL = Family(
    name="Qwen2-VL",
    model_types=("qwen2_vl", "qwen2_5_vl"),
    build=build,
    table=TABLE,
    prompt=PromptFormat(
        before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        image_before="<|vision_start|>",
        image_after="<|vision_end|>",
        after="{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    mean=CLIP_MEAN,
    std=CLIP_STD,
)
