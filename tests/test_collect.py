"""Laws of collection with real spawned processes, on a world without a simulator."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sim.collect
from sim import demonstration
from sim.collect import CollectConfig, Job, Schedule, collect, times_raised
from sim.disturbance import PUSH_STEPS
from sim.folder_lock import locked
from sim.results import read_rows
from sim.seeds import Start
from tests.point_world import PointWorld, build_point_world, point_expert
from vla.frame_cache import FrameCache


@pytest.fixture(autouse=True)
def three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of three tasks under the name of one of ten, in the parent; the processes ask the world."""
    suite = replace(sim.collect.get_suite("libero_object"), num_tasks=3)
    monkeypatch.setattr(sim.collect, "get_suite", lambda name: suite)


def demonstrations(root: Path, **changes) -> CollectConfig:
    defaults = dict(suite="libero_object", output_dir=root, tasks=[0, 1], episodes_per_task=3, workers=1, image_size=8)
    return CollectConfig(**{**defaults, "max_steps": 60, "cache_only": True, **changes})


def gather(config: CollectConfig) -> dict:
    return collect(config, build=build_point_world, expert=point_expert)


def assert_equal_caches(first: Path, second: Path) -> None:
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_data_set_depends_on_neither_workers_nor_interruptions(tmp_path, monkeypatch):
    gather(demonstrations(tmp_path / "one"))
    gather(demonstrations(tmp_path / "three", workers=3))
    assert_equal_caches(tmp_path / "one" / "cache", tmp_path / "three" / "cache")
    pack = sim.collect.packing.pack
    monkeypatch.setattr(sim.collect.packing, "pack", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gather(demonstrations(tmp_path / "parts", episodes_per_task=2))
    monkeypatch.setattr(sim.collect.packing, "pack", pack)
    demonstration.staged_path(tmp_path / "parts" / "episodes", 0, 1).unlink()
    gather(demonstrations(tmp_path / "parts", workers=2))
    assert_equal_caches(tmp_path / "one" / "cache", tmp_path / "parts" / "cache")


class StumblingWorld(PointWorld):
    """Raises at start 1 of a task, once in all."""

    def __init__(self, marker: Path, image_size: int) -> None:
        super().__init__(image_size)
        self._marker = marker

    def reset(self, task: int, start: Start) -> None:
        if start.index == 1 and not self._marker.exists():
            self._marker.touch()
            raise ArithmeticError("the ball was nowhere")
        super().reset(task, start)


def build_stumbling_world(suite: str, *, marker: Path, image_size: int, mesh_detail: float) -> StumblingWorld:
    return StumblingWorld(marker, image_size)


def test_a_start_that_raised_is_tried_again_and_the_data_set_is_the_same(tmp_path):
    gather(demonstrations(tmp_path / "smooth"))
    build = functools.partial(build_stumbling_world, marker=tmp_path / "marker")
    report = collect(demonstrations(tmp_path / "stumbled"), build=build, expert=point_expert)
    assert_equal_caches(tmp_path / "smooth" / "cache", tmp_path / "stumbled" / "cache")
    errors = [attempt["error"] for attempt in read_rows(tmp_path / "stumbled" / "attempts.jsonl") if attempt["error"]]
    assert len(errors) == 1 and "nowhere" in errors[0] and report["expert_all"]["errors"] == 1


class ImpossibleWorld(PointWorld):
    """Raises whenever start 1 of a task is to begin."""

    def reset(self, task: int, start: Start) -> None:
        if start.index == 1:
            raise ArithmeticError("the ball is nowhere")
        super().reset(task, start)


def build_impossible_world(suite: str, *, image_size: int, mesh_detail: float) -> ImpossibleWorld:
    return ImpossibleWorld(image_size)


def test_a_start_that_raises_again_counts_as_not_solved_and_is_left_after_a_restart_too(tmp_path):
    config = demonstrations(tmp_path / "set", episodes_per_task=2)
    collect(config, build=build_impossible_world, expert=point_expert)
    rows = read_rows(tmp_path / "set" / "attempts.jsonl")
    assert [row["error"] is None for row in rows if row["index"] == 1] == [False] * 2 * 2
    assert sorted(row["index"] for row in rows if row["success"]) == [0, 0, 2, 2]
    other = demonstrations(tmp_path / "other", tasks=[0], episodes_per_task=2)
    other.root.mkdir()
    (other.root / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["error"] and row["task"] == 0))
    gather(other)  # in a world without the fault: what was found out stays found out
    assert [row["index"] for row in read_rows(other.root / "attempts.jsonl") if row["success"]] == [0, 2]


