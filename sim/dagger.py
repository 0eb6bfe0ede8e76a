"""Correct a policy where it errs (`vla dagger`): roll out, label with the expert, add, train on, evaluate; round after round.

After DAgger (Ross, Gordon and Bagnell 2011, arXiv 1011.0686). Round r: the policy of round r - 1 acts, the expert with
probability mixing * decay ** (r - 1) instead of it; what the expert would have done is stored for every visited state; training
goes on from the policy's weights on all data so far; validation starts say what it brought. A folder:

    round_0/evaluation                                the policy one began with
    round_1/corrections  round_1/run  round_1/evaluation, round_2 ...
    rounds.json  rounds.png                           success against labels

With `control` each round trains a second policy as long on the demonstrations alone, from the control before it, and judges it on
the same starts (control_run, control_evaluation): what the labels brought is the distance between the two, not that to round 0.
Several suites correct one policy: corrections and evaluations then have a folder for each, and the curve is over all of them.
Everything resumes: the same command goes on where it was stopped.
"""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table
from tqdm import tqdm

from sim import correction, demonstration, packing
from sim.correction import CorrectionJob, CorrectionSettings
from sim.dagger_rounds import Round, round_table, write_rounds
from sim.environment import Environment
from sim.evaluate import EvaluateConfig, check_robot, evaluate
from sim.evaluate import check as check_evaluation
from sim.experts.programs import build_expert
from sim.folder_lock import locked
from sim.job_queue import ErrorCount, JobQueue
from sim.light_meshes import check_mesh_detail
from sim.policy_source import PolicySource, answer, policy_threads
from sim.results import ROWS, SETTINGS, append_row, differences, read_rows, tally
from sim.seeds import start
from sim.suites import build_environment, get_protocol, get_suite
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs
from vla.frame_cache import FrameCache
from vla.home import remask_home
from vla.interface import Policy, RobotSpec
from vla.show import show

if TYPE_CHECKING:
    from vla.train import TrainConfig

FIRST_INDEX = 500_000  # of the training starts; `vla collect` counts from 0 and never comes here
ROUND_STARTS = 10_000  # starts set aside for a round


