"""An exported vision-language model on onnxruntime, numpy and tokenizers alone: read a prompt with images, answer.

    model = load_onnx_vlm("EXPORT")
    ids = generate(model, model.encode("What is on the table?", 1), model.prepare([frame]))
    print(model.tokenizer.decode(ids))
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.config import ImageConfig
from multimodal.numpy_images import prepare_images, scaled_frame
from multimodal.onnx_folder import TOKENIZER, as_tuples, load_manifest, manifest_hash, save_manifest
from multimodal.onnx_runner import OnnxRunner
from multimodal.pretrained.text import PublishedTokenizer
from multimodal.prompt import PromptConfig
from multimodal.questions import IMAGE, encode_question, expand_images
from multimodal.sampling import SamplingConfig, choose
from multimodal.tokenizer import TextTokenizer

FORMAT = "remask-onnx-vlm-1"
BLOCK = 64  # a cache's capacity is a multiple of this many positions


@dataclass(frozen=True)
class VLMManifest:
    """Plain values, as JSON holds them."""

    precision: str  # float32 | float16 | int8
    opset: int
    vocab_size: int
    tokens_per_image: int  # 0: a model without images
    places: int | None  # images that a sequence may hold; None: any number
    image_id: int | None  # text id that marks an image in a prompt; None: images come first
    eos_ids: list[int]
    images: dict[str, Any]  # ImageConfig
    frame_size: int | None  # pixels of the shorter side that frames are scaled to; None: they are taken as they come
    prompt: dict[str, Any] | None  # PromptConfig of a published model; None: multimodal/dialogue.py
    graphs: dict[str, Any]  # name -> file, inputs and outputs with dtype and shape
    files: dict[str, str]  # file name -> sha256
    source: dict[str, Any]  # hash and provenance of the checkpoint
    versions: dict[str, str | None]
    parity: dict[str, Any]  # what the gate measured, see multimodal/onnx_vlm_parity.py

    def save(self, folder: Path) -> None:
        save_manifest(folder, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "VLMManifest":
        """Raises FileNotFoundError without a manifest, ValueError for another format or a file that was changed."""
        made_by = f"vla export --vlm.path=CHECKPOINT --output_dir={folder}"
        values = load_manifest(folder, FORMAT, "vision-language model", made_by)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class OnnxVLM:
    """Graphs, tokenizer and what the model expects of an image."""

    manifest: VLMManifest
    tokenizer: TextTokenizer
    vision: OnnxRunner | None
    language: OnnxRunner
    content_hash: str = ""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return tuple(self.manifest.eos_ids)

    def encode(self, question: str, num_images: int = 0) -> list[int]:
        """A prompt's ids, `IMAGE` where an image token stands. Raises ValueError for images that the model cannot take."""
        manifest = self.manifest
        if num_images and self.vision is None:
            raise ValueError(f"{num_images} images; this model reads text alone.")
        ids = encode_question(self.tokenizer, question, num_images, manifest.image_id)
        return expand_images(ids, num_images, manifest.tokens_per_image, manifest.image_id, manifest.places)

    def prepare(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] each -> float32 [N, 3, h, w] in the tower's range; raises ValueError for what is no such image."""
        config = ImageConfig(**as_tuples(self.manifest.images))
        frames = [prepare_images(scaled_frame(image, self.manifest.frame_size), config) for image in images]
        return np.stack(frames) if frames else np.zeros((0, 3, config.output_size, config.output_size), np.float32)

    def features(self, images: np.ndarray | None) -> np.ndarray | None:
        """Images float32 [N, 3, h, w] of one sequence -> [N, P, width]; None for a model without a tower."""
        if self.vision is None:
            return None
        port = next(port for port in self.language.inputs if port.name == "features")
        if images is None or len(images) == 0:
            return np.zeros((0, *port.shape[1:]), port.dtype)
        feeds = {"images": images} | ({"places": np.arange(len(images))} if self.manifest.places is not None else {})
        return self.vision.run(feeds)["features"]


