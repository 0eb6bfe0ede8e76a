"""Image features by content: the same pixels are encoded once, for whoever asks, target or draft."""

import hashlib
from collections import OrderedDict

import numpy as np
from torch import Tensor


def image_key(image: np.ndarray) -> str:
    """Name of an image's content: uint8 [H, W, 3] -> hexadecimal digest."""
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


class ImageCache:
    """Least recently used features leave when `max_bytes` is exceeded. One model and one preprocessing per cache.

    A miss is an answer, not an error: the target encodes again, a draft goes on without the image.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = self.misses = 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def peek(self, key: str) -> Tensor | None:
        """Like `get`, for who does without: counts as no look-up and keeps nothing longer."""
        return self._features.get(key)

    def get(self, key: str) -> Tensor | None:
        """Features [P, width], or None."""
        features = self._features.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: str, features: Tensor) -> None:
        """Keep features [P, width]; what is larger than the whole cache is not kept."""
        if features.nbytes > self.max_bytes:
            return
        self._drop(key)
        self._features[key] = features
        self.num_bytes += features.nbytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._features)))

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0

    def _drop(self, key: str) -> None:
        features = self._features.pop(key, None)
        if features is not None:
            self.num_bytes -= features.nbytes
