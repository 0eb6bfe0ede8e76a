"""Laws of evaluation with real spawned processes, on a world without a simulator."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import sim.evaluate
from sim.episode_worker import Question
from sim.evaluate import EvaluateConfig, evaluate
from sim.folder_lock import locked
from sim.job_queue import choose_task
from sim.policy_source import answer
from sim.results import EpisodeRow, read_episodes, read_rows
from sim.seeds import start
from sim.workers import Ask, Done, Ready, run_jobs
from tests.point_world import CRASH_INDEX, KILL_INDEX, PointPolicy, PointWorld, build_broken_world, build_point_world

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "0123456789abcdef"
TIMES = ("wall_s", "policy_ms")  # not decided by the episode


@pytest.fixture(autouse=True)
def three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of three tasks under the name of one of ten, in the parent; the processes ask the world."""
    suite = replace(sim.evaluate.get_suite("libero_object"), num_tasks=3)
    monkeypatch.setattr(sim.evaluate, "get_suite", lambda name: suite)


def settings(folder: Path, **changes) -> EvaluateConfig:
    defaults = dict(suite="libero_object", output_dir=folder, episodes=4, workers=1, max_steps=40, execution_horizon=4)
    return EvaluateConfig(**{**defaults, **changes})


def run(config: EvaluateConfig, policy: PointPolicy | None = None) -> list[EpisodeRow]:
    return evaluate(config, policy or PointPolicy(), CHECKPOINT, build=build_point_world)


def outcomes(rows: list[EpisodeRow]) -> list[dict]:
    return [{key: value for key, value in asdict(row).items() if key not in TIMES} for row in rows]


def test_rows_depend_on_neither_workers_nor_batch_mates_nor_order(tmp_path):
    one, three = run(settings(tmp_path / "one")), run(settings(tmp_path / "three", workers=3))
    assert outcomes(one) == outcomes(three)
    assert [(row.task, row.episode) for row in one] == [(task, episode) for task in range(3) for episode in range(4)]
    backwards = [row for episode in (3, 1) for row in run(settings(tmp_path / f"part{episode}", episodes=episode + 1))]
    assert all(row in outcomes(one) for row in outcomes(backwards))
    assert 0 < sum(row.success for row in one)


def test_episode_e_starts_at_start_e_of_the_split(tmp_path):
    rows = run(settings(tmp_path / "run", tasks=[2], split="official"))
    assert [row.initial_state_index for row in rows] == [0, 1, 2, 3]
    assert [row.seed for row in rows] == [2_000_000_000 + index for index in range(4)]
    assert {row.split for row in rows} == {"official"} and {row.instruction for row in rows} == {"reach ball 2"}


def test_resuming_equals_never_stopping(tmp_path):
    whole = run(settings(tmp_path / "whole"))
    run(settings(tmp_path / "parts", episodes=2))
    policy = PointPolicy()
    resumed = run(settings(tmp_path / "parts", resume=True), policy)
    assert outcomes(resumed) == outcomes(whole)
    assert len(policy.seeds) == sum(row.chunks for row in whole if row.episode >= 2), "finished episodes are not run again"
    assert len(read_rows(tmp_path / "parts" / "episodes.jsonl")) == len(whole)


def test_a_row_torn_by_a_crash_is_run_again(tmp_path):
    whole = run(settings(tmp_path / "run"))
    path = tmp_path / "run" / "episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert outcomes(run(settings(tmp_path / "run", resume=True))) == outcomes(whole)
    assert len(read_episodes(path)) == len(whole)


def test_a_folder_with_rows_is_not_touched_without_resume(tmp_path):
    run(settings(tmp_path / "run", episodes=1))
    with pytest.raises(ValueError, match="--resume=true"):
        run(settings(tmp_path / "run", episodes=1))


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"split": "official"}, "split"), ({"execution_horizon": 2}, "execution_horizon"), ({"max_steps": 9}, "max_steps")],
)
def test_resuming_with_other_settings_names_what_differs(tmp_path, changes: dict, names: str):
    run(settings(tmp_path / "run", episodes=1))
    with pytest.raises(ValueError, match=f"cannot be resumed: {names} was"):
        run(settings(tmp_path / "run", resume=True, **changes))


def test_resuming_with_another_checkpoint_is_refused(tmp_path):
    run(settings(tmp_path / "run", episodes=1))
    with pytest.raises(ValueError, match=f"checkpoint was '{CHECKPOINT}', is 'fedc'"):
        evaluate(settings(tmp_path / "run", resume=True), PointPolicy(), "fedc", build=build_point_world)


