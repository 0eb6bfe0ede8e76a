"""One policy evaluated under many settings on the same starts: resumable, paired with a base, timed in turn, drawn.

Every setting is an evaluation folder under `root`; `vla report` reads the same folders.
"""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sim.compare import compare, pair_episodes
from sim.evaluate import EvaluateConfig, evaluate
from sim.experts.programs import build_expert
from sim.policy_source import PolicySource, load_source
from sim.results import EpisodeRow, mean, tally
from sim.seeds import start
from sim.suites import build_environment, get_suite
from tests.benchmarks.harness import interleaved, quiet_machine
from vla.interface import Observation, Policy

COLUMNS = ("success %", "95 % low", "95 % high", "n", "errors", "difference", "low", "high", "p", "rounds", "jerk")
STRIDE = 10  # steps between the observations that a chunk is timed on


def add_study_options(arguments: argparse.ArgumentParser) -> None:
    """What every study asks for."""
    arguments.add_argument("--policy", required=True, help="checkpoint folder, e.g. RUN/checkpoints/last/policy")
    arguments.add_argument("--suite", default="robosuite_lift")
    arguments.add_argument("--tasks", type=int, nargs="+", default=None, help="default: all")
    arguments.add_argument("--episodes", type=int, default=20, help="validation episodes a task")
    arguments.add_argument("--workers", type=int, default=1, help="simulator processes")
    arguments.add_argument("--root", type=Path, default=None, help="folder of the evaluations; goes on with what is there")


def base_config(options: argparse.Namespace) -> EvaluateConfig:
    return EvaluateConfig(
        policy=PolicySource(path=options.policy), suite=options.suite, tasks=options.tasks, episodes=options.episodes,
        workers=options.workers, resume=True,
    )  # fmt: skip


def evaluate_variants(variants: Mapping[str, EvaluateConfig], root: Path) -> dict[str, list[EpisodeRow]]:
    """Rows of each variant, missing episodes run now. Raises ValueError if a folder holds an evaluation of other settings."""
    found = {}
    for name, config in variants.items():
        policy = load_source(config.policy, config.workers)
        found[name] = evaluate(replace(config, output_dir=root / name), policy, policy.content_hash)
    return found


def study_rows(found: Mapping[str, list[EpisodeRow]], base: str) -> list[list]:
    """[name, *COLUMNS] of each variant; difference in points to `base` on the starts that both finished, none of its own."""
    rows = []
    for name, episodes in found.items():
        count = tally(episodes)
        if not count.episodes:
            rows.append([name, *[None] * 3, 0, count.errors, *[None] * 6])
            continue
        valid = [row for row in episodes if row.error is None]
        difference: list[float | None] = [None] * 4
        if name != base:
            against = compare(pair_episodes(found[base], episodes))
            difference = [*(100 * value for value in (against.difference, *against.interval)), against.p_value]
        rows.append([
            name, 100 * count.rate, 100 * count.interval[0], 100 * count.interval[1], count.episodes, count.errors, *difference,
            mean(row.rounds for row in valid), mean(row.jerk for row in valid),
        ])  # fmt: skip
    return rows


def chunk_milliseconds(
    policies: Mapping[str, Policy], seen: Sequence[Observation], options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds of one robot's chunk, images to actions: mean over what is seen, median of repetitions, policies in turn.

    seen: along an episode, since the rounds that a threshold saves depend on it.
    """
    import torch

    torch.set_num_threads(options.threads)
    with quiet_machine():
        calls = {name: lambda policy=policy: [policy.act([each]) for each in seen] for name, policy in policies.items()}
        seconds = interleaved(calls, options.repetitions)
    return {name: 1e3 * statistics.median(values) / len(seen) for name, values in seconds.items()}


def variants_milliseconds(variants: Mapping[str, EvaluateConfig], options: argparse.Namespace) -> dict[str, float]:
    """`chunk_milliseconds` of a study's variants along the expert's episode."""
    policies = {name: load_source(config.policy, 1) for name, config in variants.items()}
    return chunk_milliseconds(policies, observations_along(next(iter(variants.values()))), options)


def observations_along(config: EvaluateConfig) -> list[Observation]:
    """Every STRIDE-th observation of the expert's episode of the first task from the split's first start."""
    os.environ.setdefault("LP_NUM_THREADS", "0")  # as the simulator processes of `vla eval`
    policy = load_source(config.policy, 1)
    environment = build_environment(config.suite, image_size=policy.spec.image_size)
    task, limit = config.task_list[0], get_suite(config.suite).max_steps[config.protocol_name]
    expert, seen, success = build_expert(environment, task), [], False
    environment.reset(task, start(config.split, 0))
    for step in range(limit):
        if success:
            break
        if step % STRIDE == 0:
            seen.append(environment.observe())
        success = environment.step(expert.action(environment.world()))
    environment.close()
    return seen
