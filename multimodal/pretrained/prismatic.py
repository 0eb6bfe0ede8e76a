"""OpenVLA and Prismatic: ViTs of timm side by side, a projector of two or three layers, a Llama (Kim et al. 2024).

transformers has no class for it, so config.json is read as it is. Layout: openvla/openvla, prismatic/extern/hf. The last
n_action_bins ids before the padding of the table are OpenVLA's actions.
"""

from collections.abc import Mapping
from typing import Any

from multimodal.config import ProjectorConfig, VLMConfig, VisionConfig
from multimodal.pretrained.family import CLIP_MEAN, CLIP_STD, HALF, Family, decoder_config, ties_embeddings
from multimodal.pretrained.keys import DECODER, Table, under
from multimodal.prompt import PromptFormat

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _tower(theirs: str, index: int) -> Table:
    """LayerScale's gamma is saved as scale_factor, since transformers renames whatever is called gamma."""
    ours = f"vision.tower.vits.{index}"
    return {
        f"{theirs}.blocks.*.ls1.scale_factor": f"{ours}.blocks.*.ls1.gamma",
        f"{theirs}.blocks.*.ls2.scale_factor": f"{ours}.blocks.*.ls2.gamma",
        f"{theirs}.**": f"{ours}.**",
    }


TABLE: Table = {
    **_tower("vision_backbone.featurizer", 0),
    **_tower("vision_backbone.fused_featurizer", 1),
    "projector.fc1.**": "projector.layers.0.**",
    "projector.fc2.**": "projector.layers.1.**",
    "projector.fc3.**": "projector.layers.2.**",
    **under("language_model.model.", DECODER),
    "language_model.lm_head.weight": "head.weight",
}

# Normalisation of the images each ViT was trained with, by a word in its name.
_NORMALISATION = {
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "siglip": (HALF, HALF),
    "clip": (CLIP_MEAN, CLIP_STD),
    "augreg": (HALF, HALF),
}


def build(config: Mapping[str, Any]) -> VLMConfig:
    """`config` is config.json. Raises ValueError for another text model than Llama or a ViT of unknown normalisation."""
    text = text_config(config)
    names = list(config["timm_model_ids"])
    sizes, activations = config["image_sizes"], config.get("timm_override_act_layers") or [None] * len(names)
    if len(set(sizes)) != 1:
        raise ValueError(f"image_sizes are {sizes}; readable are towers of one size.")
    normalisation = [next((pair for word, pair in _NORMALISATION.items() if word in name), None) for name in names]
    if None in normalisation:
        raise ValueError(f"timm_model_ids are {names}; the normalisation of a ViT is known for {', '.join(_NORMALISATION)}.")
    own = config.get("vit_options") or [{}] * len(names)  # ours, for small models: width and depth of each ViT
    options = {
        "vits": [
            {**given, **({} if layer is None else {"act_layer": layer})} for given, layer in zip(own, activations, strict=True)
        ],
        "means": [list(mean) for mean, _ in normalisation],
        "stds": [list(std) for _, std in normalisation],
    }
    width = _vit_width(names, options["vits"])
    hidden = (4 * width, text.hidden_size) if len(names) > 1 else (text.hidden_size,)
    return VLMConfig(
        vision=VisionConfig(
            library="timm_vit",
            name="+".join(_architecture(name) for name in names),
            stage=-2,
            image_size=sizes[0],
            options=options,
        ),
        decoder=decoder_config(text),
        vocab_size=text.vocab_size,
        num_cameras=1,
        tie_embeddings=ties_embeddings(None, text),
        projector=ProjectorConfig(hidden_sizes=hidden),
        image_positions=False,
        bidirectional_images=False,
    )


def text_config(config: Mapping[str, Any]) -> Any:
    """The Llama config; the released files give what differs from transformers' defaults."""
    from transformers import LlamaConfig  # a second to import

    given = dict(config.get("text_config") or {})
    kind = given.pop("model_type", "llama")
    if kind != "llama":
        raise ValueError(f"the text model is a {kind!r}; readable is llama.")
    return LlamaConfig(**given)


def action_ids(config: Mapping[str, Any]) -> range:
    """Ids of the action bins, from the largest value to the smallest: the table's end without its padding.

    Bin i, counted from 1 at the lowest value, is id (vocabulary without padding) - i.
    """
    padding = config.get("pad_to_multiple_of", 64)
    end = text_config(config).vocab_size - padding
    return range(end - config.get("n_action_bins", 256), end)


def _architecture(name: str) -> str:
    """timm's name without the tag of pretrained weights."""
    return name.split(".")[0]


def _vit_width(names: list[str], options: list[dict[str, Any]]) -> int:
    """Sum of the ViTs' widths, from models laid out without memory."""
    import timm
    import torch

    with torch.device("meta"):
        vits = [
            timm.create_model(_architecture(name), num_classes=0, **given) for name, given in zip(names, options, strict=True)
        ]
    return sum(vit.embed_dim for vit in vits)


PRISMATIC = Family(
    name="OpenVLA (Prismatic)",
    model_types=("openvla", "prismatic"),
    build=build,
    table=TABLE,
    prompt=PromptFormat(after="In: What action should the robot take to {instruction}?\nOut: "),
    knows_transformers=False,
)
