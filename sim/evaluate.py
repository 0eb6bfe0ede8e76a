"""Policy -> success table: `vla eval`. Suites x tasks x episodes over W simulator processes and one batched policy.

The policy is a checkpoint in this process, or a server anywhere (--policy.url); rows are the same.

An output folder:

    episodes.jsonl     one row per episode, on disk the moment it ends (sim.results.EpisodeRow)
    settings.json      what a resumed run must share
    eval_info.json     lerobot-eval's keys, and intervals, errors and all rows beside them
    videos/            on request, and grid.png of how they end

Episode e of a task begins at start e of the split, whatever ran before it and in whichever process, so a row depends
on the checkpoint, the settings and (task, episode) only. One reservation: torch rounds differently for other batch
sizes (2e-7 in an action, measured at the desk preset), which contacts can amplify; --max_batch=1 makes rows equal bit
for bit whatever the number of workers.
"""

import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sim.environment import Environment
from sim.episode_worker import EpisodeJob, EpisodeSettings, version, work
from sim.folder_lock import locked
from sim.job_queue import JobQueue
from sim.light_meshes import check_mesh_detail
from sim.perturbations.kinds import NONE, PerturbConfig
from sim.policy_source import PolicySource, answer, attack_config, attacked, load_source, policy_threads
from sim.results import INFO, ROWS, SETTINGS, EpisodeRow, append_row, differences, eval_info, latest_episodes, success_table, tally
from sim.seeds import start
from sim.shards import episode_list, shard_of
from sim.suites import build_environment, get_protocol, get_suite
from sim.video import last_frame, success_grid, write_image
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs
from vla.home import remask_home
from vla.interface import Policy
from vla.show import show

