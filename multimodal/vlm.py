"""The vision-language model: image tower, projector, text embeddings, the one decoder, and a language head behind it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from multimodal.attention import causal_mask
from multimodal.config import ProjectorConfig, VLMConfig
from multimodal.decoder import EMBEDDING_STD, Decoder, arange_positions, initialise
from multimodal.projector import Projector, append_newline
from multimodal.questions import IMAGE, expand_images
from multimodal.sampling import SamplingConfig, choose
from multimodal.vision import VisionTower


class VLM(nn.Module):
    """Embeds images and text into one sequence and runs the decoder over it.

    As a language model it is causal, position t's hidden state giving the logits of t + 1; only image tokens that stand
    together see each other whole (if the config says so), whatever text follows.
    """

    def __init__(self, config: VLMConfig, tower: VisionTower | None = None) -> None:
        """tower: one that is built already, when the rest is laid out without memory (multimodal/pretrained)."""
        super().__init__()
        self.config = config
        width = config.decoder.hidden_size
        if config.vision is not None:
            self.vision = tower or VisionTower(config.vision)
            plain = config.projector == ProjectorConfig()
            narrow = self.vision.width
            self.projector = nn.Linear(narrow, width) if plain else Projector(config.projector, narrow, width)
            if config.image_positions:
                self.image_positions = nn.Parameter(torch.zeros(config.num_cameras, self.tokens_per_image, width))
            if config.projector.newline:
                self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        if config.vision is not None:
            self.projector.apply(initialise)
        for module in (self.text_embedding, *([] if self.head is None else [self.head])):
            initialise(module)
        if config.vision is not None and config.image_positions:
            nn.init.normal_(self.image_positions, std=EMBEDDING_STD)
        self.decoder = Decoder(config.decoder)
        if config.num_new_tokens:
            self.new_embedding = nn.Embedding(config.num_new_tokens, width)
            self.new_head = None if config.tie_embeddings else nn.Linear(width, config.num_new_tokens, bias=False)

    # ---------------------------------------------------------------------------------------------------------- images

    @property
    def tokens_per_image(self) -> int:
        """Tokens the decoder sees of one image of the config's size; 0 without a tower."""
        if self.config.vision is None:
            return 0
        return self.vision.tokens_per_image // self.config.projector.group_side**2 + self.config.projector.newline

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_cameras * self.tokens_per_image

    def embed_images(self, images: Tensor) -> Tensor:
        """Float images [B, C, 3, H, W] in the tower's range -> [B, C * P, hidden_size], place marked if the config says so."""
        if isinstance(self.projector, Projector):
            tokens = self.image_features(images.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(1, 2)
        else:
            tokens = self.projector(self.vision(images))
        return tokens + self.image_positions.flatten(0, 1) if self.config.image_positions else tokens

    def image_features(self, images: Tensor) -> Tensor:
        """Float images [N, 3, H, W] -> [N, P, hidden_size]: what depends on an image's content alone (so it can be cached)."""
        tokens = self.patch_features(images)
        return append_newline(tokens, self.image_newline) if self.config.projector.newline else tokens

    def patch_features(self, images: Tensor) -> Tensor:
        """Like `image_features`, without the newline token: what tiles of one image are packed from (multimodal/tiles.py)."""
        patches = self.vision(images[:, None])
        if not isinstance(self.projector, Projector):
            return self.projector(patches)
        side = self.config.projector.group_side
        return self.projector(patches, (1, patches.shape[1]) if side == 1 else self.vision.grid(*images.shape[2:]))

    def image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens that the decoder sees of an image of that size."""
        rows, columns = self.vision.grid(height, width)
        return rows // self.config.projector.group_side, columns // self.config.projector.group_side

    # ------------------------------------------------------------------------------------------------------------ text

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, hidden_size]."""
        if self.config.num_new_tokens:
            is_new = text_ids >= self.config.vocab_size
            grown = self.new_embedding((text_ids - self.config.vocab_size).clamp(min=0))
            embedded = torch.where(is_new[..., None], grown, self.text_embedding(text_ids.masked_fill(is_new, 0)))
        else:
            embedded = self.text_embedding(text_ids)
        scale = self.config.text_scale
        # Rounded to the embeddings' dtype first, as in training (Gemma's released code).
        return embedded if scale == 1.0 else embedded * embedded.new_tensor(scale)

    # ---------------------------------------------------------------------------------------------------------- prompt

    def place_images(self, features: Tensor, first: int = 0) -> Tensor:
        """Features [N, P, hidden_size] of a sequence's images number first, first + 1, ..., marked if the config says so."""
        return features + self.image_positions[first : first + len(features)] if self.config.image_positions else features

    def expand_prompt(self, ids: Sequence[int], num_images: int) -> list[int]:
        """A prompt's ids with `IMAGE` at each of its num_images * P image positions.

        The config's image token stands once per image or once per image position; without one in `ids` the images come first.
        Raises ValueError for another count, or more images than the model has places for.
        """
        if num_images and self.config.vision is None:
            raise ValueError(f"{num_images} images; the model has no image tower (VLMConfig.vision). Ask with text alone.")
        places = self.config.num_cameras if self.config.image_positions else None
        return expand_images(ids, num_images, self.tokens_per_image, self.config.image_token_id, places)

    def embed_prompt(self, ids: Sequence[int], features: Tensor | None) -> Tensor:
        """Expanded ids (`IMAGE` at image positions) and image_features [N, P, hidden_size] -> [T, hidden_size]."""
        tokens = torch.tensor(ids, device=self.text_embedding.weight.device)
        embedded = self.embed_text(tokens.clamp(min=0))
        if features is None or len(features) == 0:
            return embedded
        placed = self.place_images(features).flatten(0, 1).to(embedded.dtype)
        return embedded.masked_scatter((tokens == IMAGE)[:, None], placed)

    # ---------------------------------------------------------------------------------------------------------- outputs

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size + num_new_tokens, hidden_size]; logits are scale_for_head(hidden) @ head_weight.T.

        A grown vocabulary's rows are joined anew by every call; `logits` has no need of that.
        """
        table = self.text_embedding.weight if self.head is None else self.head.weight
        return torch.cat([table, self._new_head_weight]) if self.config.num_new_tokens else table

    @property
    def _new_head_weight(self) -> Tensor:
        return self.new_embedding.weight if self.new_head is None else self.new_head.weight

    def scale_for_head(self, hidden: Tensor) -> Tensor:
        """What meets `head_weight`, in the fused losses too: logit_scale * hidden."""
        return hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden_size] of the decoder -> logits [..., vocab_size + num_new_tokens] of the next token."""
        scaled = self.scale_for_head(hidden)
        if self.config.num_new_tokens == 0:
            return nn.functional.linear(scaled, self.head_weight)
        table = self.text_embedding.weight if self.head is None else self.head.weight
        return torch.cat([nn.functional.linear(scaled, table), nn.functional.linear(scaled, self._new_head_weight)], dim=-1)

    def sequence_mask(self, ids: Sequence[int], start: int = 0) -> Tensor:
        """Who sees whom in expanded ids: the positions from `start` on, among all of them. bool [T - start, T]

        Raises ValueError for a model whose masks or positions ids alone do not tell.
        """
        if self.config.bidirectional_prompt or self.config.decoder.positions == "mrotary":
            raise ValueError(
                "This model's prompt sees itself whole, or its images stand on a grid (VLMConfig.bidirectional_prompt, "
                "DecoderConfig.positions mrotary); read it with multimodal.sequences.read and go_on."
            )
        is_image = torch.tensor(ids, device=self.text_embedding.weight.device) == IMAGE
        mask = causal_mask(len(ids) - start, len(ids), is_image.device)
        if not self.config.bidirectional_images:
            return mask
        run = (is_image & ~is_image.roll(1)).cumsum(0).masked_fill(~is_image, -1)  # number of the run of image tokens
        return mask | ((run[start:, None] == run[None]) & is_image)

    def hidden(self, embeddings: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """One pass without a cache: embeddings [B, T, hidden_size] of expanded ids, rows padded on the right; the same shape.
        """
        batch, length = embeddings.shape[:2]
        masks = [self.sequence_mask([*row, *[0] * (length - len(row))]) for row in ids]
        positions = arange_positions(batch, 0, length, embeddings.device)
        return self.decoder(embeddings, torch.stack(masks)[:, None], positions)


def image_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of each run of image positions in expanded ids."""
    neighbours = zip([0, *ids], [*ids, 0], strict=True)
    edges = [place for place, (left, right) in enumerate(neighbours) if (left == IMAGE) != (right == IMAGE)]
    return list(zip(edges[::2], edges[1::2], strict=True))


@torch.inference_mode()
def generate(
    model: VLM, prompt: Sequence[int], images: Tensor | None = None, *, sampling: SamplingConfig | None = None,
    max_tokens: int = 64, stop_ids: Collection[int] = (),
) -> list[int]:  # fmt: skip
    """THE slow truth: the whole sequence through the model for every token, no cache. Every fast path must give its tokens.

    prompt: expanded ids; images: float [N, 3, h, w] in the tower's range. Returns the answer's ids, a stop id the last of them.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    features = None if images is None or len(images) == 0 else model.image_features(images)
    answer: list[int] = []
    while len(answer) < max_tokens and not (answer and answer[-1] in stop_ids):
        ids = [*prompt, *answer]
        hidden = model.hidden(model.embed_prompt(ids, features)[None], [ids])
        logits = model.logits(hidden[0, -1]).double().cpu().numpy()
        answer.append(choose(logits, sampling, len(prompt) + len(answer), prompt, answer))
    return answer
