"""PaliGemma: a SigLIP tower, one linear layer, a Gemma whose prompt sees itself whole (Beyer et al. 2024)."""

from typing import Any

from multimodal.config import VLMConfig
from multimodal.pretrained.family import Family, decoder_config, ties_embeddings, transformers_vision
from multimodal.pretrained.keys import DECODER, Table, under
from multimodal.prompt import PromptFormat
from multimodal.published_towers import tower_options

TABLE: Table = {
    **under("language_model.model.", DECODER),
    **under("model.language_model.", DECODER),
    "language_model.lm_head.weight": "head.weight",
    "lm_head.weight": "head.weight",
    **{
        f"{outer}{theirs}": ours
        for outer in ("", "model.")
        for theirs, ours in {
            "multi_modal_projector.linear.**": "projector.**",
            "vision_tower.vision_model.**": "vision.tower.model.**",
            "vision_tower.**": "vision.tower.model.**",
        }.items()
    },
}


def build(config: Any) -> VLMConfig:
    """Only text is scaled: the released code divides images by sqrt(hidden_size), by which Gemma multiplies all inputs."""
    text, vision = config.text_config, config.vision_config
    return VLMConfig(
        vision=transformers_vision("siglip", vision, tower_options("siglip", vision)),
        decoder=decoder_config(text),
        vocab_size=text.vocab_size,
        num_cameras=1,
        tie_embeddings=ties_embeddings(config, text),
        image_token_id=config.image_token_id,
        image_positions=False,
        text_scale=text.hidden_size**0.5,
        bidirectional_prompt=True,
    )


PALIGEMMA = Family(
    name="PaliGemma",
    model_types=("paligemma",),
    build=build,
    table=TABLE,
    prompt=PromptFormat(before="", after="{bos}{instruction}\n"),
)