OUTPUT_ONLY = ("output_dir", "video_size", "gif", "watch")  # settings that change no outcome


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `vla eval`."""

    policy: PolicySource = field(default_factory=PolicySource)
    attack: dict[str, Any] = field(default_factory=dict)  # an attacker on the cameras, e.g. '{kind: untargeted, epsilon: 4, steps: 10}'
    suite: str = "robosuite_lift"
    output_dir: Path | None = None  # default: REMASK_HOME/evaluations/<suite>-<split>-<checkpoint>
    tasks: list[int] | None = None  # default: all
    episodes: int = 10  # per task
    workers: int = 2  # simulator processes
    max_batch: int | None = None  # requests the policy answers at once, default: all that wait; 1: see below
    split: str = "validation"  # or "official", for headline tables only
    protocol: str | None = None  # "openpi" or "lerobot": step limit, seeds; default: the suite's
    execution_horizon: int | None = None  # actions executed of each chunk; default: the protocol's, or else all
    num_known: int = 0  # actions not executed that the next chunk must start with
    max_steps: int | None = None  # default: the protocol's
    resume: bool = False  # go on in output_dir; episodes that ended with an error are run again
    videos: int = 0  # films per task
    video_size: int = 256  # pixels
    gif: bool = False  # a small gif beside each film
    watch: str | None = None  # address of a server's page (`vla serve`) that shows the episodes as they run; draws every step
    perturb: PerturbConfig = field(default_factory=PerturbConfig)  # what is changed about the episodes
    mesh_detail: float = 1.0  # share of the meshes' triangles drawn: `vla collect`'s, to tell its frames from a policy's failings
    shard: str | None = None  # "i/n": every n-th episode from the i-th on, i from 0; `vla merge-evaluations` joins the shards

    @property
    def task_list(self) -> list[int]:
        return list(range(get_suite(self.suite).num_tasks)) if self.tasks is None else sorted(set(self.tasks))

    @property
    def episode_list(self) -> list[tuple[int, int]]:
        """(task, episode) of all shards together."""
        return episode_list(self.task_list, self.episodes)

    @property
    def protocol_name(self) -> str:
        return self.protocol or get_suite(self.suite).default_protocol


def evaluate(
    config: EvaluateConfig, policy: Policy, checkpoint: str, *, build: Callable[..., Environment] = build_environment
) -> list[EpisodeRow]:
    """Run the episodes that are not yet on disk; returns the rows of all that were asked for.

    checkpoint: identifies the policy in rows and on resume. build: module-level function with build_environment's
    arguments (tests give fakes).
    Raises ValueError on impossible settings or if output_dir holds another evaluation, OSError if the simulator does not
    run, KeyboardInterrupt saying how to go on. Rows on disk stay usable.
    """
    check(config)
    settings = episode_settings(config, policy, output_dir(config, checkpoint))
    with locked(settings.output_dir):
        return evaluate_into(settings, config, policy, checkpoint, build)


def evaluate_into(
    settings: EpisodeSettings, config: EvaluateConfig, policy: Policy, checkpoint: str, build: Callable[..., Environment]
) -> list[EpisodeRow]:
    """`evaluate` once the folder is ours."""
    folder = settings.output_dir
    identity = {key: value for key, value in asdict(settings).items() if key not in OUTPUT_ONLY}
    identity |= {"split": config.split, "checkpoint": checkpoint, "decode": config.policy.decode, "shard": config.shard}
    identity |= {"attack": config.attack} if config.attack else {}
    if config.shard is not None:  # which episodes are whose depends on how many there are
        identity |= {"tasks": config.task_list, "episodes": config.episodes}
    if config.mesh_detail != 1:
        identity["mesh_detail"] = config.mesh_detail
        build = functools.partial(build, mesh_detail=config.mesh_detail)
    rows = open_evaluation(folder, identity, resume=config.resume)
    wanted = shard_of(config.episode_list, config.shard)
    jobs = [
        EpisodeJob(task, episode, start(config.split, episode), video_path(config, task, episode))
        for task, episode in wanted
        if (task, episode) not in rows or rows[task, episode].error is not None
    ]
    began = time.perf_counter()
    with resumable(folder), policy_threads(config.workers):
        run_episodes(config, settings, policy, checkpoint, jobs, rows, build)
    seconds = time.perf_counter() - began
    asked_for = [rows[key] for key in wanted]
    info = eval_info(asked_for, seconds=seconds, episodes_run=len(jobs), config=identity)
    (folder / INFO).write_text(json.dumps(info, indent=1))
    if config.videos:
        write_grid(folder, asked_for)
    return asked_for


def run_episodes(
    config: EvaluateConfig,
    settings: EpisodeSettings,
    policy: Policy,
    checkpoint: str,
    jobs: list[EpisodeJob],
    rows: dict[tuple[int, int], EpisodeRow],
    build: Callable[..., Environment],
) -> None:
    """Run `jobs`, putting each row into `rows` and on disk as it ends."""
    if not jobs:
        return
    queue = JobQueue(jobs)
    facts: dict[str, Any] = {}
    same_for_all = {
        "suite": config.suite,
        "split": config.split,
        "perturbation": config.perturb.name,
        **{name: version(name) for name in ("mujoco", "robosuite", "torch", "remask")},
        "checkpoint": checkpoint,
        "git_commit": git_commit(),
    }

    def started(worker_facts: dict[str, Any]) -> None:
        check_robot(policy, worker_facts["spec"])
        facts.update(worker_facts)
        if config.mesh_detail != 1:
            facts["assets"] += f", meshes at {config.mesh_detail:g}"

    with tqdm(total=len(jobs), unit="episode", desc=config.suite) as bar:

        def finished(job: EpisodeJob, outcome: Done | Failed | Died) -> None:
            queue.finish(job)
            row = EpisodeRow(
                task=job.task,
                instruction=facts["instructions"][job.task],
                episode=job.episode,
                initial_state_index=job.start.index,
                seed=job.start.seed,
                assets=facts["assets"],
                gl=facts["gl"],
                **same_for_all,
                **(outcome.result | {"error": None} if isinstance(outcome, Done) else error_fields(str(outcome))),
            )
            append_row(settings.output_dir / ROWS, asdict(row))
            rows[job.task, job.episode] = row
            bar.set_postfix_str(str(tally(rows.values())), refresh=False)
            bar.update()
            if row.error:
                bar.write(f"task {job.task}, episode {job.episode}: {row.error}")

        with WorkerPool(min(config.workers, len(jobs)), work, (settings, build)) as pool:
            reply = functools.partial(answer, policy, max_batch=config.max_batch)
            run_jobs(pool, queue.next_job, started=started, finished=finished, answer=reply)


def episode_settings(config: EvaluateConfig, policy: Policy, folder: Path) -> EpisodeSettings:
    """Every default resolved. Raises ValueError if the policy's chunks are too short: each episode would end with that error."""
    protocol = get_protocol(config.protocol_name)
    execution_horizon = protocol.execution_horizon if config.execution_horizon is None else config.execution_horizon
    execution_horizon = policy.action_horizon if execution_horizon is None else execution_horizon
    if execution_horizon > policy.action_horizon:
        raise ValueError(
            f"execution_horizon is {execution_horizon}, the policy's chunks have {policy.action_horizon} actions; give "
            f"--execution_horizon=1 to {policy.action_horizon} (default: the {protocol.name} protocol's, or else all)."
        )
    return EpisodeSettings(
        suite=config.suite,
        protocol=protocol.name,
        image_size=policy.spec.image_size,
        action_horizon=policy.action_horizon,
        max_steps=get_suite(config.suite).max_steps[protocol.name] if config.max_steps is None else config.max_steps,
        execution_horizon=execution_horizon,
        num_known=config.num_known,
        output_dir=folder,
        video_size=config.video_size,
        gif=config.gif,
        watch=config.watch,
        perturb=None if config.perturb.kind == NONE else config.perturb,
    )


