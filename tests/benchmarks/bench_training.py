"""Time and memory of one training step of the desk policy, and what each measure taken for it buys.

As `vla train` runs, with large memory pages. Variants, all on the same synthetic batch: the shipped path; without each of its measures in turn; with what was tried and not
taken (torch.compile, which needs a C++ compiler, is left out without one).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from multimodal.config import get_preset
from multimodal.images import ImageConfig, prepare_images
from tests.benchmarks.harness import interleaved, median_ratio, parser, quiet_machine, report
from vla.action_tokenizer import ActionTokenizer
from vla.action_head import ActionBatch, HeadConfig
from vla.heads import build_head
from vla.large_pages import restart_with_large_pages
from vla.model import VLA, VLAConfig

TOKENIZER = ActionTokenizer(low=(-1.0,) * 7, high=(1.0,) * 7, bins=(255,) * 7, binary=(6,))
SHIPPED = {
    "precision": "bf16", "draws": 2, "share_prefix": True, "attention": "products", "preset": "desk", "compiled": False,
    "channels_last": True,
}  # fmt: skip
VARIANTS = {
    "shipped": {},
    "float32": {"precision": "fp32"},
    "scaled_dot_product_attention": {"attention": "sdpa"},
    "prefix encoded per draw": {"share_prefix": False},
    "one draw": {"draws": 1},
    "four draws": {"draws": 4},
    "image tower not channels-last": {"channels_last": False},
    "norms, rotation and gated MLP compiled": {"compiled": True},
    "preset desk-s": {"preset": "desk-s"},
}


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--batch_size", type=int, default=32)
    arguments.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    options = arguments.parse_args(argv)
    restart_with_large_pages()
    torch.set_num_threads(options.threads)
    if options.memory_of:  # a process of its own, so that no other variant's memory is reused
        step = build_step(options.batch_size, **(SHIPPED | VARIANTS[options.memory_of]))
        print(peak_of(step))
        return 0
    with quiet_machine():
        able = shutil.which("g++") is not None
        chosen = {name: change for name, change in VARIANTS.items() if able or not change.get("compiled")}
        steps = {name: build_step(options.batch_size, **(SHIPPED | change)) for name, change in chosen.items()}
        seconds = interleaved(steps, options.repetitions)
        rows = []
        for name, times in seconds.items():
            draws = (SHIPPED | VARIANTS[name])["draws"]
            median = statistics.median(times)
            rows.append([
                name, 1e3 * median, options.batch_size / median, draws * options.batch_size / median,
                median_ratio(times, seconds["shipped"]), peak_megabytes(name, options),
            ])  # fmt: skip
    columns = ["variant", "ms per step", "samples/s", "mask draws/s", "time / shipped", "peak MB of a step"]
    report("training", columns, rows, options.output, batch_size=options.batch_size, threads=options.threads)
    return 0


def build_step(
    batch_size: int, *, precision: str, draws: int, share_prefix: bool, attention: str, preset: str, compiled: bool, channels_last: bool
):
    """A function that does one optimiser step on a fixed batch of 128-pixel frames."""
    torch.manual_seed(0)
    config = VLAConfig(vlm=get_preset(preset), num_action_ids=TOKENIZER.vocab_size)
    model = VLA(config).train()
    size = config.vlm.vision.image_size
    repeats = 1 if share_prefix else draws
    head = build_head(HeadConfig(mask_draws=draws if share_prefix else 1), TOKENIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (batch_size, 2, 128, 128, 3), dtype=torch.uint8, generator=generator)
    state, text = torch.randn(batch_size, 8), torch.zeros(batch_size, config.text_length, dtype=torch.long)
    tokens = torch.randint(0, 255, (batch_size, 8, 7), generator=generator)
    tokens[..., 6] = 255
    zeros = torch.zeros(batch_size, 8, 7)
    target = ActionBatch(tokens, zeros, zeros, torch.zeros(batch_size, 8, dtype=torch.bool))
    patches = [*attention_patches(attention), *(compiled_patches() if compiled else ()), *layout_patches(model, channels_last)]

    def step() -> None:
        with ExitStack() as stack, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for patch in patches:
                stack.enter_context(patch)
            for _ in range(repeats):
                images = prepare_images(frames, ImageConfig(crop=112, size=size), generator)
                prefix = model.prefill(*model.embed_prefix(images, state, text, torch.ones_like(text, dtype=torch.bool)))
                loss = head.loss(model, prefix, target, generator)
                (loss.loss_sum / loss.normalizer).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def attention_patches(name: str) -> list:
    """Contexts in which `attend` is torch's own for every dtype ("sdpa"); none for it as it is."""
    import multimodal.attention as module

    def sdpa(query, keys, values, mask):
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    return [patch.object(module, "attend", sdpa)] if name == "sdpa" else []


def compiled_patches() -> list:
    """Contexts in which torch.compile fuses what is not a product."""
    import multimodal.attention as attention
    import multimodal.layers as layers

    compiled = {owner: torch.compile(owner.forward, dynamic=True) for owner in (layers.RMSNorm, layers.MLP)}
    return [
        patch.object(attention, "rotate", torch.compile(layers.rotate, dynamic=True)),
        *(patch.object(owner, "forward", lambda self, x, run=run: run(self, x)) for owner, run in compiled.items()),
    ]


def layout_patches(model: VLA, channels_last: bool) -> list:
    """Contexts in which images and the tower's weights lie channel by channel; none for pixel by pixel, as shipped."""
    if channels_last:
        return []
    import multimodal.vision as module

    model.vlm.vision.to(memory_format=torch.contiguous_format)
    return [patch.object(module, "IMAGE_LAYOUT", torch.contiguous_format)]


def peak_of(step) -> float:
    """MB by which two steps raise the process's resident memory, sampled every millisecond."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before, samples, done = resident(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            samples.append(resident())

    thread = threading.Thread(target=sample)
    thread.start()
    step()
    step()
    done.set()
    thread.join()
    return max(samples) - before


def peak_megabytes(variant: str, options: argparse.Namespace) -> float:
    command = [
        sys.executable, "-m", "tests.benchmarks.bench_training", f"--memory_of={variant}", f"--batch_size={options.batch_size}",
        f"--threads={options.threads}",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    raise SystemExit(main())
