"""One ONNX file on onnxruntime: named numpy arrays in, named numpy arrays out. No torch.

What one graph hands to the next (a key/value cache) can stay where it was computed: see `OnnxRunner.run`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Port:
    """An input or output of a graph."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # a string names a dynamic length


class OnnxRunner:
    """A loaded graph. Values given to it are numpy arrays, or onnxruntime's OrtValue as another call returned them."""

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        """threads: of one call; default OMP_NUM_THREADS, or else onnxruntime's own choice, the physical cores.

        Raises ValueError if onnxruntime is not installed, cannot use the device, or cannot read the file.
        """
        ort = import_onnxruntime()
        self.device = device
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
        options.log_severity_level = 3  # errors; a warning about every node that runs on another device helps nobody
        try:
            self.session = ort.InferenceSession(path, options, providers=[provider_of(device)])
        except Exception as error:  # onnxruntime's classes are not public and share only this one
            raise ValueError(f"onnxruntime {ort.__version__} cannot load {path}: {' '.join(str(error).split())}") from error
        self.inputs = tuple(map(_port, self.session.get_inputs()))
        self.outputs = tuple(map(_port, self.session.get_outputs()))
        self._ortvalue = ort.OrtValue.ortvalue_from_numpy

    def run(
        self, feeds: Mapping[str, Any], keep: Sequence[str] = (), into: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Outputs by name: arrays, but those named in `keep` stay on the device as OrtValues.

        into: OrtValues of the right shape that outputs are written to; they are not among the results. An output may be given
        the memory of the input that it replaces, if the graph reads that input nowhere else.
        """
        into = into or {}
        binding = self.session.io_binding()
        for port in self.inputs:
            value = feeds[port.name]
            binding.bind_ortvalue_input(port.name, self.on_device(value) if isinstance(value, np.ndarray) else value)
        for port in self.outputs:
            if port.name in into:
                binding.bind_ortvalue_output(port.name, into[port.name])
            else:
                binding.bind_output(port.name, self.device if port.name in keep else "cpu")
        self.session.run_with_iobinding(binding)
        values = zip((port.name for port in self.outputs), binding.get_outputs(), strict=True)
        return {name: value if name in keep else value.numpy() for name, value in values if name not in into}

    def on_device(self, array: np.ndarray) -> Any:
        """The array as an OrtValue."""
        return self._ortvalue(np.ascontiguousarray(array), self.device, 0)


def import_onnxruntime() -> Any:
    """The module. Raises ValueError saying how to install it."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError("An ONNX policy needs onnxruntime: pip install onnxruntime numpy tokenizers.") from error
    return onnxruntime


def provider_of(device: str) -> str:
    """onnxruntime's name of the device's provider. Raises ValueError unless this installation has it."""
    ort = import_onnxruntime()
    available = [name for name, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
    name = device.split(":")[0]
    if name not in available:
        raise ValueError(
            f"onnxruntime {ort.__version__} cannot run on {device!r} here; it can on {', '.join(available)}. "
            "The package onnxruntime-gpu, in onnxruntime's place, brings cuda."
        )
    return PROVIDERS[name]


def _port(argument: Any) -> Port:
    return Port(argument.name, np.dtype(DTYPES[argument.type]).name, tuple(argument.shape))
