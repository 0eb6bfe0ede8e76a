"""The vision-language model: image tower, projector, text embeddings, the one decoder, and a language head behind it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from multimodal.attention import causal_mask
from multimodal.config import VLMConfig
from multimodal.decoder import EMBEDDING_STD, Decoder, arange_positions, initialise
from multimodal.sampling import SamplingConfig, choose
from multimodal.vision import VisionTower

IMAGE = -1  # stands in a list of ids where a position holds an image token


class VLM(nn.Module):
    """Embeds images and text into one sequence and runs the decoder over it.

    As a language model it is causal, position t's hidden state giving the logits of t + 1; only image tokens that stand
    together see each other whole (if the config says so), whatever text follows.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder.hidden_size
        self.vision = VisionTower(config.vision)
        self.projector = nn.Linear(self.vision.width, width)
        self.image_positions = nn.Parameter(torch.zeros(config.num_cameras, self.vision.tokens_per_image, width))
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.head = None if config.tie_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        for module in (self.projector, self.text_embedding, *([] if self.head is None else [self.head])):
            initialise(module)
        nn.init.normal_(self.image_positions, std=EMBEDDING_STD)
        self.decoder = Decoder(config.decoder)

    @property
    def tokens_per_image(self) -> int:
        return self.vision.tokens_per_image

    @property
    def num_image_tokens(self) -> int:
        return self.config.num_cameras * self.tokens_per_image

    # ---------------------------------------------------------------------------------------------------------- inputs

    def embed_images(self, images: Tensor) -> Tensor:
        """Float images [B, C, 3, h, w] in the tower's range -> [B, C * P, hidden_size], camera and place marked."""
        tokens = self.projector(self.vision(images))
        return tokens + self.image_positions.flatten(0, 1)

    def embed_text(self, text_ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, hidden_size]."""
        return self.text_embedding(text_ids)

    def image_features(self, images: Tensor) -> Tensor:
        """Float images [N, 3, h, w] -> [N, P, hidden_size]: what depends on an image's content alone (so it can be cached)."""
        return self.projector(self.vision(images[:, None]))

    def place_images(self, features: Tensor, first: int = 0) -> Tensor:
        """Features [N, P, hidden_size] of a sequence's images number first, first + 1, ... with their place marked."""
        return features + self.image_positions[first : first + len(features)]

    def expand_prompt(self, ids: Sequence[int], num_images: int) -> list[int]:
        """A prompt's ids with `IMAGE` at each of its num_images * P image positions.

        The config's image token stands once per image or once per image position; without one in `ids` the images come first.
        Raises ValueError for another count, or more images than the model has places for.
        """
        per_image, marker = self.tokens_per_image, self.config.image_token_id
        if num_images > self.config.num_cameras:
            places = self.config.num_cameras
            raise ValueError(f"{num_images} images; the model has places for {places} (VLMConfig.num_cameras).")
        marked = sum(token == marker for token in ids)
        if marked not in (0, num_images, num_images * per_image):
            raise ValueError(
                f"The prompt marks {marked} image positions for {num_images} images of {per_image} tokens; expected none, one "
                f"per image ({num_images}) or one per token ({num_images * per_image})."
            )
        if marked == 0:
            return [IMAGE] * (num_images * per_image) + list(ids)
        times = 1 if marked == num_images * per_image else per_image
        return [each for token in ids for each in ([IMAGE] * times if token == marker else [token])]

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
        """[vocab_size, hidden_size]; logits are scale_for_head(hidden) @ head_weight.T."""
        return self.text_embedding.weight if self.head is None else self.head.weight

    def scale_for_head(self, hidden: Tensor) -> Tensor:
        """What meets `head_weight`, in the fused losses too: logit_scale * hidden."""
        return hidden if self.config.logit_scale == 1.0 else hidden * self.config.logit_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden_size] of the decoder -> logits [..., vocab_size] of the next token."""
        return nn.functional.linear(self.scale_for_head(hidden), self.head_weight)

    def sequence_mask(self, ids: Sequence[int], start: int = 0) -> Tensor:
        """Who sees whom in expanded ids: the positions from `start` on, among all of them. bool [T - start, T]"""
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