def check(config: EvaluateConfig) -> None:
    """Raise ValueError on settings that cannot be run."""
    suite = get_suite(config.suite)
    suite.check_starts(config.split, config.episodes)
    unknown = [task for task in config.task_list if not 0 <= task < suite.num_tasks]
    if unknown or not config.task_list:
        raise ValueError(f"Suite {suite.name!r} has no tasks {unknown}; allowed: 0 to {suite.num_tasks - 1}.")
    least = {"episodes": 1, "workers": 1, "max_batch": 1, "max_steps": 1, "execution_horizon": 1, "num_known": 0}
    for name, low in least.items():
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {low}.")
    check_mesh_detail(config.mesh_detail)
    shard_of(config.episode_list, config.shard)


def check_robot(policy: Policy, spec: dict[str, Any]) -> None:
    """Raise ValueError unless the simulated robot is one that the policy can drive."""
    for name, mine in (("state_names", policy.spec.state_names), ("action_names", policy.spec.action_names)):
        if list(mine) != list(spec[name]):
            raise ValueError(f"The policy was trained with {name} {list(mine)}; this suite's robot has {list(spec[name])}.")
    missing = [camera for camera in policy.spec.cameras if camera not in spec["cameras"]]
    if missing:
        raise ValueError(f"The policy needs camera {missing[0]!r}; this suite has {list(spec['cameras'])}.")


def output_dir(config: EvaluateConfig, checkpoint: str) -> Path:
    return Path(config.output_dir or remask_home() / "evaluations" / evaluation_name(config, checkpoint[:8])).expanduser()


def evaluation_name(config: EvaluateConfig, policy: str) -> str:
    """What an evaluation under other settings has not; policy: what to call it."""
    name = f"{config.suite}-{config.split}-{policy}"
    name += "" if config.perturb.kind == NONE else f"-{config.perturb.name}"
    name += f"-{attack_config(config.attack).name}" if config.attack else ""
    name += "" if config.mesh_detail == 1 else f"-meshes-{config.mesh_detail:g}"
    return name + ("" if config.shard is None else f"-shard-{config.shard.replace('/', '-of-')}")


def open_evaluation(folder: Path, identity: dict[str, Any], *, resume: bool) -> dict[tuple[int, int], EpisodeRow]:
    """Begin or reopen the folder; (task, episode) -> its latest row. Raises ValueError if the folder is another's."""
    rows = latest_episodes(folder / ROWS)
    if rows and not resume:
        raise ValueError(f"{folder} holds {len(rows)} episodes. Go on with --resume=true or use another --output_dir.")
    settings = folder / SETTINGS
    if rows and settings.exists():
        changed = differences(json.loads(settings.read_text()), identity)
        if changed:
            raise ValueError(f"{folder} cannot be resumed: {changed}. Use another --output_dir.")
    settings.write_text(json.dumps(identity, indent=1))
    return {(row.task, row.episode): row for row in rows}


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Tell whoever presses Ctrl-C what is there and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        count = len(latest_episodes(folder / ROWS))
        raise KeyboardInterrupt(
            f"{count} finished episodes are in {folder / ROWS}. The same command with --resume=true goes on "
            f"(--output_dir={folder})."
        ) from None


def error_fields(error: str) -> dict[str, Any]:
    """What a row says of an episode that ended with an exception."""
    nothing = dict.fromkeys(("rounds", "policy_ms", "jerk", "video", "moved"))
    return {"success": False, "steps": 0, "error": error, "wall_s": 0.0, "chunks": 0, "renderer": "unknown", **nothing}


def video_path(config: EvaluateConfig, task: int, episode: int) -> str | None:
    """Where an episode's film goes, as lerobot-eval names it; None if it is not filmed."""
    return f"videos/{config.suite}_{task}/eval_episode_{episode}.mp4" if episode < config.videos else None


def write_grid(folder: Path, rows: list[EpisodeRow]) -> None:
    """videos/grid.png: how the filmed episodes end."""
    filmed = [row for row in rows if row.video and (folder / row.video).exists()]
    if filmed:
        frames = [last_frame(folder / row.video) for row in filmed]
        write_image(folder / "videos" / "grid.png", success_grid(frames, [row.success for row in filmed]))


def git_commit() -> str:
    """Commit of the checkout this file is in, with "-dirty" if it was changed; "unknown" outside a checkout."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(argv: list[str]) -> None:
    """`vla eval`."""
    from vla.cli import parse_config

    config = parse_config(EvaluateConfig, argv, verb="eval")
    check(config)
    policy = attacked(load_source(config.policy, config.workers), config.attack)
    rows = evaluate(config, policy, policy.content_hash)
    folder = output_dir(config, policy.content_hash)
    under = "" if config.perturb.kind == NONE else f", {config.perturb.kind} perturbed at severity {config.perturb.severity}"
    under += f", under attack: {attack_config(config.attack).name}" if config.attack else ""
    show(success_table(rows, f"{config.suite}, {config.split} starts, {config.protocol_name} protocol{under}"))
    print(f"{tally(rows)}. Rows, eval_info.json{' and videos' if config.videos else ''}: {folder}")
