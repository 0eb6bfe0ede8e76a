"""The closed loop over wires equals the policy in process; and what a late answer costs, with real-time chunking and without.

Part 1, `wires`: the same starts evaluated in process and over http, grpc, ws; rows must be equal. Part 2, `delay`: every
answer arrives --delay_ms late in simulated time. Synchronous execution holds still meanwhile; real-time chunking
(vla.chunking.RealtimeQueue) executes the tail of the running chunk and hands it over as known. Jerk is the mean squared
third difference of the position commands; at boundaries: of windows that hold the first action of a new chunk.
"""

import argparse
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from serve.client import RemotePolicy
from sim.environment import Environment
from sim.evaluate import EvaluateConfig, evaluate
from sim.results import Tally
from sim.rollout import chunk_seed
from sim.seeds import Start, start
from sim.suites import build_environment, get_suite
from tests.benchmarks.harness import parser, report
from tests.benchmarks.serving_load import ServerProcess
from vla.chunking import RealtimeQueue
from vla.interface import Policy
from vla.policy import load_policy

NOT_DECIDED = ("wall_s", "policy_ms")


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--policy", type=Path, required=True, help="checkpoint folder of a trained policy")
    arguments.add_argument("--suite", default="robosuite_lift")
    arguments.add_argument("--tasks", type=int, nargs="+", default=[0])
    arguments.add_argument("--episodes", type=int, default=50, help="per task and mode")
    arguments.add_argument("--parts", nargs="+", default=["wires", "delay"], choices=["wires", "delay"])
    arguments.add_argument("--delay_ms", type=float, default=100.0)
    arguments.add_argument("--execution_horizon", type=int, default=5)
    arguments.add_argument("--max_steps", type=int, default=None, help="default: the suite's")
    options = arguments.parse_args(argv)
    same = True
    with ServerProcess(f"--policy.path={options.policy}", "--batching.max_batch=1") as server:
        if "wires" in options.parts:
            same = wires(server, options)
        if "delay" in options.parts:
            delay(server, options)
    return 0 if same else 1


def wires(server: ServerProcess, options: argparse.Namespace) -> bool:
    """One table row per wire; True if every wire's episodes are those in process."""
    local = load_policy(options.policy)
    rows, reference = [], None
    with tempfile.TemporaryDirectory() as folder:
        for name, url in (
            ("in process", ""), ("http", server.http), ("grpc", f"grpc://{server.grpc_address}"), ("ws", server.ws)
        ):
            config = EvaluateConfig(
                suite=options.suite,
                tasks=options.tasks,
                episodes=options.episodes,
                workers=1,
                max_batch=1,
                max_steps=options.max_steps,
                execution_horizon=options.execution_horizon,
                output_dir=Path(folder) / name.replace(" ", "-"),
            )
            policy = RemotePolicy(url, timeout_s=60, same_checkpoint=True) if url else local
            episodes = evaluate(config, policy, local.content_hash)
            decided = [{key: value for key, value in asdict(row).items() if key not in NOT_DECIDED} for row in episodes]
            reference = decided if reference is None else reference
            solved = Tally(sum(row.success for row in episodes if not row.error), sum(not row.error for row in episodes), 0)
            equal = sum(mine == theirs for mine, theirs in zip(decided, reference, strict=True))
            rows.append([name, str(solved), f"{equal} of {len(decided)}", float(np.mean([row.policy_ms for row in episodes]))])
    report("realtime-wires", ["wire", "success", "rows equal", "policy ms"], rows, options.output, suite=options.suite)
    return all(row[2].split(" of ")[0] == row[2].split(" of ")[1] for row in rows)


@dataclass(frozen=True)
class DelayedEpisode:
    """What one episode under delay did."""

    success: bool
    steps: int
    held: int  # control periods without an action
    jerk: float
    boundary_jerk: float


def delay(server: ServerProcess, options: argparse.Namespace) -> None:
    """The same starts, three ways."""
    suite = get_suite(options.suite)
    periods = math.ceil(options.delay_ms / 1000 * suite.control_hz)
    late_name = f"{periods} periods late"
    modes = {"no delay": (0, False), f"{late_name}, holding still": (periods, False)}
    modes[f"{late_name}, real-time"] = (periods, True)
    rows = []
    with RemotePolicy(f"grpc://{server.grpc_address}", timeout_s=60) as policy:
        environment = build_environment(options.suite, image_size=policy.spec.image_size)
        for name, (late, realtime) in modes.items():
            episodes = [
                delayed_rollout(environment, policy, task, start("validation", index), late, realtime, options)
                for task in options.tasks
                for index in range(options.episodes)
            ]
            solved = Tally(sum(episode.success for episode in episodes), len(episodes), 0)
            means = [float(np.nanmean([getattr(episode, field) for episode in episodes])) for field in (
                "steps", "held", "jerk", "boundary_jerk"
            )]
            rows.append([name, str(solved), *means])
        environment.close()
    columns = ["mode", "success", "steps", "held still", "jerk", "jerk at boundaries"]
    output = options.output and options.output.with_stem(f"{options.output.stem}-delay")
    report("realtime-delay", columns, rows, output, delay_ms=options.delay_ms, suite=options.suite, episodes=options.episodes)


def delayed_rollout(
    environment: Environment, policy: Policy, task: int, begin: Start, late: int, realtime: bool, options: argparse.Namespace
) -> DelayedEpisode:
    """One episode in which an answer to the observation of step s can be executed from step s + late on."""
    suite = get_suite(options.suite)
    max_steps = options.max_steps or suite.max_steps[suite.default_protocol]
    queue = RealtimeQueue(
        max(options.execution_horizon, late + 1) if realtime else options.execution_horizon, late if realtime else 0
    )
    environment.reset(task, begin)
    actions, first_of_chunk = [], []
    arriving: tuple[int, np.ndarray] | None = None  # (step from which it can be executed, chunk)
    num_chunks, held, fresh, success = 0, 0, False, False
    still = np.zeros(len(policy.spec.action_names), dtype=np.float32)
    while not success and len(actions) < max_steps:
        step = len(actions)
        waiting = arriving is not None
        if queue.should_ask and not waiting:
            known = queue.ask()
            (chunk,) = policy.act([environment.observe()], known=[known], seeds=[chunk_seed(task, begin, num_chunks)])
            arriving, num_chunks = (step + late, chunk.actions), num_chunks + 1
        if arriving is not None and step >= arriving[0]:
            queue.push(arriving[1])
            arriving, fresh = None, True
        if queue.has_action and (realtime or arriving is None):
            action, is_first = queue.pop(), fresh
            fresh = False
        else:
            action, is_first, held = still, False, held + 1
        for index in policy.spec.binary_actions:
            still[index] = action[index]
        success = bool(environment.step(action))
        actions.append(action.copy())
        first_of_chunk.append(is_first)
    jerk, boundary = jerks(np.array(actions), np.array(first_of_chunk))
    return DelayedEpisode(success, len(actions), held, jerk, boundary)


def jerks(actions: np.ndarray, first_of_chunk: np.ndarray) -> tuple[float, float]:
    """Mean squared third difference of the position commands: of all windows of four steps, and of those with a boundary."""
    if len(actions) < 4:
        return math.nan, math.nan
    squares = np.square(np.diff(actions[:, :3].astype(np.float64), n=3, axis=0)).mean(1)
    boundary = np.array([first_of_chunk[index + 1 : index + 4].any() for index in range(len(squares))])
    return float(squares.mean()), float(squares[boundary].mean()) if boundary.any() else math.nan


if __name__ == "__main__":
    raise SystemExit(main())
