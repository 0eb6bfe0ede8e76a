"""The vision-language model: image tower, projector and text embeddings in front of the one decoder."""

import torch
from torch import Tensor, nn

from multimodal.config import VLMConfig
from multimodal.decoder import EMBEDDING_STD, Decoder, initialise
from multimodal.vision import VisionTower


class VLM(nn.Module):
    """Embeds images and text into one sequence and runs the decoder over it."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.hidden_size
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(self.vision.width, width)
        self.image_positions = nn.Parameter(torch.zeros(config.num_cameras, self.vision.tokens_per_image, width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        for module in (self.projector, self.text_embedding):
            initialise(module)
        nn.init.normal_(self.image_positions, std=EMBEDDING_STD)
        self.decoder = Decoder(config.decoder)

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_cameras * self.vision.tokens_per_image

    def embed_images(self, images: Tensor) -> Tensor:
        """Float images [B, C, 3, H, W] in the tower's range -> [B, C * P, hidden_size], camera and place marked."""
        tokens = self.projector(self.vision(images))
        return tokens + self.image_positions.flatten(0, 1)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, hidden_size]."""
        return self.text_embedding(text_ids)
