"""Image towers of timm, open_clip and transformers behind one call: images [B, C, 3, H, W] -> tokens [B, C * P, D]."""

import torch
from torch import Tensor, nn

from multimodal.config import VisionConfig
from multimodal.published_towers import build_timm_vit, build_transformers_tower


IMAGE_LAYOUT = torch.channels_last  # of images and convolution weights; what it is worth: `vla bench training`


class VisionTower(nn.Module):
    """One tower shared by all cameras; its feature map or patch tokens in row-major order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.mean, self.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.tower, self.width, self.tokens_per_image = _BUILDERS[config.library](config)

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, C, 3, H, W], normalised by multimodal.images. Returns [B, C * P, width]."""
        batch, cameras = images.shape[:2]
        flat = images.flatten(0, 1).contiguous(memory_format=IMAGE_LAYOUT)
        tokens = self.tower(flat)  # [B * C, P, width]
        return tokens.reshape(batch, cameras * tokens.shape[1], tokens.shape[2])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size. Raises ValueError for a tower that does not name its patch size."""
        patch = getattr(self.tower, "patch_size", None)
        if patch is None:
            raise ValueError(f"A {self.config.library} tower has no fixed patch size; group its tokens with group_side 1.")
        return height // patch, width // patch


class _TimmTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        import timm  # slow to import, needed only where a tower is built

        pretrained = config.pretrained is not None
        name = config.name if config.pretrained in (None, "true") else f"{config.name}.{config.pretrained}"
        options = dict(config.options)
        stage = config.stage
        if stage < 0:
            stage = len(timm.create_model(config.name, features_only=True, **options).feature_info) + stage
        self.features = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=(stage,), **options
        ).to(memory_format=IMAGE_LAYOUT)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0].flatten(2).transpose(1, 2)


class _OpenClipTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        import open_clip

        model = open_clip.create_model(config.name, pretrained=config.pretrained, force_image_size=config.image_size)
        self.visual = model.visual
        self.stage = config.stage

    def forward(self, images: Tensor) -> Tensor:
        maps = self.visual.forward_intermediates(
            images, indices=[self.stage], intermediates_only=True, output_fmt="NLC"
        )
        return maps["image_intermediates"][0]


def _measure(tower: nn.Module, config: VisionConfig) -> tuple[nn.Module, int, int]:
    """Width and tokens per image, found by running one blank image."""
    was_training = tower.training
    tower.eval()
    with torch.no_grad():
        tokens = tower(torch.zeros(1, 3, config.image_size, config.image_size))
    tower.train(was_training)
    return tower, tokens.shape[2], tokens.shape[1]


_BUILDERS = {
    "timm": lambda config: _measure(_TimmTower(config), config),
    "open_clip": lambda config: _measure(_OpenClipTower(config), config),
    "timm_vit": build_timm_vit,
    "transformers": build_transformers_tower,
}
