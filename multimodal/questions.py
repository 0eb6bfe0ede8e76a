"""A question about images as a model's prompt: text ids, with `IMAGE` where the decoder reads an image token. No torch."""

from collections.abc import Sequence

from multimodal.dialogue import EOS, encode_prompt
from multimodal.pretrained.text import PublishedTokenizer
from multimodal.tokenizer import TextTokenizer

IMAGE = -1  # stands in a list of ids where a position holds an image token


def encode_question(tokenizer: TextTokenizer, question: str, num_images: int = 0, image_id: int | None = None) -> list[int]:
    """Ids up to where the model answers; a published prompt marks each image by one `image_id`, ours by nothing.

    Raises ValueError for images in a published prompt whose model has no such id.
    """
    if not isinstance(tokenizer, PublishedTokenizer):
        return encode_prompt(tokenizer, question)
    if num_images and image_id is None:
        raise ValueError(f"{num_images} images; this model's prompt has no id for an image. Ask with text alone.")
    prompt = tokenizer.prompt
    image = [*prompt.image_before_ids, *([] if image_id is None else [image_id]), *prompt.image_after_ids]
    return [*prompt.before_ids, *image * num_images, *tokenizer.encode(question)]


def end_id(tokenizer: TextTokenizer) -> int:
    """The id that ends an answer of a model trained here."""
    return tokenizer.token_id(EOS)


def expand_images(
    ids: Sequence[int], num_images: int, per_image: int, marker: int | None, places: int | None = None
) -> list[int]:
    """A prompt's ids with `IMAGE` at each of its num_images * per_image image positions.

    marker: id that stands once per image or once per image position; without one in `ids` the images come first. places: most
    images that the model tells apart. Raises ValueError for another count, or more images than places.
    """
    if places is not None and num_images > places:
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
