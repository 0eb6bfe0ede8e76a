"""SmolVLM and Idefics3: a SigLIP tower, pixel shuffle and one linear layer, a Llama (Laurencon et al. 2024)."""

from typing import Any

from multimodal.config import ProjectorConfig, VLMConfig
from multimodal.pretrained.family import Family, decoder_config, ties_embeddings, transformers_vision
from multimodal.pretrained.keys import DECODER, Table, under
from multimodal.prompt import PromptFormat
from multimodal.published_towers import tower_options

TABLE: Table = {
    **under("model.text_model.", DECODER),
    "model.vision_model.**": "vision.tower.model.**",
    "model.connector.modality_projection.proj.weight": "projector.layers.0.weight",
    "lm_head.weight": "head.weight",
}


def build(config: Any) -> VLMConfig:
    text, vision = config.text_config, config.vision_config
    tower = config.model_type  # smolvlm or idefics3: the same module under two names
    return VLMConfig(
        vision=transformers_vision(tower, vision, tower_options(tower, vision)),
        decoder=decoder_config(text),
        vocab_size=text.vocab_size,
        num_cameras=1,
        tie_embeddings=ties_embeddings(config, text),
        image_token_id=config.image_token_id,
        projector=ProjectorConfig(bias=False, group_side=config.scale_factor),
        image_positions=False,
        bidirectional_images=False,
    )


IDEFICS3 = Family(
    name="SmolVLM (Idefics3)",
    model_types=("smolvlm", "idefics3"),
    build=build,
    table=TABLE,
    prompt=PromptFormat(
        before="<|im_start|>User:",
        image_before="<fake_token_around_image><global-img>",
        image_after="<fake_token_around_image>",
        after="{instruction}<end_of_utterance>\nAssistant:",
    ),
)
