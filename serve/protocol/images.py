"""Pictures that somebody sent: PNG and JPEG files to uint8 arrays, measured before they are decoded."""

import base64
import binascii
import io

import numpy as np

from serve.protocol.refusal import Code, Refusal

FORMATS = ("PNG", "JPEG")


def decode_image(data: bytes, *, max_pixels: int) -> np.ndarray:
    """A PNG or JPEG file -> uint8 [H, W, 3]; transparency is dropped.

    The size is read from the header first, so a small file cannot unfold into gigabytes.
    Raises Refusal for another format, too many pixels or a damaged file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise _too_large(f"{image.width} x {image.height}", max_pixels)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise Refusal.invalid(f"An image of {len(data)} bytes is neither PNG nor JPEG.") from error
    except Image.DecompressionBombError as error:
        raise _too_large("more than 178 million", max_pixels) from error
    except (OSError, ValueError, SyntaxError) as error:  # what damaged files raise in Pillow
        raise Refusal.invalid(f"An image of {len(data)} bytes cannot be decoded: {error}") from error


def encode_jpeg(image: np.ndarray, *, quality: int = 85) -> bytes:
    """uint8 [H, W, 3] -> a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def fit_image(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size, size, 3]: padded with black to a square about its centre, then resized with antialiasing.

    The image itself if it has that size. openpi's robots send 224 pixels, whatever the policy was trained on.
    """
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = max(height, width)
    scale = size / side
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(inner, Image.Resampling.BILINEAR))
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - inner[1]) // 2, (size - inner[0]) // 2
    square[top : top + inner[1], left : left + inner[0]] = resized
    return square


def decode_data_url(url: str, *, max_bytes: int, max_pixels: int) -> np.ndarray:
    """A "data:image/png;base64,..." URL -> uint8 [H, W, 3]. Raises Refusal; no other kind of URL is ever fetched."""
    head, comma, payload = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        shown = url[:40]
        raise Refusal.invalid(
            f"Image URL {shown!r} is no data URL. This server fetches nothing: send data:image/png;base64,... or image/jpeg."
        )
    if len(payload) * 3 // 4 > max_bytes:
        raise Refusal(Code.TOO_LARGE, f"An image of {len(payload) * 3 // 4} bytes; at most {max_bytes} are accepted.")
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal.invalid(f"An image's data URL is no base64: {error}") from error
    return decode_image(data, max_pixels=max_pixels)


def _too_large(size: str, max_pixels: int) -> Refusal:
    return Refusal(Code.TOO_LARGE, f"The image has {size} pixels; at most {max_pixels} are accepted.")
