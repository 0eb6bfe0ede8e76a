"""Shapes of images, the image tower, the decoder and the vision-language model built from them, with named presets."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

NORMS = ("rms", "layer")
ACTIVATIONS = ("swiglu", "geglu", "gelu")
POSITIONS = ("rotary", "mrotary", "learned", "none")
SCALINGS = ("none", "linear", "llama3")
TOWER_LIBRARIES = ("timm", "open_clip", "timm_vit", "transformers")


def check_choice(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError naming the field unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{owner}.{name} is {value!r}; allowed: {', '.join(allowed)}.")


def check_settings(owner: str, settings: Mapping[str, Any], config_class: type) -> None:
    """Raise ValueError naming those that the dataclass has no field for, and those it has."""
    known = [field.name for field in fields(config_class)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(f"{owner} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(known)}.")


@dataclass(frozen=True)
class ImageConfig:
    """What happens between a uint8 frame and the image tower."""

    crop: int = 112  # pixels of the square cut out: at random in training, the centre otherwise
    size: int | None = None  # pixels after resizing the crop; none: the crop's own
    brightness: float = 0.2  # factors are drawn from [1 - x, 1 + x]; 0 switches one off
    contrast: float = 0.2
    saturation: float = 0.2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of values in [0, 1], per channel
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.crop < 1 or (self.size is not None and self.size < 1):
            raise ValueError(f"ImageConfig.crop and .size must be positive; got {self.crop} and {self.size}.")
        jitter = (self.brightness, self.contrast, self.saturation)
        if not all(0.0 <= value < 1.0 for value in jitter):
            raise ValueError(f"ImageConfig jitter (brightness, contrast, saturation) must be in [0, 1); got {jitter}.")

    @property
    def output_size(self) -> int:
        """Height and width of what the tower sees, pixels."""
        return self.size or self.crop


@dataclass(frozen=True)
class VisionConfig:
    """An image tower by its library's name. `options` go to the library's constructor."""

    library: str = "timm"  # timm | open_clip | timm_vit | transformers
    name: str = "resnet18"  # timm_vit: several names joined by + stand side by side; transformers: a row of its table
    stage: int = -1  # what becomes tokens: timm out_indices entry, block index (open_clip, timm_vit), hidden state (transformers)
    image_size: int = 112  # pixels after cropping; any size the tower accepts
    pretrained: str | None = None  # None: random weights; timm: "true" or a tag; open_clip: a tag or file
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_class_token: bool = False  # transformers' CLIP towers: the class token comes before the patches

    def __post_init__(self) -> None:
        check_choice("VisionConfig", "library", self.library, TOWER_LIBRARIES)


@dataclass(frozen=True)
class ProjectorConfig:
    """What stands between tower and decoder: group patches, norm, then linear layers with GELU in between."""

    hidden_sizes: tuple[int, ...] = ()  # widths of the layers before the last; none: one linear layer
    bias: bool = True
    group_side: int = 1  # side x side patches become one token, their channels side by side
    norm: str = "none"  # of each patch, before grouping: none | rms | layer
    norm_eps: float = 1e-6
    newline: bool = False  # a trained token behind every row of patches, or behind a single tile (LLaVA-NeXT)

    def __post_init__(self) -> None:
        check_choice("ProjectorConfig", "norm", self.norm, ("none", *NORMS))


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm transformer wide enough for Llama, Qwen2, Qwen3, Gemma, GPT-2 and SmolVLM decoders."""

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int | None = None  # None: num_heads
    head_size: int | None = None  # None: hidden_size / num_heads
    mlp_size: int = 512
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma stores scale - 1: offset 1
    activation: str = "swiglu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_sections: tuple[int, ...] = ()  # mrotary: rotated pairs per position axis, summing to head_size / 2
    max_positions: int = 0  # learned positions only
    embedding_scale: float = 1.0  # on every input; VLMConfig.text_scale scales text alone, as Gemma needs it beside images
    rotary_scaling: str = "none"  # none | linear | llama3
    rotary_factor: float = 1.0  # linear, llama3: by how much low frequencies are slowed
    rotary_low_factor: float = 1.0  # llama3: wavelengths above rotary_length / this are slowed whole
    rotary_high_factor: float = 4.0  # llama3: wavelengths below rotary_length / this are kept
    rotary_length: int = 8192  # llama3: positions before the context was extended
    sliding_window: int | None = None  # a position sees this many keys, itself included; None: all

    def __post_init__(self) -> None:
        check_choice("DecoderConfig", "norm", self.norm, NORMS)
        check_choice("DecoderConfig", "activation", self.activation, ACTIVATIONS)
        check_choice("DecoderConfig", "positions", self.positions, POSITIONS)
        check_choice("DecoderConfig", "rotary_scaling", self.rotary_scaling, SCALINGS)
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"DecoderConfig.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                "change one of them or give head_size."
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"DecoderConfig.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}.")
        if self.positions == "mrotary" and sum(self.rotary_sections) * 2 != self.head_dim:
            raise ValueError(
                f"DecoderConfig.rotary_sections {self.rotary_sections} sum to {sum(self.rotary_sections)}; "
                f"mrotary needs head size / 2 = {self.head_dim // 2}."
            )

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@dataclass(frozen=True)
class VLMConfig:
    """An image tower, a projector and a decoder over one embedding table of text ids."""

    vision: VisionConfig | None = field(default_factory=VisionConfig)  # None: a language model without images
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vocab_size: int = 64  # text ids of the tokenizer
    num_cameras: int = 2
    tie_embeddings: bool = True  # the language head is the text embedding; False: a matrix of its own
    logit_scale: float = 1.0  # on the head's output; hidden_size ** -0.5 starts a tied head near uniform
    image_token_id: int | None = None  # text id that stands for an image's tokens; None: images precede the text
    bidirectional_images: bool = True  # image tokens that stand together see each other; False: causal, as LLaVA and Qwen2-VL
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    image_positions: bool = True  # a trained embedding per camera and image token; published models have none
    text_scale: float = 1.0  # on text embeddings; Gemma: sqrt(hidden_size)
    num_new_tokens: int = 0  # ids grown behind vocab_size, in rows of their own (multimodal/vocabulary.py)
    bidirectional_prompt: bool = False  # the prompt sees itself whole, answers are causal (PaliGemma)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VLMConfig":
        """Inverse of `dataclasses.asdict`, lists taken for tuples. Raises TypeError on an unknown field."""
        values = dict(values)
        vision, projector = values.pop("vision"), dict(values.pop("projector", {}))
        decoder = dict(values.pop("decoder"))
        decoder["rotary_sections"] = tuple(decoder["rotary_sections"])
        if "hidden_sizes" in projector:
            projector["hidden_sizes"] = tuple(projector["hidden_sizes"])
        return cls(
            vision=None if vision is None else VisionConfig(**vision),
            decoder=DecoderConfig(**decoder),
            projector=ProjectorConfig(**projector),
            **values,
        )


