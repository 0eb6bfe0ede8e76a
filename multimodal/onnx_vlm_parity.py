"""The gate of an exported vision-language model: graphs against their modules, answers against the naive `generate`.

Answers are greedy, to real questions on real images of a corpus, and must have the same ids in float32. Lower precisions are
asked for every next id of torch's own answers instead (after a first difference two free answers have nothing in common).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multimodal.onnx_compare import COSINE, MAX_ABS, GraphParity, compare_graph, graph_failures
from multimodal.onnx_vlm import BLOCK, OnnxVLM, Reader
from multimodal.onnx_vlm import generate as onnx_generate
from multimodal.onnx_vlm_graphs import cache_names, vlm_graphs
from multimodal.questions import IMAGE
from multimodal.vlm import VLM, generate
from multimodal.vlm_folder import AskableVLM

AGREEMENT = 0.98  # lower precisions: share of torch's ids that are the export's likeliest too
MAX_TOKENS = 24  # of a checked answer


@dataclass(frozen=True)
class Question:
    """A real prompt."""

    text: str
    images: tuple[np.ndarray, ...]  # uint8 [H, W, 3]


@dataclass(frozen=True)
class AnswerParity:
    """Greedy answers to the same questions."""

    prompts: int
    identical: int  # all ids of the answer
    tokens: int  # of torch's answers
    agreeing: float  # share of them that the export finds likeliest after torch's ids before


@dataclass(frozen=True)
class VLMParity:
    """What the gate measured."""

    precision: str
    graphs: tuple[GraphParity, ...]
    answers: AnswerParity | None  # None without questions

    @property
    def failures(self) -> list[str]:
        """What is beyond its limit, in words; [] if the export passes."""
        failed, answers = graph_failures(self.graphs, self.precision), self.answers
        if answers is None:
            return failed
        if self.precision == "float32" and answers.identical < answers.prompts:
            failed.append(f"{answers.prompts - answers.identical} of {answers.prompts} greedy answers differ from torch's")
        if self.precision != "float32" and answers.agreeing < AGREEMENT:
            failed.append(f"{answers.agreeing:.2%} of the next ids are torch's, needed {AGREEMENT:.0%}")
        return failed

    def to_dict(self) -> dict[str, Any]:
        exact = self.precision == "float32"
        limits = {"max_abs": MAX_ABS, "identical": 1.0} if exact else {"cosine": COSINE, "agreeing": AGREEMENT}
        return asdict(self) | {"limits": limits}


def measure(reference: AskableVLM, exported: OnnxVLM, questions: Sequence[Question]) -> VLMParity:
    """Compare an export with the model it was made from, in float32 on the CPU; without questions, its graphs only."""
    graphs = [row for batch in (1, 3) for row in graph_parity(reference.model, exported, batch)]
    answers = answer_parity(reference, exported, questions) if questions else None
    return VLMParity(exported.manifest.precision, tuple(graphs), answers)


def graph_parity(reference: VLM, exported: OnnxVLM, batch: int) -> list[GraphParity]:
    """Every output of every graph: images, a prompt read into a cache of noise, and one more id, fed torch's own cache."""
    values, rows = random_values(reference, batch), []
    for graph in vlm_graphs(reference):
        if graph.name == "vision":
            parts, wanted = compare_graph(graph, exported.vision, values, f"random {batch}")
            values |= wanted
            rows += parts
            continue
        read, wanted = compare_graph(graph, exported.language, values, f"prompt {batch}")
        values |= {name.removeprefix("new_"): wanted[name] for name in wanted if name != "logits"}
        values["start"], values["last"] = values["last"] + 1, np.zeros(batch, np.int64)
        values["ids"] = wanted["logits"].argmax(-1)[:, None]
        if "features" in values:
            values["features"] = values["features"][:0]
        rows += read + compare_graph(graph, exported.language, values, f"step {batch}")[0]
    return rows


def random_values(reference: VLM, batch: int) -> dict[str, np.ndarray]:
    """Inputs of both graphs: noise for images and cache, an image and some text in each row, rows of different lengths."""
    config, generator = reference.config, np.random.default_rng(batch)
    per_image, decoder = reference.tokens_per_image, config.decoder
    lengths = per_image + np.arange(3, 3 + batch)
    ids = generator.integers(0, config.vocab_size, (batch, lengths.max()))
    ids[:, 1 : 1 + per_image] = IMAGE
    shape = (batch, decoder.kv_heads, int(lengths.max()) + 5, decoder.head_dim)
    values = {name: generator.normal(size=shape).astype(np.float32) for name in cache_names(decoder.num_layers)}
    values |= {"ids": ids, "start": np.zeros(batch, np.int64), "last": lengths - 1}
    if config.vision is not None:
        size = config.vision.image_size
        values["images"] = generator.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
        values["places"] = np.arange(batch) % config.num_cameras
    return values


def answer_parity(reference: AskableVLM, exported: OnnxVLM, questions: Sequence[Question]) -> AnswerParity:
    """Free answers, and torch's answers read by the export; each makes prompt and images its own way."""
    identical = tokens = agreeing = 0
    for question in questions:
        count = len(question.images)
        asked, pixels = reference.encode(question.text, count), reference.prepare(question.images)
        asked = reference.model.expand_prompt(asked, count)
        wanted = generate(reference.model, asked, pixels, max_tokens=MAX_TOKENS, stop_ids=reference.eos_ids)
        prompt, images = exported.encode(question.text, count), exported.prepare(question.images)
        identical += onnx_generate(exported, prompt, images, max_tokens=MAX_TOKENS) == wanted
        tokens += len(wanted)
        next_ids = likeliest(exported, prompt, images, wanted)
        agreeing += sum(mine == theirs for mine, theirs in zip(next_ids, wanted, strict=True))
    return AnswerParity(len(questions), identical, tokens, agreeing / tokens)


def likeliest(exported: OnnxVLM, prompt: Sequence[int], images: np.ndarray, answer: Sequence[int]) -> list[int]:
    """The export's likeliest id at each position of an answer, after the answer's ids before it."""
    reader = Reader(exported, 1, -(-(len(prompt) + len(answer)) // BLOCK) * BLOCK)
    logits = [reader.read([prompt], exported.features(images))]
    logits += [reader.read([[token]]) for token in answer[:-1]]
    return [int(row[0].argmax()) for row in logits]


def real_questions(corpus: Path, count: int, places: int | None) -> list[Question]:
    """First questions on held-out scenes, evenly spaced, with the images of the first `places` cameras.

    Raises FileNotFoundError without a corpus, ValueError if it has fewer scenes.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    from multimodal.corpus_file import HELD_OUT, read_manifest, read_scenes, split_files

    cameras = read_manifest(corpus).cameras[:places]
    scenes = [scene for path in split_files(corpus, HELD_OUT) for scene in read_scenes(path, truth=False)]
    if len(scenes) < count:
        raise ValueError(f"{corpus} has {len(scenes)} held-out scenes, the check asks about {count} (--dataset.observations).")
    questions = []
    for index in np.linspace(0, len(scenes) - 1, count).astype(int):
        scene = scenes[index]
        jpegs = [torch.frombuffer(bytearray(scene.images[camera]), dtype=torch.uint8) for camera in cameras]
        frames = tuple(decode_jpeg(jpeg, ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy() for jpeg in jpegs)
        questions.append(Question(scene.texts[index % len(scene.texts)].turns[0][0], frames))
    return questions
