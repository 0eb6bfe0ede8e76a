"""Episodes per hour of an evaluation that renders when a chunk is due, against one that renders every step.

    vla bench rendering [--policy RUN/checkpoints/last/policy] [--suite libero_object] [--task 0] [--repetitions 5]

Both run sim.rollout on the same starts in turn, with the same actions. Without --policy the actions are those of the
scripted expert, handed out in chunks for nothing, so that the ratio is the simulator's alone.
"""

import os
import statistics
import time
from collections.abc import Sequence

import numpy as np

from sim.environment import Environment
from sim.experts.programs import build_expert
from sim.rollout import rollout
from sim.seeds import Start, start
from sim.suites import build_environment, get_suite
from tests.benchmarks.harness import median_ratio, parser, quiet_machine, report
from vla.interface import ActionChunk, Observation, RobotSpec

GOAL = 2.5


class RenderEveryStep:
    """An Environment as most evaluation code drives it: every step returns an observation."""

    def __init__(self, environment: Environment) -> None:
        self._environment, self.spec = environment, environment.spec

    def reset(self, task: int, start: Start) -> None:
        self._environment.reset(task, start)
        self._observation = self._environment.observe()

    def step(self, action: np.ndarray) -> bool:
        success = self._environment.step(action)
        self._observation = self._environment.observe()
        return success

    def observe(self) -> Observation:
        return self._observation


class Replay:
    """A Policy that hands out given actions, whatever it is shown."""

    def __init__(self, spec: RobotSpec, actions: np.ndarray, action_horizon: int) -> None:
        self.spec, self.action_horizon = spec, action_horizon
        self._actions = np.concatenate([actions, np.repeat(actions[-1:], action_horizon, axis=0)])
        self._next = 0

    def act(self, observations: Sequence[Observation], *, known=None, seeds=None) -> list[ActionChunk]:
        chunk = self._actions[self._next : self._next + self.action_horizon]
        self._next = min(self._next + self.action_horizon, len(self._actions) - self.action_horizon)
        return [ActionChunk(chunk, {"milliseconds": 0.0})]


def expert_actions(environment: Environment, task: int, begin: Start, max_steps: int) -> np.ndarray:
    """What the expert does from `begin`, float32 [T, D]; renders nothing."""
    expert, actions = build_expert(environment, task), []
    environment.reset(task, begin)
    while len(actions) < max_steps:
        actions.append(expert.action(environment.world()))
        if environment.step(actions[-1]):
            break
    return np.array(actions, dtype=np.float32)


def main(argv: Sequence[str]) -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.set_defaults(repetitions=5)
    arguments.add_argument("--policy", default=None, help="checkpoint folder; default: the expert's actions")
    arguments.add_argument("--suite", default="libero_object")
    arguments.add_argument("--task", type=int, default=0)
    arguments.add_argument("--execution_horizon", type=int, default=8)
    arguments.add_argument("--image_size", type=int, default=128, help="pixels; a policy brings its own")
    options = arguments.parse_args(list(argv))
    os.environ.setdefault("LP_NUM_THREADS", "0")  # as the simulator processes of `vla eval`
    k, policy = options.execution_horizon, None
    if options.policy:
        import torch

        from vla.policy import load_policy

        torch.set_num_threads(options.threads)
        policy = load_policy(options.policy)
    image_size = policy.spec.image_size if policy else options.image_size
    environment = build_environment(options.suite, image_size=image_size)
    suite = get_suite(options.suite)
    max_steps = suite.max_steps[suite.default_protocol]
    variants = {"on demand": environment, "every step": RenderEveryStep(environment)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in variants}  # what a busy machine does not change
    steps: list[int] = []
    with quiet_machine():
        for repetition in range(-1, options.repetitions):  # the first warms up
            begin = start("validation", max(repetition, 0))
            actions = None if policy else expert_actions(environment, options.task, begin, max_steps)
            results = {}
            for name, world in variants.items():
                actor = policy or Replay(environment.spec, actions, k)
                began, cpu_began = time.perf_counter(), time.process_time()
                results[name] = rollout(
                    world, actor, task=options.task, start=begin, max_steps=max_steps, execution_horizon=k
                )
                if repetition >= 0:
                    seconds[name].append(time.perf_counter() - began)
                    cpu_seconds[name].append(time.process_time() - cpu_began)
            demand, every = results.values()
            np.testing.assert_array_equal(demand.actions, every.actions)
            if repetition >= 0:
                steps.append(demand.steps)
    environment.close()
    rows = [
        (
            name,
            len(steps),
            sum(steps),
            3600 / statistics.mean(seconds[name]),
            1000 * sum(seconds[name]) / sum(steps),
            1000 * sum(cpu_seconds[name]) / sum(steps),
        )
        for name in variants
    ]
    ratio = median_ratio(seconds["every step"], seconds["on demand"])
    cpu_ratio = median_ratio(cpu_seconds["every step"], cpu_seconds["on demand"])
    columns = ("rendering", "episodes", "steps", "episodes per hour", "ms per step", "CPU ms per step")
    settings = {name: getattr(options, name) for name in ("suite", "task", "execution_horizon", "policy", "threads")}
    settings |= {"ratio": ratio, "cpu_ratio": cpu_ratio, "goal": GOAL, "image_size": image_size}
    report("rendering", columns, rows, options.output, **settings)
    print(f"rendering on demand: {ratio:.2f} times the episodes per hour (median of paired ratios; goal {GOAL})")
    print(f"in CPU time, which other load on the machine does not change: {cpu_ratio:.2f} times")


if __name__ == "__main__":
    raise SystemExit(main())
