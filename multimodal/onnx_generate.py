"""One question to an exported vision-language model, the answer streaming, without torch (`vla ask`)."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multimodal.onnx_vlm import load_onnx_vlm, stream
from multimodal.sampling import SamplingConfig


@dataclass(frozen=True)
class AskConfig:
    """Settings of `vla ask`."""

    vlm: Path  # a folder of `vla export --vlm.path=...`
    prompt: str
    images: tuple[Path, ...] = ()  # .npy (uint8 [H, W, 3]), or PNG and JPEG where pillow is installed
    max_tokens: int = 200
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    device: str = "cpu"  # cpu | cuda, as onnxruntime is installed
    threads: int | None = None


def ask(config: AskConfig) -> list[int]:
    """Print the answer as it comes; its ids."""
    model = load_onnx_vlm(config.vlm, device=config.device, threads=config.threads)
    frames = [read_frame(path) for path in config.images]
    prompt = model.encode(config.prompt, len(frames))
    sampling = SamplingConfig(config.temperature, config.top_p, config.top_k, config.seed)
    ids: list[int] = []
    shown = ""
    for token in stream(model, prompt, model.prepare(frames), sampling=sampling, max_tokens=config.max_tokens):
        ids.append(token)
        text = model.tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not all here yet waits
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(model.tokenizer.decode(ids)[len(shown) :])
    return ids


def read_frame(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Raises FileNotFoundError, or ValueError for a file that is no image or cannot be read here."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}.")
    if path.suffix == ".npy":
        frame = np.load(path)
    else:
        try:
            from PIL import Image, UnidentifiedImageError
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: PNG and JPEG need pillow (pip install pillow); .npy files need nothing.") from error
        try:
            frame = np.asarray(Image.open(path).convert("RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is no image that pillow reads.") from error
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"{path} holds {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3].")
    return frame


def run(config: AskConfig) -> int:
    """`vla ask`."""
    ids = ask(config)
    print(f"[{len(ids)} tokens]", file=sys.stderr)
    return 0
