"""Checkpoints in ImageBind's layout as ModalityEncoders: towers, the table of its names, loading.

A tower: patches, class token, learned positions, (vision) a norm, pre-norm blocks with exact GELU, norm of the class token,
projection without bias. Towers other than vision and text attend to one more key and value, a trained pair that stands
behind the sequence. Widths and depths are read off the weights; head counts are not in them and come from the caller.
The outputs are of unit length: the fixed factors that the checkpoint holds per modality (20 audio, 5 depth, 10 thermal,
5 IMU) become `logit_scale`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.bind.interface import Box
from multimodal.bind.modalities import box_of
from multimodal.checkpoint import load_weights

NORM_EPS, STEM_NORM_EPS = 1e-6, 1e-5
HEADS = {"vision": 16, "audio": 12, "depth": 8, "thermal": 12, "imu": 8}  # of imagebind_huge
STEMS = {
    "vision": "rgbt_stem.proj.1", "audio": "rgbt_stem.proj", "thermal": "rgbt_stem.proj", "depth": "depth_stem.proj",
    "imu": "imu_stem.proj",
}  # fmt: skip
# whose box is attacked
SENSOR_OF = {"vision": "image", "audio": "audio", "depth": "depth", "thermal": "thermal", "imu": "trace"}

# Of one tower: our name -> the checkpoint's, {m} the modality, {stem} from STEMS, {i} a block, {p} the head's last layer.
NAMES: Mapping[str, str] = {
    "class_token": "modality_preprocessors.{m}.cls_token",
    "positions": "modality_preprocessors.{m}.{helper}pos_embed",
    "stem.weight": "modality_preprocessors.{m}.{stem}.weight",
    "stem_norm.weight": "modality_preprocessors.{m}.{norm}.weight",
    "stem_norm.bias": "modality_preprocessors.{m}.{norm}.bias",
    "first_norm.weight": "modality_trunks.{m}.pre_transformer_layer.0.weight",
    "first_norm.bias": "modality_trunks.{m}.pre_transformer_layer.0.bias",
    "last_norm.weight": "modality_heads.{m}.0.weight",
    "last_norm.bias": "modality_heads.{m}.0.bias",
    "projection.weight": "modality_heads.{m}.{p}.weight",
}
BLOCK_NAMES: Mapping[str, str] = {
    "attention_norm.weight": "norm_1.weight", "attention_norm.bias": "norm_1.bias",
    "output.weight": "attn.out_proj.weight", "output.bias": "attn.out_proj.bias",
    "mlp_norm.weight": "norm_2.weight", "mlp_norm.bias": "norm_2.bias",
    "up.weight": "mlp.fc1.weight", "up.bias": "mlp.fc1.bias", "down.weight": "mlp.fc2.weight", "down.bias": "mlp.fc2.bias",
    "extra_key": "attn.bias_k", "extra_value": "attn.bias_v",
}  # fmt: skip


@dataclass(frozen=True)
class TowerShape:
    """What the weights say of a tower, and the number of heads."""

    modality: str  # ImageBind's word
    width: int
    num_blocks: int
    num_heads: int
    mlp_size: int
    dimension: int
    stem: tuple[int, ...]  # weight's shape
    num_positions: int  # class token included
    has_stem_norm: bool
    has_first_norm: bool
    has_extra_key: bool
    stride: int = 0  # of the stem; 0: its kernel (audio: 10)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); linear layers apart, so that adapters find each."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        width = shape.width
        self.num_heads = shape.num_heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, shape.mlp_size), nn.Linear(shape.mlp_size, width)
        if shape.has_extra_key:
            self.extra_key, self.extra_value = (nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2))
        else:
            self.extra_key = self.extra_value = None

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.extra_key is not None:
            key = torch.cat([key, self.extra_key.expand(len(x), -1, -1)], 1)
            value = torch.cat([value, self.extra_value.expand(len(x), -1, -1)], 1)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        return self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class ImageBindTower(nn.Module):
    """A ModalityEncoder of one ImageBind tower. Inputs in the sensor's box are mapped to what the tower saw in training by
    (x - mean) / std, per channel where there are several."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: TowerShape, *, box: Box, logit_scale: float, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.shape, self.box, self.logit_scale = shape, box, logit_scale
        self.modality, self.dimension = SENSOR_OF[shape.modality], shape.dimension
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        width, stem = shape.width, shape.stem
        kernel = stem[2:]
        if len(kernel) == 3:
            self.stem: nn.Module = nn.Conv3d(stem[1], width, kernel, stride=kernel, bias=False)
        elif len(kernel) == 2:
            self.stem = nn.Conv2d(stem[1], width, kernel, stride=shape.stride or kernel, bias=False)
        else:
            self.stem = nn.Linear(stem[1], width, bias=False)
        self.stem_norm = nn.LayerNorm(width, eps=STEM_NORM_EPS) if shape.has_stem_norm else nn.Identity()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, shape.num_positions, width))
        self.first_norm = nn.LayerNorm(width, eps=NORM_EPS) if shape.has_first_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.last_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.projection = nn.Linear(width, shape.dimension, bias=False)

    def patches(self, inputs: Tensor) -> Tensor:
        """Normalised inputs -> [B, T, width]. A picture becomes a film of equal frames, as long as the vision stem's kernel."""
        if isinstance(self.stem, nn.Linear):  # [B, C, samples] -> windows of all channels side by side
            size = self.shape.stem[1] // inputs.shape[1]
            windows = inputs.unfold(2, size, size).permute(0, 2, 1, 3).flatten(2)
            return self.stem_norm(self.stem(windows))
        if isinstance(self.stem, nn.Conv3d) and inputs.ndim == 4:
            inputs = inputs[:, :, None].expand(-1, -1, self.shape.stem[2], -1, -1)
        return self.stem_norm(self.stem(inputs).flatten(2).transpose(1, 2))

    def tokens(self, inputs: Tensor) -> Tensor:
        """Inputs in the box -> hidden states behind the last block [B, 1 + T, width], class token first."""
        patches = self.patches((inputs - self.mean) / self.std)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        if x.shape[1] != self.shape.num_positions:
            raise ValueError(
                f"ImageBind's {self.shape.modality} tower has {self.shape.num_positions - 1} patches, these inputs "
                f"{list(inputs.shape)} make {x.shape[1] - 1}. Resize them to what the checkpoint was trained on."
            )
        x = self.first_norm(x + self.positions)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, inputs: Tensor) -> Tensor:
        """Inputs [B, *shape] in the box -> unit vectors [B, dimension]."""
        return F.normalize(self.projection(self.last_norm(self.tokens(inputs)[:, 0])), dim=-1)

    forward = embed


