"""A policy by its folder, whatever wrote it: a checkpoint runs on torch, an export on onnxruntime."""

from pathlib import Path
from typing import Any, Protocol

from vla.interface import Policy
from vla.onnx_manifest import is_onnx_policy


class StoredPolicy(Policy, Protocol):
    """A policy that came from a folder."""

    content_hash: str  # equal folders have equal hashes


def open_policy(
    path: str | Path, *, device: str = "cpu", decode: dict[str, Any] | None = None, threads: int | None = None
) -> StoredPolicy:
    """The policy of a checkpoint folder (`vla train`) or of an exported one (`vla export`), for which torch is not imported.

    decode: overrides of its DecodeConfig. threads: of onnxruntime; torch has one setting for the whole process.
    Raises FileNotFoundError or ValueError saying what is wrong with the folder.
    """
    folder = Path(path).expanduser()
    if is_onnx_policy(folder):
        from vla.onnx_policy import load_onnx_policy

        return load_onnx_policy(folder, device=device, decode=decode, threads=threads)
    from vla.policy import load_policy

    return load_policy(folder, device=device, decode=decode)
