"""A folder written by `vla export` becomes a Policy on onnxruntime, numpy and tokenizers alone."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.config import ImageConfig
from multimodal.numpy_images import prepare_images
from multimodal.onnx_folder import TOKENIZER, as_tuples, manifest_hash
from multimodal.onnx_runner import OnnxRunner
from multimodal.pretrained.text import PublishedTokenizer
from multimodal.prompt import PromptConfig
from multimodal.tokenizer import TextTokenizer
from vla.action_tokenizer import ActionTokenizer
from vla.decision import Decision, KnownActions, action_chunks, known_actions
from vla.interface import ActionChunk, Observation, RobotSpec
from vla.normalization import Statistics
from vla.onnx_heads import OnnxHead, OnnxPrefix
from vla.onnx_manifest import OnnxManifest
from vla.transforms import Transforms
from vla.unmasking import DecodeConfig


class OnnxPolicy:
    """A `vla.interface.Policy` on onnxruntime."""

    def __init__(
        self,
        manifest: OnnxManifest,
        text_tokenizer: TextTokenizer,
        graphs: dict[str, OnnxRunner],
        *,
        decode: DecodeConfig | None = None,
        content_hash: str = "",
    ) -> None:
        self.manifest, self.text_tokenizer, self.graphs, self.content_hash = manifest, text_tokenizer, graphs, content_hash
        self.spec = RobotSpec.from_dict(manifest.spec)
        self.action_horizon = manifest.action_horizon
        self.transforms = Transforms(self.spec, Statistics.from_dict(manifest.statistics))
        self.images = ImageConfig(**as_tuples(manifest.images))
        self.decode = decode or DecodeConfig(**manifest.decode)
        self.action_tokenizer = ActionTokenizer.from_dict(manifest.action_tokenizer)
        self.head = OnnxHead(manifest.head["type"], graphs["step"], self.action_tokenizer)

    def act(
        self,
        observations: Sequence[Observation],
        *,
        known: Sequence[np.ndarray | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ActionChunk]:
        """See `vla.interface.Policy.act`. info: rounds, confidence [H, D] (token heads), milliseconds of the whole batch."""
        start = time.perf_counter()
        given = known_actions(known or [None] * len(observations), self.action_horizon, self.spec.action_dim)
        decision = self.decide(observations, given, list(seeds or [0] * len(observations)))
        return action_chunks(decision, given, 1e3 * (time.perf_counter() - start))

    def decide(self, observations: Sequence[Observation], known: KnownActions, seeds: Sequence[int]) -> Decision:
        """`act` with its tokens, before known actions are put back."""
        return self.head.act(self.prefill(self.inputs(observations)), known, self.decode, seeds)

    def inputs(self, observations: Sequence[Observation]) -> dict[str, np.ndarray]:
        """images float32 [B, C, 3, h, w], state [B, S], text_ids and text_mask [B, T], T of the longest instruction.

        Raises ValueError on a wrong observation.
        """
        items = [self.transforms.forward(observation) for observation in observations]
        ids, mask = self.text_tokenizer.encode_arrays([item.instruction for item in items], self.manifest.text_length)
        length = int(mask.any(0).sum())  # what is padding in every row is cut off: nobody would look at it
        images = prepare_images(np.stack([item.images for item in items]), self.images)
        state = np.stack([item.state for item in items])
        return {"images": images, "state": state, "text_ids": ids[:, :length], "text_mask": mask[:, :length]}

    def prefill(self, inputs: dict[str, np.ndarray]) -> OnnxPrefix:
        """Encode what `inputs` made, once per chunk."""
        prefill = self.graphs["prefill"]
        tokens = self.graphs["vision"].run({"images": inputs["images"]}, keep=["image_tokens"])
        cache_names = [port.name for port in prefill.outputs if port.name != "is_real"]
        result = prefill.run({name: inputs[name] for name in ("state", "text_ids", "text_mask")} | tokens, keep=cache_names)
        return OnnxPrefix(result["is_real"], {name: result[name] for name in cache_names})


def text_tokenizer(manifest: OnnxManifest, text: str) -> TextTokenizer:
    """From tokenizer.json: with its prompt's template that of a published backbone, else one of ours."""
    prompt = PromptConfig.from_dict(manifest.prompt)
    return PublishedTokenizer.from_json(text, prompt) if prompt.pad_token else TextTokenizer.from_json(text)


def load_onnx_policy(
    path: str | Path, *, device: str = "cpu", decode: dict[str, Any] | None = None, threads: int | None = None
) -> OnnxPolicy:
    """The policy of an exported folder; `decode` overrides fields of its DecodeConfig. threads: see `OnnxRunner`.

    Raises FileNotFoundError or ValueError saying what is wrong with the folder, the device or the installation.
    """
    folder = Path(path).expanduser()
    manifest = OnnxManifest.load(folder)
    graphs = {
        name: OnnxRunner(folder / graph["file"], device=device, threads=threads) for name, graph in manifest.graphs.items()
    }
    return OnnxPolicy(
        manifest,
        text_tokenizer(manifest, (folder / TOKENIZER).read_text()),
        graphs,
        decode=DecodeConfig(**manifest.decode).changed(decode or {}),
        content_hash=manifest_hash(folder),
    )
