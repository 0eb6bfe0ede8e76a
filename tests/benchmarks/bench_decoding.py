"""Latency of one action chunk: prefix cached against recomputed in every round, same tokens required.

The image tower runs once in both variants and is reported apart. The bound is the count of token passes,
(P + T L) / (T (P + L)), for a prefix of P, T rounds and L slots.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from multimodal.config import get_preset
from tests.benchmarks.harness import interleaved, median_ratio, parser, quiet_machine, report
from vla.decoding import Decoded, DecodeConfig, decode
from vla.model import VLA, VLAConfig


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=12)
    arguments.add_argument("--prefixes", type=int, nargs="+", default=[0, 256, 512], help="prefix lengths; 0: the preset's own")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    with quiet_machine(), torch.inference_mode():
        for length in options.prefixes:
            rows.append(measure(length, options))
    columns = ["prefix", "rounds", "tower ms", "cached ms", "uncached ms", "ratio", "bound", "ratio / bound", "same tokens"]
    report("decoding", columns, rows, options.output, threads=options.threads, repetitions=options.repetitions)
    return 0


def measure(length: int, options: argparse.Namespace) -> list:
    """One row: an untrained desk policy, its text padded so that the prefix has `length` positions."""
    torch.manual_seed(0)
    config = VLAConfig(vlm=get_preset("desk"))
    model = VLA(config).eval()
    if length:
        text_length = length - model.vlm.num_image_tokens - 1
        config = replace(config, text_length=text_length)
        model = VLA(config).eval()
    size = config.vlm.vision.image_size
    images = torch.randn(1, config.vlm.num_cameras, 3, size, size)
    text = torch.zeros(1, config.text_length, dtype=torch.long)
    prefix_inputs = (images, torch.randn(1, config.state_dim), text, torch.ones_like(text, dtype=torch.bool))
    embeddings, is_real = model.embed_prefix(*prefix_inputs)
    blank = torch.zeros(1, config.num_slots, dtype=torch.long)
    allowed = torch.ones(config.num_action_ids, dtype=torch.bool)
    schedule = DecodeConfig(rounds=options.rounds, threshold=2.0)  # no early stop: every round is run

    def run(hidden_of) -> Decoded:
        logits_of = lambda tokens, rows: model.action_logits(hidden_of(tokens), allowed)  # noqa: E731
        return decode(logits_of, blank, torch.zeros_like(blank, dtype=torch.bool), config.mask_id, schedule)

    def cached() -> Decoded:
        prefix = model.prefill(embeddings, is_real)
        return run(lambda tokens: model.action_hidden(tokens, prefix))

    def uncached() -> Decoded:
        return run(lambda tokens: model.action_hidden_uncached(tokens, embeddings, is_real))

    same = bool(torch.equal(cached().tokens, uncached().tokens))
    seconds = interleaved(
        {"tower": lambda: model.vlm.embed_images(images), "cached": cached, "uncached": uncached}, options.repetitions
    )
    passes, slots, rounds = model.prefix_length, config.num_slots, options.rounds
    bound = (passes + rounds * slots) / (rounds * (passes + slots))
    ratio = median_ratio(seconds["cached"], seconds["uncached"])
    times = [1e3 * statistics.median(seconds[name]) for name in ("tower", "cached", "uncached")]
    return [passes, rounds, *times, ratio, bound, ratio / bound, same]


if __name__ == "__main__":
    raise SystemExit(main())