def tower_shape(state: Mapping[str, Tensor], modality: str, num_heads: int | None = None, stride: int = 0) -> TowerShape:
    """Read off the weights. Raises ValueError if they hold no such tower."""
    if modality not in STEMS:
        raise ValueError(f"No ImageBind tower {modality!r}; allowed: {', '.join(STEMS)}.")
    names = _names(modality)
    if names["stem.weight"] not in state:
        raise ValueError(
            f"The weights hold no {names['stem.weight']}; they are not in ImageBind's layout, or lack its {modality} tower."
        )
    stem = state[names["stem.weight"]]
    prefix = f"modality_trunks.{modality}.blocks."
    blocks = {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
    width, heads = stem.shape[0], num_heads or HEADS[modality]
    if width % heads:
        raise ValueError(f"The {modality} tower is {width} wide, which {heads} heads do not divide; give num_heads.")
    return TowerShape(
        modality, width, len(blocks), heads, state[f"{prefix}0.mlp.fc1.weight"].shape[0],
        state[names["projection.weight"]].shape[0], tuple(stem.shape), state[names["positions"]].shape[-2],
        names["stem_norm.weight"] in state, names["first_norm.weight"] in state, f"{prefix}0.attn.bias_k" in state,
        stride or (10 if modality == "audio" else 0),
    )  # fmt: skip


def tower_weights(state: Mapping[str, Tensor], shape: TowerShape) -> dict[str, Tensor]:
    """The tower's weights by our names; query, key and value stand in one matrix in the checkpoint."""
    names = _names(shape.modality)
    weights = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    for index in range(shape.num_blocks):
        prefix = f"modality_trunks.{shape.modality}.blocks.{index}."
        for ours, theirs in BLOCK_NAMES.items():
            if prefix + theirs in state:
                weights[f"blocks.{index}.{ours}"] = state[prefix + theirs]
        for kind in ("weight", "bias"):
            parts = state[f"{prefix}attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                weights[f"blocks.{index}.{name}.{kind}"] = part
    weights["class_token"] = weights["class_token"].reshape(1, 1, -1)
    weights["positions"] = weights["positions"].reshape(1, shape.num_positions, -1)
    return weights


def load_imagebind_tower(
    state: Mapping[str, Tensor], modality: str, *, num_heads: int | None = None, stride: int = 0, box: Box | None = None,
    mean: Tensor | float = 0.0, std: Tensor | float = 1.0,
) -> ImageBindTower:  # fmt: skip
    """The tower of `modality` (vision, audio, depth, thermal, imu) in eval mode. mean, std: of the inputs in their box; shapes
    broadcast to one sample. Raises ValueError listing what is missing or of another shape."""
    shape = tower_shape(state, modality, num_heads, stride)
    factor = state.get(f"modality_postprocessors.{modality}.1.log_logit_scale")
    scale = 1 / 0.07 if factor is None else min(float(factor.exp()), 100.0)
    tower = ImageBindTower(
        shape, box=box or box_of(SENSOR_OF[modality]), logit_scale=scale,
        mean=torch.as_tensor(mean, dtype=torch.float32), std=torch.as_tensor(std, dtype=torch.float32),
    )  # fmt: skip
    load_weights(tower, tower_weights(state, shape), f"the ImageBind checkpoint's {modality} tower")
    return tower.eval()


def _names(modality: str) -> dict[str, str]:
    stem = STEMS[modality]
    helper = "pos_embedding_helper." if modality != "imu" else ""
    last = 3 if modality == "imu" else 2
    fields = {"m": modality, "stem": stem, "norm": stem.split(".")[0] + ".norm_layer", "helper": helper, "p": last}
    return {ours: theirs.format(**fields) for ours, theirs in NAMES.items()}