# A narrow residual tower trained from scratch: stride 16, 49 tokens at 112 pixels, 0.7 M parameters.
_DESK_TOWER = VisionConfig(name="resnet18", stage=3, image_size=112, options={"channels": [32, 64, 128, 256]})

PRESETS: Mapping[str, VLMConfig] = {
    "debug": VLMConfig(
        vision=VisionConfig(name="resnet10t", stage=3, image_size=32, options={"channels": [8, 16, 16, 16], "stem_width": 8}),
        decoder=DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, mlp_size=48),
    ),
    # 0.25 M parameters: a point of `vla scaling` below desk-s.
    "desk-xs": VLMConfig(
        vision=VisionConfig(
            name="resnet10t", stage=3, image_size=84, options={"channels": [16, 32, 64, 128], "stem_width": 8}
        ),
        decoder=DecoderConfig(hidden_size=64, num_layers=3, num_heads=1, mlp_size=192),
    ),
    # 1.0 M parameters: as much as two cores can train in minutes.
    "desk-s": VLMConfig(
        vision=VisionConfig(
            name="resnet10t", stage=3, image_size=84, options={"channels": [32, 64, 128, 256], "stem_width": 16}
        ),
        decoder=DecoderConfig(hidden_size=128, num_layers=3, num_heads=2, mlp_size=384),
    ),
    "desk": VLMConfig(vision=_DESK_TOWER, decoder=DecoderConfig()),
    "smolvlm": VLMConfig(
        vision=VisionConfig(name="vit_base_patch16_siglip_512", stage=-1, image_size=512),
        decoder=DecoderConfig(
            hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, mlp_size=2560, norm_eps=1e-5, rotary_base=100_000.0
        ),
        vocab_size=49280,
    ),
    "qwen2": VLMConfig(
        vision=VisionConfig(name="vit_base_patch16_siglip_224", stage=-1, image_size=224),
        decoder=DecoderConfig(
            hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_size=4864, qkv_bias=True, rotary_base=1_000_000.0
        ),
        vocab_size=151_936,
    ),
    "llava": VLMConfig(
        vision=VisionConfig(library="open_clip", name="ViT-L-14-336", stage=-2, image_size=336),
        decoder=DecoderConfig(hidden_size=4096, num_layers=32, num_heads=32, mlp_size=11_008, norm_eps=1e-5),
        vocab_size=32_064,
        num_cameras=1,
    ),
    "openvla": VLMConfig(
        vision=VisionConfig(name="vit_so400m_patch14_siglip_224", stage=-2, image_size=224),
        decoder=DecoderConfig(hidden_size=4096, num_layers=32, num_heads=32, mlp_size=11_008),
        vocab_size=32_064,
        num_cameras=1,
    ),
    # 20 M parameters: sees, answers and, as it has the policy's two cameras, acts; what two cores can train in hours.
    "desk-vlm": VLMConfig(
        vision=VisionConfig(name="resnet18", stage=3, image_size=112),
        decoder=DecoderConfig(hidden_size=320, num_layers=12, num_heads=5, mlp_size=832),
        vocab_size=8192,
    ),
    # The same for a GPU: 93 M parameters.
    "desk-vlm-l": VLMConfig(
        vision=VisionConfig(name="resnet34", stage=3, image_size=112),
        decoder=DecoderConfig(hidden_size=640, num_layers=16, num_heads=10, mlp_size=1728),
        vocab_size=8192,
    ),
}


def get_preset(name: str) -> VLMConfig:
    """The preset of that name; raises ValueError listing the names."""
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]
