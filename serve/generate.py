"""One question from the command line, the answer streaming (`vla generate`); and how an engine is built from checkpoints."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from multimodal.sampling import SamplingConfig
from serve.controller import AdaptiveConfig
from serve.costs import build_controller
from serve.draft_checkpoint import load_draft
from serve.drafters import Drafter, NgramDrafter
from serve.eagle_drafter import EagleDrafter
from serve.engine import Engine, EngineConfig
from serve.request import Delta, Finished, Request
from serve.target import Target, load_target
from vla.cli import parse_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_engine(
    vlm: Path | str, draft: Path | str | None = None, *, config: EngineConfig | None = None, dtype: str = "float32",
    device: str = "cpu", adaptive: AdaptiveConfig | None = None, asked: Sequence[Request] = (),
) -> Engine:  # fmt: skip
    """An engine on a checkpoint of `vla train-vlm`, drafting with one of `vla train-draft`, or by n-grams without.

    Measures this machine's costs, so it takes a second or two; requests that will be `asked` are checked before. Raises
    FileNotFoundError or ValueError naming the folder at fault, RequestError for a request.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    target = load_target(vlm, dtype=DTYPES[dtype], device=device)
    return build_engine(target, None if draft is None else Path(draft), config, adaptive, asked)


def build_engine(
    target: Target, draft: Path | None, config: EngineConfig | None = None, adaptive: AdaptiveConfig | None = None,
    asked: Sequence[Request] = (),
) -> Engine:  # fmt: skip
    """Like `load_engine`, on a target that is loaded already."""
    config, adaptive = config or EngineConfig(), adaptive or AdaptiveConfig()
    drafter: Drafter = NgramDrafter()
    if draft is not None:
        capacity = config.context + adaptive.width * adaptive.max_depth
        drafter = EagleDrafter(load_draft(draft, target), target.vlm, num_slots=config.max_batch, capacity=capacity)
    engine = Engine(target, config, drafter)
    for request in asked:
        engine.check(request)
    engine.controller = build_controller(engine.runner, drafter, adaptive, past=min(128, config.context // 2))
    return engine


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `vla generate`."""

    vlm: Path  # a checkpoint folder of `vla train-vlm`
    prompt: str
    images: tuple[Path, ...] = ()  # PNG or JPEG files, in the order of the model's cameras
    draft: Path | None = None  # of `vla train-draft`; without one, n-grams draft
    max_tokens: int = 200
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()  # end before the first of these
    dtype: str = "float32"  # float32 | bfloat16 | float64
    device: str = "cpu"
    threads: int | None = None
    quiet: bool = False  # no line of statistics at the end
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_batch=1))


def generate(config: GenerateConfig) -> Finished:
    """Print the answer as it comes; its last event."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images = tuple(read_image(path) for path in config.images)
    sampling = SamplingConfig(config.temperature, config.top_p, config.top_k, config.seed)
    request = Request(config.prompt, images, sampling, config.max_tokens, config.stop)
    settings = {"config": config.engine, "dtype": config.dtype, "device": config.device}
    engine = load_engine(config.vlm, config.draft, asked=[request], **settings)
    for event in engine.stream(request):
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
    print()
    if not config.quiet:
        print(statistics(event), file=sys.stderr)
    return event


def read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]. Raises FileNotFoundError, or ValueError for a file that is no image."""
    from torchvision.io import ImageReadMode, decode_image

    if not path.expanduser().is_file():
        raise FileNotFoundError(f"no image {path}.")
    data = torch.frombuffer(bytearray(path.expanduser().read_bytes()), dtype=torch.uint8)
    try:
        return decode_image(data, ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()
    except RuntimeError as error:
        raise ValueError(f"{path} is no PNG or JPEG image: {str(error).splitlines()[0]}") from error


def statistics(finished: Finished) -> str:
    usage = finished.usage
    speed = (usage.completion_tokens - 1) / usage.decode_seconds if usage.decode_seconds else 0.0
    drafts = f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted tokens accepted"
    return (
        f"[{usage.completion_tokens} tokens, ended by {finished.reason}; first after {usage.first_token_seconds:.2f} s, then "
        f"{speed:.0f} a second; {usage.rounds} rounds, {drafts}]"
    )


def main(argv: Sequence[str]) -> int:
    """`vla generate`."""
    generate(parse_config(GenerateConfig, argv, verb="generate"))
    return 0
