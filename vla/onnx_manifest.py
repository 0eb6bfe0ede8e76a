"""manifest.json of an exported policy: all of it but the graphs and the text tokenizer, which it names with their hashes.

    manifest.json    this
    *.onnx           the graphs, see vla/onnx_graphs.py; *.onnx.data beside one whose weights exceed 2 GB
    tokenizer.json   the text tokenizer
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from multimodal.onnx_folder import MANIFEST, load_manifest, save_manifest

FORMAT = "remask-onnx-policy-1"


@dataclass(frozen=True)
class OnnxManifest:
    """Plain values, as JSON holds them; who uses a part builds its class from it."""

    precision: str  # float32 | float16 | int8
    opset: int
    text_length: int  # instruction ids at most
    action_horizon: int
    head: dict[str, Any]  # HeadConfig
    decode: dict[str, Any]  # DecodeConfig, how the policy decodes by default
    images: dict[str, Any]  # ImageConfig
    spec: dict[str, Any]  # RobotSpec
    statistics: dict[str, Any]  # Statistics of the state
    action_tokenizer: dict[str, Any]  # ActionTokenizer
    graphs: dict[str, Any]  # name -> file, inputs and outputs with dtype and shape
    files: dict[str, str]  # file name -> sha256
    source: dict[str, Any]  # hash and provenance of the checkpoint
    versions: dict[str, str | None]
    parity: dict[str, Any]  # what the gate measured, see vla/onnx_parity.py
    prompt: dict[str, Any] = field(default_factory=dict)  # PromptConfig, of a published backbone; {}: the tokenizer is ours

    def save(self, folder: Path) -> None:
        save_manifest(folder, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "OnnxManifest":
        """Raises FileNotFoundError without a manifest, ValueError for another format or a file that was changed."""
        made_by = f"vla export --policy.path=CHECKPOINT --output_dir={folder}"
        values = {"prompt": {}} | load_manifest(folder, FORMAT, "policy", made_by)  # older ones have none
        return cls(**{each.name: values[each.name] for each in fields(cls)})


def is_onnx_policy(folder: Path) -> bool:
    """Whether the folder claims to be one; `OnnxManifest.load` says whether it is."""
    return (folder / MANIFEST).is_file()
