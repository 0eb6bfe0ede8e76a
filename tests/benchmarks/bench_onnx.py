"""Latency of one action chunk, observation to actions: torch eager, torch.compile, onnxruntime in float32 and int8.

Every round is run (no early stop), so the work does not depend on what the policy is sure of. torch.compile gets the image
tower, the prefill and the head's pass over the slots, and is left out where there is no C++ compiler. "same tokens" counts
against torch eager over `--observations` random observations; heads without tokens count equal actions (1e-3). The last but
one column is against the best torch path, the torch variant with the smallest median: 1 or less is the goal.

    vla bench onnx --policy=RUN/checkpoints/last/policy
"""

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multimodal.config import ImageConfig, get_preset
from multimodal.decoder import count_parameters
from multimodal.tokenizer import train_tokenizer
from tests.benchmarks.harness import interleaved, median_ratio, parser, quiet_machine, report
from vla.action_head import HEAD_TYPES, HeadConfig
from vla.action_tokenizer import ActionTokenizer
from vla.decision import known_actions
from vla.export import write_folder
from vla.heads import HEADS
from vla.interface import Observation, RobotSpec
from vla.model import VLA, VLAConfig
from vla.normalization import Statistics
from vla.onnx_policy import OnnxPolicy, load_onnx_policy
from vla.policy import PolicyAssets, TorchPolicy, load_policy
from vla.unmasking import DecodeConfig

SPEC = RobotSpec(
    name="bench",
    cameras=("base", "wrist"),
    image_size=128,
    state_names=tuple(f"state {index}" for index in range(8)),
    action_names=("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"),
    binary_actions=(6,),
    control_hz=20.0,
)
TEXT = "pick up the alphabet soup and place it in the basket"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COMPILED = ("action_hidden", "causal_hidden", "predict_steps")  # of the model; a head uses one of them


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--policy", type=Path, default=None, help="checkpoint folder; default: an untrained one")
    arguments.add_argument("--preset", default="desk-s", help="of the untrained policy")
    arguments.add_argument("--head", default="discrete_diffusion", choices=HEAD_TYPES, help="of the untrained policy")
    arguments.add_argument("--rounds", type=int, default=6)
    arguments.add_argument("--observations", type=int, default=16, help="for the comparison of tokens")
    arguments.add_argument("--precisions", nargs="+", default=["float32", "int8"], choices=["float32", "float16", "int8"])
    arguments.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of this process, for a machine that is not quiet")
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    eager = load_policy(options.policy) if options.policy else untrained_policy(options.preset, options.head)
    decode = replace(eager.assets.decode, rounds=options.rounds, threshold=2.0)
    eager = TorchPolicy(replace(eager.assets, decode=decode), eager.model, content_hash=eager.content_hash)
    with tempfile.TemporaryDirectory() as folder:
        policies: dict[str, Any] = {"torch eager": eager}
        if shutil.which("g++") or shutil.which("clang++"):
            policies["torch.compile"] = compiled(eager)
        for precision in options.precisions:
            policies[f"onnxruntime {precision}"] = exported(eager, Path(folder) / precision, precision, options)
        with quiet_machine() if options.clock == "wall" else nullcontext():
            rows = measure(policies, options)
    columns = ["variant", "ms per chunk", "ratio to eager", "ratio to best torch", "same tokens"]
    report(
        f"onnx-{eager.assets.head.type}", columns, rows, options.output,
        threads=options.threads, rounds=options.rounds, repetitions=options.repetitions, parameters=count_parameters(eager.model),
        clock=options.clock, policy=eager.content_hash or "untrained",
    )  # fmt: skip
    return 0


def measure(policies: dict[str, Any], options: argparse.Namespace) -> list[list]:
    """One row per variant."""
    eager = policies["torch eager"]
    observations = [random_observation(eager.spec, seed) for seed in range(options.observations)]
    runs = {name: lambda p=policy: p.act(observations[:1]) for name, policy in policies.items()}
    seconds = interleaved(runs, options.repetitions, CLOCKS[options.clock])
    best = min((name for name in seconds if name.startswith("torch")), key=lambda name: statistics.median(seconds[name]))
    wanted = decide(eager, observations)
    rows = []
    for name, policy in policies.items():
        got = decide(policy, observations)
        same = got.tokens == wanted.tokens if got.tokens is not None else np.abs(got.actions - wanted.actions) <= 1e-3
        times = seconds[name]
        ratios = [median_ratio(times, seconds[other]) for other in ("torch eager", best)]
        rows.append([name, 1e3 * statistics.median(times), *ratios, float(np.mean(same))])
    return rows


def decide(policy: TorchPolicy | OnnxPolicy, observations: list[Observation]) -> Any:
    """Each observation on its own, as timed; the decisions joined."""
    given = known_actions([None], policy.action_horizon, policy.spec.action_dim)
    decisions = [policy.decide([observation], given, [0]) for observation in observations]
    tokens = None if decisions[0].tokens is None else np.concatenate([decision.tokens for decision in decisions])
    return replace(decisions[0], actions=np.concatenate([decision.actions for decision in decisions]), tokens=tokens)


def compiled(eager: TorchPolicy) -> TorchPolicy:
    """The same weights, with torch.compile where the time goes."""
    model = VLA(eager.assets.model)
    model.load_state_dict(eager.model.state_dict())
    model.vlm.embed_images = torch.compile(model.vlm.embed_images)
    model.vlm.decoder.fill = torch.compile(model.vlm.decoder.fill)
    for name in COMPILED:
        setattr(model, name, torch.compile(getattr(model, name)))
    return TorchPolicy(eager.assets, model)


def exported(eager: TorchPolicy, folder: Path, precision: str, options: argparse.Namespace) -> OnnxPolicy:
    folder.mkdir()
    write_folder(eager, folder, precision)
    return load_onnx_policy(folder, threads=options.threads)


def untrained_policy(preset: str, head: str) -> TorchPolicy:
    """A policy of that size; its answers mean nothing, its time does."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    tokenizer = train_tokenizer([TEXT])
    action_tokenizer = ActionTokenizer((-1.0,) * 7, (1.0,) * 7, (255,) * 7, SPEC.binary_actions)
    vlm = replace(get_preset(preset), vocab_size=tokenizer.vocab_size, num_cameras=len(SPEC.cameras))
    config = VLAConfig(vlm=vlm, num_action_ids=action_tokenizer.vocab_size, slots=HEADS[head].slots)
    images = ImageConfig(crop=112, size=None if vlm.vision.image_size == 112 else vlm.vision.image_size)
    statistics = Statistics.of(generator.normal(size=(100, SPEC.state_dim)))
    assets = PolicyAssets(
        config, SPEC, statistics, action_tokenizer, tokenizer, images, HeadConfig(type=head), DecodeConfig(rounds=6)
    )
    return TorchPolicy(assets, VLA(config))


def random_observation(spec: RobotSpec, seed: int) -> Observation:
    generator = np.random.default_rng(seed)
    size = (spec.image_size, spec.image_size, 3)
    images = {camera: generator.integers(0, 256, size, dtype=np.uint8) for camera in spec.cameras}
    return Observation(images, generator.normal(size=spec.state_dim).astype(np.float32), TEXT)


if __name__ == "__main__":
    raise SystemExit(main())