class Reader:
    """B sequences of one cache of fixed capacity, which every call extends in place."""

    def __init__(self, model: OnnxVLM, batch: int, capacity: int) -> None:
        self.model, self.lengths, self.capacity = model, np.zeros(batch, np.int64), capacity
        graph = model.language
        caches = [port for port in graph.inputs if port.name.startswith(("keys.", "values."))]
        self._cache = {
            port.name: graph.on_device(np.zeros((batch, port.shape[1], capacity, port.shape[3]), port.dtype)) for port in caches
        }
        self._written = {f"new_{name}": value for name, value in self._cache.items()}  # the same memory
        self._no_images = model.features(None)

    def read(self, rows: Sequence[Sequence[int]], features: np.ndarray | None = None) -> np.ndarray:
        """Append expanded ids, at least one to each sequence; logits float32 [B, V] after each row's last.

        features [M, P, width] of all images in the rows, in order; an image's ids must come in one call. Raises ValueError
        beyond the capacity, or if the rows mark another number of image positions.
        """
        given = np.array([len(row) for row in rows])
        longest = int(given.max())
        if (self.lengths + longest).max() > self.capacity:
            raise ValueError(f"{longest} more ids after {self.lengths.max()} exceed the cache's capacity of {self.capacity}.")
        marked = sum(token == IMAGE for row in rows for token in row)
        known = 0 if features is None else features.shape[0] * features.shape[1]
        if marked != known:
            raise ValueError(f"The ids mark {marked} image positions; the images have {known} tokens.")
        ids = np.zeros((len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        feeds: dict[str, Any] = {"ids": ids, "start": self.lengths, "last": given - 1, **self._cache}
        if self.model.vision is not None:
            feeds["features"] = self._no_images if features is None else features
        logits = self.model.language.run(feeds, into=self._written)["logits"]
        self.lengths = self.lengths + given
        return logits


def generate(
    model: OnnxVLM, prompt: Sequence[int], images: np.ndarray | None = None, *, sampling: SamplingConfig | None = None,
    max_tokens: int = 64, stop_ids: Collection[int] | None = None,
) -> list[int]:  # fmt: skip
    """What `multimodal.vlm.generate` gives, from expanded ids and images float32 [N, 3, h, w].

    stop_ids: end an answer; None: the model's own.
    """
    return list(stream(model, prompt, images, sampling=sampling, max_tokens=max_tokens, stop_ids=stop_ids))


def stream(
    model: OnnxVLM, prompt: Sequence[int], images: np.ndarray | None = None, *, sampling: SamplingConfig | None = None,
    max_tokens: int = 64, stop_ids: Collection[int] | None = None,
) -> Iterator[int]:  # fmt: skip
    """`generate`, token by token."""
    sampling = SamplingConfig() if sampling is None else sampling
    ends = model.eos_ids if stop_ids is None else stop_ids
    reader = Reader(model, 1, -(-(len(prompt) + max_tokens) // BLOCK) * BLOCK)
    answer: list[int] = []
    if max_tokens < 1:
        return
    logits = reader.read([prompt], model.features(images))
    while True:
        answer.append(choose(logits[0].astype(np.float64), sampling, len(prompt) + len(answer), prompt, answer))
        yield answer[-1]
        if len(answer) == max_tokens or answer[-1] in ends:
            return
        logits = reader.read([answer[-1:]])


def load_onnx_vlm(path: str | Path, *, device: str = "cpu", threads: int | None = None) -> OnnxVLM:
    """The model of an exported folder. threads: see `OnnxRunner`.

    Raises FileNotFoundError or ValueError saying what is wrong with the folder, the device or the installation.
    """
    folder = Path(path).expanduser()
    manifest = VLMManifest.load(folder)
    text = (folder / TOKENIZER).read_text()
    prompt = None if manifest.prompt is None else PromptConfig.from_dict(manifest.prompt)
    tokenizer = TextTokenizer.from_json(text) if prompt is None else PublishedTokenizer.from_json(text, prompt)
    graphs = {
        name: OnnxRunner(folder / graph["file"], device=device, threads=threads) for name, graph in manifest.graphs.items()
    }
    return OnnxVLM(manifest, tokenizer, graphs.get("vision"), graphs["language"], manifest_hash(folder))
