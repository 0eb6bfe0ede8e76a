"""From an image tower's patches to tokens as wide as the decoder: one family of projectors for every published layout."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multimodal.config import ProjectorConfig
from multimodal.layers import RMSNorm


class Projector(nn.Module):
    """Norm each patch, put side x side patches side by side, then linear layers with exact GELU between them.

    LLaVA: two layers. Prismatic: two, or three behind fused towers. Idefics3: 4 x 4 patches (pixel shuffle), one layer.
    Qwen2-VL: norm, 2 x 2 patches, two layers. PaliGemma: one layer.
    """

    def __init__(self, config: ProjectorConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.side = config.group_side
        self.norm = _build_norm(config, in_width)
        widths = [in_width * self.side**2, *config.hidden_sizes, out_width]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(narrow, wide, bias=config.bias) for narrow, wide in pairs)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """patches [N, rows * columns, in_width] in row-major order, grid (rows, columns) -> [N, P, out_width].

        P = rows * columns / side^2, row-major over the groups.
        """
        x = group_patches(self.norm(patches), grid, self.side)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


def group_patches(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[N, rows * columns, D] -> [N, rows / side * columns / side, side * side * D]; a group's channels go row by row.

    Raises ValueError if the grid is not a multiple of `side`.
    """
    if side == 1:
        return patches
    rows, columns = grid
    if rows % side or columns % side:
        raise ValueError(
            f"An image of {rows} x {columns} patches cannot be grouped {side} by {side}; resize images so that both counts are "
            f"multiples of {side} (ImageConfig.size)."
        )
    # shape[0] and not len(): an exporter would freeze a length that Python has read
    x = patches.reshape(patches.shape[0], rows // side, side, columns // side, side, -1)
    return x.transpose(2, 3).reshape(patches.shape[0], rows // side * (columns // side), -1)


def ungroup_patches(groups: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Inverse of `group_patches`: [N, rows / side * columns / side, side * side * D] -> [N, rows * columns, D]."""
    rows, columns = grid
    x = groups.reshape(groups.shape[0], rows // side, columns // side, side, side, -1)
    return x.transpose(2, 3).reshape(groups.shape[0], rows * columns, -1)


def _build_norm(config: ProjectorConfig, width: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps) if config.norm == "rms" else nn.Identity()


def append_newline(tokens: Tensor, newline: Tensor) -> Tensor:
    """One trained token [D] behind each image's tokens: [N, P, D] -> [N, P + 1, D]."""
    return torch.cat([tokens, newline.to(tokens.dtype).expand(tokens.shape[0], 1, -1)], dim=1)