@pytest.fixture
def bad_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Episode 1 raises in its reset, episode 2 kills its process."""
    real = sim.evaluate.start
    bad = {1: CRASH_INDEX, 2: KILL_INDEX}
    monkeypatch.setattr(sim.evaluate, "start", lambda split, index: real(split, bad.get(index, index)))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_or_a_dead_process_is_an_error_and_no_failure(tmp_path, bad_starts, workers: int):
    rows = run(settings(tmp_path / "run", tasks=[0], workers=workers))
    assert [row.error is None for row in rows] == [True, False, False, True]
    assert "ArithmeticError: the ball fell through the floor" in rows[1].error
    assert "SIGKILL" in rows[2].error
    info = json.loads((tmp_path / "run" / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2 and info["overall"]["n_errors"] == 2
    assert info["per_task"][0]["metrics"]["successes"] == [rows[0].success, rows[3].success]


def test_errors_are_run_again_on_resume(tmp_path, monkeypatch):
    real = sim.evaluate.start
    monkeypatch.setattr(sim.evaluate, "start", lambda split, index: real(split, CRASH_INDEX if index == 1 else index))
    assert [row.error is None for row in run(settings(tmp_path / "run", tasks=[0]))] == [True, False, True, True]
    monkeypatch.setattr(sim.evaluate, "start", real)
    rows = run(settings(tmp_path / "run", tasks=[0], resume=True))
    assert outcomes(rows) == outcomes(run(settings(tmp_path / "other", tasks=[0])))


def test_a_simulator_that_cannot_start_is_one_clear_error(tmp_path):
    with pytest.raises(ChildProcessError, match="could not start: FileNotFoundError: no meshes anywhere"):
        evaluate(settings(tmp_path / "run"), PointPolicy(), CHECKPOINT, build=build_broken_world)


def test_ctrl_c_leaves_rows_and_says_how_to_go_on(tmp_path):
    class Interrupted(PointPolicy):
        def act(self, observations, **options):
            if len(read_rows(tmp_path / "run" / "episodes.jsonl")) == 2:
                raise KeyboardInterrupt
            return super().act(observations, **options)

    with pytest.raises(KeyboardInterrupt, match="2 finished episodes.*--resume=true"):
        run(settings(tmp_path / "run"), Interrupted())
    assert outcomes(run(settings(tmp_path / "run", resume=True))) == outcomes(run(settings(tmp_path / "whole")))


def test_a_policy_of_another_robot_is_refused(tmp_path):
    policy = PointPolicy()
    policy.spec = replace(policy.spec, cameras=("base", "left_shoulder"))
    with pytest.raises(ValueError, match="left_shoulder.*'base', 'wrist'"):
        run(settings(tmp_path / "run"), policy)


IMPOSSIBLE = [
    {"tasks": [3]}, {"tasks": []}, {"episodes": 0}, {"workers": 0}, {"max_batch": 0}, {"split": "test"}, {"max_steps": 0},
    {"max_steps": -5}, {"execution_horizon": 0}, {"execution_horizon": 5}, {"execution_horizon": None}, {"num_known": -1},
]  # fmt: skip


@pytest.mark.parametrize("changes", IMPOSSIBLE)
def test_impossible_settings_are_refused_before_anything_runs(tmp_path, changes: dict):
    """The policy's chunks have 4 actions; the protocol's default, openpi's, executes 5."""
    with pytest.raises(ValueError):
        run(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_videos_are_written_on_request(tmp_path):
    rows = run(settings(tmp_path / "run", tasks=[0, 1], episodes=2, videos=1, video_size=64, gif=True))
    films = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run" / "videos").rglob("*.*"))
    names = [f"videos/libero_object_{task}/eval_episode_0" for task in (0, 1)]
    assert films == sorted([f"{name}{ending}" for name in names for ending in (".gif", ".mp4")] + ["videos/grid.png"])
    assert [row.video for row in rows] == [f"{names[0]}.mp4", None, f"{names[1]}.mp4", None]


def test_a_worker_keeps_its_task_and_idle_workers_spread():
    assert choose_task({0: 3, 1: 5}, 0, {0: 1, 1: 1}) == 0
    assert choose_task({0: 0, 1: 5, 2: 2}, 0, {1: 1, 2: 0}) == 2
    assert choose_task({0: 3, 1: 5}, None, {}) == 1
    assert choose_task({0: 0}, 0, {}) is None


def test_processes_that_wait_are_answered_in_one_batch():
    class TwoWorkers:
        """A WorkerPool whose processes ask at the same moment."""

        alive = [0, 1]
        rounds = [
            [(0, Ready("first")), (1, Ready("second"))],
            [(0, Ask("a")), (1, Ask("b"))],
            [(0, Done(1)), (1, Ask("c"))],
            [(1, Done(2))],
        ]
        sent: list = []

        def send(self, worker: int, message: str) -> None:
            self.sent.append((worker, message))

        def receive(self) -> list:
            return self.rounds.pop(0)

    jobs, batches, ended = ["job 0", "job 1"], [], []
    run_jobs(
        pool := TwoWorkers(),
        lambda last: jobs.pop(0) if jobs else None,
        started=lambda facts: None,
        finished=lambda job, outcome: ended.append((job, outcome.result)),
        answer=lambda questions: batches.append(questions) or [question.upper() for question in questions],
    )
    assert batches == [["a", "b"], ["c"]] and ended == [("job 0", 1), ("job 1", 2)]
    assert pool.sent == [(0, "job 0"), (1, "job 1"), (0, "A"), (1, "B"), (1, "C")]


def test_two_evaluations_cannot_share_a_folder(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="being written by process"):
        run(settings(tmp_path / "run", episodes=1))
    run(settings(tmp_path / "run", episodes=1))


@pytest.mark.parametrize(("max_batch", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1])])
def test_answers_do_not_depend_on_the_batch(max_batch: int | None, sizes: list[int]):
    environment = PointWorld()
    environment.reset(0, start("validation", 0))
    questions = [Question(environment.observe(), None, seed) for seed in range(5)]
    policy = PointPolicy()
    together = answer(policy, questions, max_batch)
    assert policy.batch_sizes == sizes
    for question, chunk in zip(questions, together, strict=True):
        np.testing.assert_array_equal(chunk.actions, answer(PointPolicy(), [question])[0].actions)


def test_workers_end_when_their_parent_is_killed():
    """Even in the middle of a job that never looks at its pipe."""
    code = (
        "import time\nfrom sim.workers import WorkerPool\nfrom tests.point_world import sleep_forever\n"
        "if __name__ == '__main__':\n    pool = WorkerPool(1, sleep_forever)\n"
        "    print(pool.receive()[0][1], flush=True)\n    time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()