@dataclass(frozen=True)
class DaggerConfig:
    """Settings of `vla dagger`."""

    policy: str = ""  # checkpoint folder of the policy to correct, e.g. RUN/checkpoints/last/policy
    dataset: list[Path] = field(default_factory=list)  # demonstrations it was trained on; corrections are added to them
    train: Path = Path("configs/lift_demo.yaml")  # settings of `vla train` for each round
    minutes: float | None = None  # of training in a round; default: as `train` says
    steps: int | None = None  # of training in a round, instead of minutes: for a machine that is not quiet
    suite: list[str] | str = "robosuite_lift"  # several: '[libero_object, libero_goal]'; tasks and counts are of each
    tasks: list[int] | None = None  # default: all
    output_dir: Path | None = None  # default: REMASK_HOME/dagger/<suite>, of several +-joined
    rounds: int = 3
    episodes: int = 10  # corrected episodes per task and round
    evaluation_episodes: int = 20  # validation starts per task and round
    mixing: float = 0.5  # probability that the expert acts during a chunk of round 1
    decay: float = 0.5  # of that, from round to round
    share: float | None = None  # of training samples, drawn from corrections; default: as many as their frames are of all
    execution_horizon: int | None = None  # actions executed of each chunk; default: as `vla eval`
    max_steps: int | None = None  # default: the suite's openpi limit
    mesh_detail: float = 1.0  # of the corrections' frames, see `vla collect`; evaluation draws the meshes as they are
    control: bool = False  # in each round also train as long without corrections, and evaluate: twice the time
    workers: int = 2  # simulator processes

    @property
    def root(self) -> Path:
        return Path(self.output_dir or remask_home() / "dagger" / "+".join(self.suites)).expanduser()

    @property
    def suites(self) -> tuple[str, ...]:
        return (self.suite,) if isinstance(self.suite, str) else tuple(self.suite)

    def part(self, folder: Path, suite: str) -> Path:
        """Where in a round's folder a suite's share of it lies."""
        return folder if len(self.suites) == 1 else folder / suite

    def task_list(self, suite: str) -> list[int]:
        return list(range(get_suite(suite).num_tasks)) if self.tasks is None else sorted(set(self.tasks))

    def step_limit(self, suite: str) -> int:
        return get_suite(suite).max_steps["openpi"] if self.max_steps is None else self.max_steps

    def mixing_of(self, number: int) -> float:
        """Probability that the expert acts in round `number`, counted from 1."""
        return self.mixing * self.decay ** (number - 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with its beginning; of `train` what the file says, since it may change between calls."""
        left_out = ("train", "output_dir", "rounds", "workers", "control")  # more rounds or a control may be asked for later
        own = {key: str(value) for key, value in asdict(self).items() if key not in left_out} | {"suite": ", ".join(self.suites)}
        training = yaml.safe_load(Path(self.train).expanduser().read_text()) or {}
        return own | {f"train.{section}": value for section, value in training.items()}


def dagger(
    config: DaggerConfig,
    *,
    build: Callable[..., Environment] = build_environment,
    expert: Callable[..., Any] = build_expert,
    load: Callable[[str], Policy] | None = None,
    train: Callable[[DaggerConfig, Path, str, list[Path]], str] | None = None,
) -> list[Round]:
    """Run the rounds that are missing; returns all. build, expert: module-level functions; load, train: how a policy comes
    to be (tests give fakes; default: vla.policy, vla.train).

    Raises ValueError on impossible settings or another run's folder.
    """
    check(config)
    if train is None:
        check_training(config)
    load, train = load or load_torch_policy, train or train_round
    config.root.mkdir(parents=True, exist_ok=True)
    with locked(config.root):
        settings = config.root / SETTINGS
        if settings.exists():
            changed = differences(json.loads(settings.read_text()), config.identity)
            if changed:
                raise ValueError(f"{config.root} holds another run: {changed}. Use another --output_dir.")
        settings.write_text(json.dumps(config.identity, indent=1))
        demonstrations = [Path(path).expanduser() for path in config.dataset]
        policy_path, data, labels, rounds = config.policy, list(demonstrations), 0, []
        judge = functools.partial(evaluate_round, config, build=build, load=load)
        rounds.append(judge(0, "evaluation", policy_path, labels))
        control_path = policy_path
        for number in range(1, config.rounds + 1):
            root = config.root / f"round_{number}"
            policy, reports = load(policy_path), []
            for suite in config.suites:
                folder = config.part(root / "corrections", suite)
                reports.append(collect_corrections(config, suite, number, policy, folder, build, expert))
                data.append(folder)
            labels += sum(report["labels"] for report in reports)
            mixture = sum(report["success"] * report["episodes"] for report in reports) / sum(report["episodes"] for report in reports)
            policy_path = train(config, root / "run", policy_path, data)
            done = replace(judge(number, "evaluation", policy_path, labels), corrected_success=mixture)
            if config.control:
                control_path = train(config, root / "control_run", control_path, demonstrations)
                done = replace(done, control=judge(number, "control_evaluation", control_path, 0))
            rounds.append(done)
            write_rounds(config.root, rounds)
    return rounds


def check(config: DaggerConfig) -> None:
    """Raise ValueError on settings that cannot be run."""
    if not config.suites or len(set(config.suites)) < len(config.suites):
        raise ValueError(f"suite is {list(config.suites)}; give one suite, or several different ones.")
    for suite in config.suites:
        check_evaluation(evaluation_config(config, suite, "", config.part(config.root / "round_0" / "evaluation", suite)))
    for name, low, high in (("mixing", 0, 1), ("decay", 0, 1), ("rounds", 1, 1000), ("episodes", 1, ROUND_STARTS)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{name} is {getattr(config, name)}; allowed: {low} to {high}.")
    if config.share is not None and not 0 < config.share < 1:
        raise ValueError(f"share is {config.share}; allowed: above 0 and below 1, or null.")
    check_mesh_detail(config.mesh_detail)
    if not config.policy or not config.dataset:
        raise ValueError("Which policy, trained on what? Give --policy=RUN/checkpoints/last/policy --dataset='[DATA]'.")


def collect_corrections(
    config: DaggerConfig, suite: str, number: int, policy: Policy, folder: Path, build: Callable, expert: Callable
) -> dict[str, Any]:
    """Label the round's episodes of a suite and pack them as a frame cache in `folder`; what corrections.json holds."""
    report_path = folder / "corrections.json"
    if report_path.exists():
        return json.loads(report_path.read_text())
    staged = folder / "episodes"
    staged.mkdir(parents=True, exist_ok=True)
    settings = CorrectionSettings(
        suite=suite,
        image_size=policy.spec.image_size,
        action_horizon=policy.action_horizon,
        execution_horizon=evaluation_config(config, suite, "", folder).execution_horizon or policy.action_horizon,
        max_steps=config.step_limit(suite),
        mixing=config.mixing_of(number),
        folder=staged,
    )
    rows = {
        (row["task"], row["index"]): row
        for row in read_rows(folder / ROWS)
        if row["error"] is None and demonstration.staged_path(staged, row["task"], row["index"]).exists()
    }
    if config.mesh_detail != 1:
        build = functools.partial(build, mesh_detail=config.mesh_detail)
    first = FIRST_INDEX + number * ROUND_STARTS
    wanted = [CorrectionJob(task, first + episode) for task in config.task_list(suite) for episode in range(config.episodes)]
    missing = [job for job in wanted if (job.task, job.index) not in rows]
    spec = run_corrections(config, policy, settings, missing, rows, folder, build, expert)
    chosen = [rows[job.task, job.index] for job in wanted if (job.task, job.index) in rows]
    paths = [demonstration.staged_path(staged, row["task"], row["index"]) for row in chosen]
    packing.pack(folder, spec or policy.spec, paths, source=f"vla dagger, {suite}, round {number}", cache_only=True)
    report = {
        "round": number,
        "mixing": settings.mixing,
        "episodes": len(chosen),
        "lost": len(wanted) - len(chosen),
        "labels": sum(row["labels"] for row in chosen),
        "success": sum(row["success"] for row in chosen) / len(chosen),
    }
    report_path.write_text(json.dumps(report, indent=1))
    shutil.rmtree(staged)
    return report


def run_corrections(
    config: DaggerConfig,
    policy: Policy,
    settings: CorrectionSettings,
    jobs: list[CorrectionJob],
    rows: dict[tuple[int, int], dict[str, Any]],
    folder: Path,
    build: Callable,
    expert: Callable,
) -> RobotSpec | None:
    """Run `jobs` in W processes, putting each outcome into `rows` and on disk; the robot they drove.

    A start that raises is tried once more, for what has to do with the process; one that raises again is lost to the round.
    """
    if not jobs:
        return None
    queue = JobQueue(jobs)
    specs: list[dict[str, Any]] = []

    def started(spec: dict[str, Any]) -> None:
        check_robot(policy, spec)
        specs.append(spec)

    with tqdm(total=len(jobs), unit="episode", desc=f"corrections, {settings.suite}") as bar:
        errors = ErrorCount(bar.write)

        def finished(job: CorrectionJob, outcome: Done | Failed | Died) -> None:
            error = None if isinstance(outcome, Done) else str(outcome)
            row = {"task": job.task, "index": job.index, "seed": start(correction.SPLIT, job.index).seed, "error": error}
            row |= outcome.result if isinstance(outcome, Done) else {}
            append_row(folder / ROWS, row)
            if error is None:
                rows[job.task, job.index] = row
                queue.finish(job)
                bar.update()
            else:
                errors.add(f"task {job.task}, start {job.index}", error)
                bar.update(int(queue.fail(job)))

        num_workers = min(config.workers, len(jobs))
        with policy_threads(config.workers), WorkerPool(num_workers, correction.work, (settings, build, expert)) as pool:
            run_jobs(pool, queue.next_job, started=started, finished=finished, answer=functools.partial(answer, policy))
    return RobotSpec.from_dict(specs[0])


def evaluation_config(config: DaggerConfig, suite: str, policy_path: str, folder: Path) -> EvaluateConfig:
    """How a policy of the run is evaluated, on validation starts."""
    settings = EvaluateConfig(
        policy=PolicySource(path=policy_path), suite=suite, tasks=config.tasks, episodes=config.evaluation_episodes,
        workers=config.workers, execution_horizon=config.execution_horizon, max_steps=config.max_steps, resume=True,
        output_dir=folder,
    )  # fmt: skip
    if settings.execution_horizon is None:
        settings = replace(settings, execution_horizon=get_protocol(settings.protocol_name).execution_horizon)
    return settings


def evaluate_round(
    config: DaggerConfig, number: int, name: str, policy_path: str, labels: int, build: Callable, load: Callable
) -> Round:
    """The round's policy on validation starts, kept in round_NUMBER/NAME."""
    policy = load(policy_path)
    checkpoint = getattr(policy, "content_hash", policy_path)
    rows, by_suite = [], {}
    for suite in config.suites:
        folder = config.part(config.root / f"round_{number}" / name, suite)
        found = evaluate(evaluation_config(config, suite, policy_path, folder), policy, checkpoint, build=build)
        count = tally(found)
        by_suite[suite] = (count.successes, count.episodes)
        rows += found
    count = tally(rows)
    return Round(number, policy_path, labels, count.successes, count.episodes, count.interval, by_suite)


def load_torch_policy(path: str) -> Policy:
    from vla.policy import load_policy

    return load_policy(path)


def train_round(config: DaggerConfig, run: Path, policy_path: str, data: list[Path]) -> str:
    """Go on training from the policy's weights on `data`; the new policy's folder."""
    from multimodal.training_state import last_checkpoint
    from vla.train import finished_policy, train_policy

    settings = training_settings(config, run, policy_path, data)
    done = finished_policy(settings)
    return str(done or train_policy(replace(settings, resume=last_checkpoint(settings.output_dir) is not None)))


def check_training(config: DaggerConfig) -> None:
    """Raise now what a round's training would raise after hours of corrections: settings, data or policy that do not fit."""
    from vla.data import WindowMixture
    from vla.train import begin, open_windows

    data = [Path(path).expanduser() for path in config.dataset]
    settings = training_settings(config, config.root / "round_1" / "run", config.policy, data)
    begin(settings, WindowMixture(open_windows(settings, held_out=False), settings.dataset.weights))


def training_settings(config: DaggerConfig, run: Path, policy_path: str, data: list[Path]) -> "TrainConfig":
    """Those of `vla train` in a round."""
    from vla.cli import parse_config
    from vla.train import TrainConfig

    arguments = [f"--config_path={config.train}", f"--output_dir={run}", f"--start_from={policy_path}"]
    arguments.append("--dataset.root=[" + ", ".join(str(path) for path in data) + "]")
    weights = dataset_weights(config, data)
    arguments += [] if weights is None else [f"--dataset.weights={weights}"]
    if config.minutes is not None:
        arguments.append(f"--training.minutes={config.minutes}")
    if config.steps is not None:
        arguments.append(f"--training.steps={config.steps}")
        arguments += ["--training.minutes=null"] if config.minutes is None else []
    if config.tasks is not None:
        arguments.append(f"--dataset.tasks={config.tasks}")
    return parse_config(TrainConfig, arguments, verb="train")


def dataset_weights(config: DaggerConfig, data: list[Path]) -> list[float] | None:
    """Of each data set: corrections make `share` of the samples, each by its frames; None: all by their frames."""
    count = len(config.dataset)
    if config.share is None or len(data) == count:
        return None
    frames = [FrameCache.open(path).num_frames for path in data]
    shown, corrected = sum(frames[:count]), sum(frames[count:])
    return [(1 - config.share) * size / shown for size in frames[:count]] + [config.share * size / corrected for size in frames[count:]]


def main(argv: list[str]) -> int:
    """`vla dagger`."""
    from vla.cli import parse_config

    config = parse_config(DaggerConfig, argv, verb="dagger")
    rounds = dagger(config)
    columns, lines = round_table([asdict(each) for each in rounds])
    table = Table(*columns, title=f"DAgger on {', '.join(config.suites)}, validation starts")
    for line in lines:
        table.add_row(*("-" if cell is None else str(cell) for cell in line))
    show(table)
    print(f"curve: {config.root / 'rounds.png'}\npolicy: {rounds[-1].policy}")
    return 0