def test_a_process_that_died_says_nothing_of_its_start():
    rows = [{"task": 0, "index": index, "error": error, **more} for index, error, more in (
        (0, "killed", {"died": True}), (0, "killed", {"died": True}), (1, "raised", {}), (1, "raised", {}), (2, None, {}),
    )]  # fmt: skip
    assert times_raised(rows) == {(0, 1): 2}


def test_a_data_set_holds_the_episodes_asked_for_and_no_staging(tmp_path):
    report = gather(demonstrations(tmp_path / "set"))
    cache = FrameCache.open(tmp_path / "set")
    assert cache.num_episodes == 6 and cache.episode_tasks.tolist() == [0, 0, 0, 1, 1, 1]
    assert cache.instructions == ("reach ball 0", "reach ball 1")
    assert not (tmp_path / "set" / "episodes").exists()
    assert report["expert_all"]["successes"] == 6 and report["cache_bytes"] > 0
    assert "no LeRobotDataset" in cache.source
    with pytest.raises(ValueError, match="packed already"):
        gather(demonstrations(tmp_path / "set"))


def test_an_expert_that_cannot_do_a_task_is_found_out(tmp_path):
    with pytest.raises(ValueError, match=r"tasks \[2\]"):
        gather(demonstrations(tmp_path / "set", tasks=[0, 2], max_steps=30))
    attempts = read_rows(tmp_path / "set" / "attempts.jsonl")
    assert sum(attempt["task"] == 2 for attempt in attempts) == sim.collect.PATIENCE
    assert len(list((tmp_path / "set" / "episodes").glob("task_000-*.npz"))) == 3, "what other tasks have is kept"


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="noise 2"):
        gather(demonstrations(tmp_path / "set", noise=2.0))
    with pytest.raises(ValueError, match=r"tasks \[2\]"):
        gather(demonstrations(tmp_path / "set", tasks=[2], max_steps=30))
    with pytest.raises(ValueError, match="max_steps was 30, is 60"):
        gather(demonstrations(tmp_path / "set", tasks=[2]))


def test_a_full_disk_is_one_message_before_anything_is_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**6, 5 * 10**6))
    with pytest.raises(ValueError, match="needs about 1.0 GB, .* has 0.0 GB free"):
        gather(demonstrations(tmp_path / "set"))
    assert not list((tmp_path / "set" / "episodes").iterdir())


def test_a_schedule_tries_starts_in_order_and_never_too_many():
    schedule = Schedule([0], 2, [])
    assert [schedule.next_job(None) for _ in range(3)] == [Job(0, 0), Job(0, 1), None]
    schedule.finish(Job(0, 1), True)
    assert schedule.next_job(Job(0, 1)) is None, "start 0 may still succeed"
    schedule.finish(Job(0, 0), False)
    assert schedule.next_job(None) == Job(0, 2)
    schedule.finish(Job(0, 2), True)
    assert schedule.next_job(None) is None and schedule.solved(0) == [1, 2]


def test_a_schedule_resumes_from_attempts():
    attempts = [{"task": 0, "index": index, "success": index != 1} for index in range(3)]
    schedule = Schedule([0], 3, attempts)
    assert schedule.next_job(None) == Job(0, 3) and schedule.next_job(None) is None


def test_demonstrations_show_the_start_they_name(tmp_path):
    gather(demonstrations(tmp_path / "set", tasks=[1], episodes_per_task=2))
    attempts = read_rows(tmp_path / "set" / "attempts.jsonl")
    assert [(attempt["index"], attempt["seed"]) for attempt in attempts] == [(0, 0), (1, 1)]
    np.testing.assert_array_equal(FrameCache.open(tmp_path / "set").state[0], np.zeros(3))


def test_two_collections_cannot_share_a_folder(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="being written by process"):
        gather(demonstrations(tmp_path / "run"))
    gather(demonstrations(tmp_path / "run"))


def test_random_starts_and_mishaps_are_part_of_a_collection_and_the_same_whatever_the_workers(tmp_path):
    options = dict(tasks=[0], episodes_per_task=2, random_starts=True, mishaps=1.0)
    gather(demonstrations(tmp_path / "one", **options))
    gather(demonstrations(tmp_path / "two", workers=2, **options))
    assert_equal_caches(tmp_path / "one" / "cache", tmp_path / "two" / "cache")
    cache = FrameCache.open(tmp_path / "one")
    assert np.abs(cache.state[0]).max() > 0.01, "the hand begins elsewhere"
    assert 0 < np.count_nonzero(~cache.followed) <= 2 * PUSH_STEPS, "else chunks lead across what was never executed"
    with pytest.raises(ValueError, match="mishaps 1.5"):
        gather(demonstrations(tmp_path / "three", mishaps=1.5))
    plain, changed = demonstrations(tmp_path).identity, demonstrations(tmp_path, **options).identity
    assert {key for key in plain if plain[key] != changed[key]} == {"random_starts", "mishaps"}
