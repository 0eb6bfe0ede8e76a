"""LLaVA-1.5 and LLaVA-NeXT: a CLIP tower, two projector layers, a Llama or Mistral (Liu et al. 2023; 2024)."""

from typing import Any

from multimodal.config import ProjectorConfig, VLMConfig
from multimodal.pretrained.family import CLIP_MEAN, CLIP_STD, Family, decoder_config, ties_embeddings, transformers_vision
from multimodal.pretrained.keys import DECODER, Table, under
from multimodal.prompt import PromptFormat
from multimodal.published_towers import tower_options

# Files of transformers 4 put the parts side by side, files of transformers 5 below `model`.
TABLE: Table = {
    **under("language_model.model.", DECODER),
    **under("model.language_model.", DECODER),
    "language_model.lm_head.weight": "head.weight",
    "lm_head.weight": "head.weight",
    **{
        f"{outer}{theirs}": ours
        for outer in ("", "model.")
        for theirs, ours in {
            "multi_modal_projector.linear_1.**": "projector.layers.0.**",
            "multi_modal_projector.linear_2.**": "projector.layers.1.**",
            "vision_tower.vision_model.**": "vision.tower.model.**",
            "vision_tower.**": "vision.tower.model.**",
            "image_newline": "image_newline",
        }.items()
    },
}


def build(config: Any) -> VLMConfig:
    """Raises ValueError for other towers than CLIP, several feature layers, or another projector activation."""
    text, vision = config.text_config, config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"the tower is a {vision.model_type!r}; readable is clip_vision_model.")
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act != "gelu":
        raise ValueError(
            f"vision_feature_layer {config.vision_feature_layer} and projector_hidden_act {config.projector_hidden_act!r}; "
            "readable are one layer and 'gelu'."
        )
    keeps = config.vision_feature_select_strategy == "full"
    options = tower_options("clip", vision)
    return VLMConfig(
        vision=transformers_vision("clip", vision, options, stage=config.vision_feature_layer, keep_class_token=keeps),
        decoder=decoder_config(text),
        vocab_size=text.vocab_size,
        num_cameras=1,
        tie_embeddings=ties_embeddings(config, text),
        image_token_id=config.image_token_id,
        projector=ProjectorConfig(
            hidden_sizes=(text.hidden_size,),
            bias=config.multimodal_projector_bias,
            newline=config.model_type == "llava_next",
        ),
        image_positions=False,
        bidirectional_images=False,
    )


_PROMPT = PromptFormat(before="{bos}USER: ", after="\n{instruction} ASSISTANT:")
LLAVA = Family("LLaVA-1.5", ("llava",), build, TABLE, _PROMPT, CLIP_MEAN, CLIP_STD)
LLAVA_NEXT = Family("LLaVA-NeXT", ("llava_next",), build, TABLE, _PROMPT, CLIP_MEAN, CLIP_STD)
