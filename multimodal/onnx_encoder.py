"""An exported encoder of one modality on onnxruntime and numpy alone: inputs [B, *shape] -> unit embeddings [B, dimension].

    encoder = load_onnx_encoder("EXPORT")
    similarity = encoder.embed(images) @ encoder.embed(others).T * encoder.logit_scale
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.onnx_folder import load_manifest, manifest_hash, save_manifest
from multimodal.onnx_runner import OnnxRunner

FORMAT = "remask-onnx-encoder-1"


@dataclass(frozen=True)
class EncoderManifest:
    """Plain values, as JSON holds them."""

    precision: str  # float32 | float16 | int8
    opset: int
    modality: str
    dimension: int
    shape: list[int]  # of one input
    box: dict[str, Any]  # low, high, unit, step, norm: multimodal.bind.interface.Box
    logit_scale: float
    adapters: list[str]  # what was merged or put behind the tower, in words
    graphs: dict[str, Any]  # name -> file, inputs and outputs with dtype and shape
    files: dict[str, str]  # file name -> sha256
    source: dict[str, Any]  # what the encoder was made from, as its maker says
    versions: dict[str, str | None]
    parity: dict[str, Any]  # what the gate measured, see multimodal/export_encoder.py

    def save(self, folder: Path) -> None:
        save_manifest(folder, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "EncoderManifest":
        """Raises FileNotFoundError without a manifest, ValueError for another format or a file that was changed."""
        made_by = f"vla export --encoder.factory=MODULE:FUNCTION --output_dir={folder}"
        values = load_manifest(folder, FORMAT, "encoder", made_by)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class OnnxEncoder:
    """What `multimodal.bind.interface.ModalityEncoder` is, on arrays instead of tensors."""

    manifest: EncoderManifest
    graph: OnnxRunner
    content_hash: str = ""

    @property
    def modality(self) -> str:
        return self.manifest.modality

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def logit_scale(self) -> float:
        return self.manifest.logit_scale

    def embed(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs [B, *shape] in the box -> unit vectors float32 [B, dimension].

        Raises ValueError for another shape, or values that are not finite or outside the box.
        """
        box, shape = self.manifest.box, tuple(self.manifest.shape)
        if inputs.shape[1:] != shape or len(inputs) == 0:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{self.modality} inputs are {list(inputs.shape)}; expected [B, {wanted}] with B > 0.")
        low, high = float(inputs.min()), float(inputs.max())
        lowest, highest = np.array([box["low"], box["high"]], inputs.dtype).tolist()  # as check_inputs rounds them
        if not (lowest <= low and high <= highest):  # not a number is outside too
            raise ValueError(
                f"{self.modality} inputs lie in [{low:.4g}, {high:.4g}] {box['unit']}; allowed: [{box['low']:.4g}, "
                f"{box['high']:.4g}], finite. Convert the unit or clamp before encoding."
            )
        port = self.graph.inputs[0]
        return self.graph.run({port.name: inputs.astype(port.dtype)})["embedding"]


def load_onnx_encoder(path: str | Path, *, device: str = "cpu", threads: int | None = None) -> OnnxEncoder:
    """The encoder of an exported folder. threads: see `OnnxRunner`.

    Raises FileNotFoundError or ValueError saying what is wrong with the folder, the device or the installation.
    """
    folder = Path(path).expanduser()
    manifest = EncoderManifest.load(folder)
    graph = OnnxRunner(folder / manifest.graphs["encoder"]["file"], device=device, threads=threads)
    return OnnxEncoder(manifest, graph, manifest_hash(folder))
