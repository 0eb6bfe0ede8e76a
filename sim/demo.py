"""The main job in one command (`vla demo`): expert demonstrations -> training -> evaluation, on robosuite lift.

Everything lands in one folder, and a second run goes on where the first one stopped:

    dataset/       the LeRobotDataset and its frame cache
    run/           TensorBoard log, training curve, checkpoints
    evaluation/    one row per episode, eval_info.json, films
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from sim.collect import CollectConfig, collect
from sim.evaluate import EvaluateConfig, evaluate
from sim.policy_source import PolicySource
from sim.results import ROWS, success_table, tally
from vla.cli import parse_config
from vla.home import remask_home

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "lift_demo.yaml"
SUITE = "robosuite_lift"


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `vla demo`."""

    output_dir: Path | None = None  # default: REMASK_HOME/demo
    demonstrations: int = 80
    noise: float = 0.2  # disturbs what the expert executes, so that demonstrations show how to come back
    image_size: int = 96  # pixels
    minutes: float | None = None  # of training; default: as configs/lift_demo.yaml says
    episodes: int = 50  # validation starts, none of which was trained on
    workers: int = 2  # simulator processes


def main(argv: Sequence[str]) -> int:
    """`vla demo`."""
    config = parse_config(DemoConfig, argv, verb="demo")
    root = Path(config.output_dir or remask_home() / "demo").expanduser()
    began = time.perf_counter()
    console = Console()

    console.rule("[bold]1 of 3  demonstrations: a scripted expert that sees the simulator's state")
    if not (root / "dataset" / "cache" / "manifest.json").exists():
        collect(
            CollectConfig(
                suite=SUITE, output_dir=root / "dataset", episodes_per_task=config.demonstrations, workers=config.workers,
                noise=config.noise, image_size=config.image_size,
            )
        )  # fmt: skip
    collected = time.perf_counter()

    console.rule("[bold]2 of 3  training: images, state and instruction to masked action tokens")
    policy_folder = train(config, root)
    trained = time.perf_counter()

    console.rule("[bold]3 of 3  evaluation: starts the policy has not seen")
    from vla.policy import load_policy

    policy = load_policy(policy_folder)
    evaluation = EvaluateConfig(
        policy=PolicySource(path=str(policy_folder)), suite=SUITE, output_dir=root / "evaluation" / policy.content_hash,
        episodes=config.episodes, workers=config.workers, videos=4, gif=True, resume=True,
    )  # fmt: skip
    rows = evaluate(evaluation, policy, policy.content_hash)
    ended = time.perf_counter()
    console.print(success_table(rows, f"{SUITE}, {config.episodes} validation starts"))
    console.print(
        f"{tally(rows)}\n"
        f"demonstrations {(collected - began) / 60:.1f} min, training {(trained - collected) / 60:.1f} min, evaluation "
        f"{(ended - trained) / 60:.1f} min, together {(ended - began) / 60:.1f} min\n"
        f"curve  {root / 'run' / 'training_curve.png'}\n"
        f"films  {evaluation.output_dir / 'videos'}\n"
        f"rows   {evaluation.output_dir / ROWS}"
    )
    return 0


def train(config: DemoConfig, root: Path) -> Path:
    """Train as configs/lift_demo.yaml says, resuming a run that was cut short; the policy's folder."""
    from vla.train import TrainConfig, finished_policy, train_policy

    arguments = [f"--config_path={CONFIG}", f"--dataset.root={root / 'dataset'}", f"--output_dir={root / 'run'}"]
    if config.minutes is not None:
        arguments.append(f"--training.minutes={config.minutes}")
    settings = parse_config(TrainConfig, arguments, verb="train")
    done = finished_policy(settings)
    if done is not None:
        return done
    return train_policy(replace(settings, resume=(root / "run" / "checkpoints").exists()))
