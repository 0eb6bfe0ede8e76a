"""Laws of episode rows, intervals, tables and eval_info.json."""

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sim.results import EpisodeRow, append_row, eval_info, mean, read_episodes, read_rows, success_table, tally, wilson


def row(task: int = 0, episode: int = 0, *, success: bool = True, error: str | None = None, **changes) -> EpisodeRow:
    values = dict(
        suite="libero_object", task=task, instruction=f"task {task}", episode=episode, split="validation",
        initial_state_index=episode, seed=1_000_000_000 + episode, success=success, steps=50, error=error, wall_s=2.0,
        chunks=7, rounds=4.0, policy_ms=30.0, jerk=0.1, video=None, mujoco="3.3.2", robosuite="1.4.0", torch="2.10.0",
        remask="0.1.0", renderer="llvmpipe", gl="egl", assets="wheel", checkpoint="ab", git_commit="cd",
    )  # fmt: skip
    return EpisodeRow(**{**values, **changes})


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts: tuple[int, int]):
    """Both bounds p satisfy |rate - p| = z sqrt(p (1 - p) / n), the definition of the score interval."""
    successes, n = counts
    rate, z = successes / n, 1.959964
    low, high = wilson(successes, n)
    assert 0 <= low <= rate <= high <= 1
    for bound in (low, high):
        assert abs(rate - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_is_symmetric_and_narrows(successes: int, more: int):
    n = successes + more
    low, high = wilson(successes, n)
    mirrored = wilson(n - successes, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)
    narrower = wilson(10 * successes, 10 * n)
    assert narrower[1] - narrower[0] < high - low


def test_wilson_known_value_and_limits():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)  # Newcombe 1998, method 3
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_errors_are_in_no_rate():
    count = tally([row(), row(success=False), row(success=False, error="boom")])
    assert (count.successes, count.episodes, count.errors, count.rate) == (1, 2, 1, 0.5)
    assert "1 errors" in str(count)
    assert math.isnan(tally([row(error="boom")]).rate)


def test_mean_is_over_what_is_there():
    assert mean([1.0, None, 3.0]) == 2.0 and mean([None]) is None


def test_rows_come_back_as_written(tmp_path):
    rows = [row(0, 0), row(0, 1, success=False, error='quote " and newline \n', rounds=None)]
    for each in rows:
        append_row(tmp_path / "rows.jsonl", each.__dict__)
    assert read_episodes(tmp_path / "rows.jsonl") == rows
    assert read_episodes(tmp_path / "absent.jsonl") == []


def test_rows_survive_any_truncation(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        append_row(path, {"number": number})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        before = read_rows(path)
        append_row(path, {"number": "new"})
        assert read_rows(path) == [*before, {"number": "new"}]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(path)


def test_rows_of_another_version_are_refused(tmp_path):
    append_row(tmp_path / "rows.jsonl", {**row().__dict__, "reward": 1.0})
    with pytest.raises(ValueError, match="line 1 has other fields.*reward"):
        read_episodes(tmp_path / "rows.jsonl")


def test_eval_info_holds_every_key_of_lerobot_eval():
    """The keys that lerobot-eval 0.4.4 writes (lerobot_eval.py, eval_policy_all)."""
    rows = [row(0, 0, video="videos/a.mp4"), row(0, 1, success=False), row(1, 0, error="boom", success=False), row(1, 1)]
    info = eval_info(rows, seconds=8.0, episodes_run=4, config={"split": "validation"})
    assert {"per_task", "per_group", "overall"} <= info.keys()
    aggregated = {"avg_sum_reward", "avg_max_reward", "pc_success", "n_episodes", "video_paths"}
    assert aggregated <= info["per_group"]["libero_object"].keys()
    assert aggregated | {"eval_s", "eval_ep_s"} <= info["overall"].keys()
    first, second = info["per_task"]
    assert (first["task_group"], first["task_id"]) == ("libero_object", 0)
    assert first["metrics"] == {
        "sum_rewards": [1.0, 0.0],
        "max_rewards": [1.0, 0.0],
        "successes": [True, False],
        "video_paths": ["videos/a.mp4"],
    }
    assert second["metrics"]["successes"] == [True]
    assert info["overall"]["pc_success"] == pytest.approx(200 / 3) and info["overall"]["eval_ep_s"] == 2.0
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert [episode["seed"] for episode in info["episodes"]] == [each.seed for each in rows]


def test_eval_info_without_a_finished_episode_is_valid_json():
    info = eval_info([row(error="boom", success=False)], seconds=1.0, episodes_run=1, config={})
    assert json.loads(json.dumps(info, allow_nan=False))["overall"]["pc_success"] is None


def test_the_table_shows_tasks_and_their_sum():
    rows = [row(task, episode, success=episode < 3) for task in (0, 1) for episode in range(4)]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(success_table(rows, "title"))
    text = console.export_text()
    assert text.count("3/4") == 2 and "6/8" in text and "75.0" in text and "2 tasks" in text
