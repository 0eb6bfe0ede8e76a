"""Laws of evaluation at scale: shards merged are the evaluation; perturbed rows say so and do not mix with clean ones."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import sim.evaluate
from sim.compare import compare, pair_episodes
from sim.evaluate import EvaluateConfig, evaluate
from sim.merge_evaluations import MergeConfig, merge
from sim.perturbations.kinds import PerturbConfig
from sim.results import append_row, latest_episodes, read_episodes
from sim.shards import parse_shard, shard_of
from tests.point_world import PointPolicy, build_point_world
from tests.test_evaluate import CHECKPOINT, outcomes, settings, three_tasks  # noqa: F401 (three_tasks is a fixture)


def run(config: EvaluateConfig):
    return evaluate(config, PointPolicy(), CHECKPOINT, build=build_point_world)


def test_shards_are_all_items_once():
    items = list(range(11))
    for count in range(1, 8):
        assert sorted(item for index in range(count) for item in shard_of(items, f"{index}/{count}")) == items


@pytest.mark.parametrize("text", ["4/4", "1", "a/3", "-1/3", "1/0", "0/"])
def test_a_shard_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError, match="allowed: i/n with 0 <= i < n"):
        parse_shard(text)


def test_merged_shards_are_the_evaluation(tmp_path: Path):
    whole = run(settings(tmp_path / "whole"))
    folders = [tmp_path / f"shard{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        run(settings(folder, shard=f"{index}/3"))
    merged = merge(MergeConfig(folders[::-1], tmp_path / "merged"))
    assert outcomes(merged) == outcomes(whole) == outcomes(read_episodes(tmp_path / "merged" / "episodes.jsonl"))
    one, other = (json.loads((tmp_path / name / "eval_info.json").read_text()) for name in ("whole", "merged"))
    untimed = ("wall_s", "policy_ms", "eval_s", "eval_ep_s")
    assert strip(one["per_task"], untimed) == strip(other["per_task"], untimed)
    assert outcomes(run(settings(tmp_path / "merged", resume=True))) == outcomes(whole), "a merged folder can be resumed"


def strip(value, names):
    if isinstance(value, dict):
        return {key: strip(each, names) for key, each in value.items() if key not in names}
    return [strip(each, names) for each in value] if isinstance(value, list) else value


def test_shards_that_do_not_make_a_whole_are_refused(tmp_path: Path):
    for index in (0, 1):
        run(settings(tmp_path / f"s{index}", episodes=1, shard=f"{index}/3"))
    run(settings(tmp_path / "other", episodes=1, shard="2/3", max_steps=9))
    run(settings(tmp_path / "whole", episodes=1))
    for folders, names in (
        (["s0", "s1"], "0/3, 1/3; needed once each: 0/3 to 2/3"),
        (["s0", "s1", "s1"], "0/3, 1/3, 1/3; needed"),
        (["s0", "s1", "other"], "max_steps was 40, is 9"),
        (["whole"], "is no shard"),
    ):
        with pytest.raises(ValueError, match=names):
            merge(MergeConfig([tmp_path / name for name in folders], tmp_path / "merged"))
    run(settings(tmp_path / "more", episodes=2, shard="2/3"))
    with pytest.raises(ValueError, match="episodes was 1, is 2"):
        merge(MergeConfig([tmp_path / name for name in ("s0", "s1", "more")], tmp_path / "merged"))
    with pytest.raises(ValueError, match="shard 3/4 of 3 episodes is empty"):
        run(settings(tmp_path / "empty", episodes=1, shard="3/4"))


def test_a_shard_that_was_stopped_is_no_part_of_a_whole(tmp_path: Path):
    folders = [tmp_path / f"s{index}" for index in range(2)]
    for index, folder in enumerate(folders):
        run(settings(folder, episodes=2, shard=f"{index}/2"))
    rows = (folders[1] / "episodes.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "episodes.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match="s1 lacks 1 episodes, the first is number 1 of task 2"):
        merge(MergeConfig(folders, tmp_path / "merged"))
    run(settings(folders[1], episodes=2, shard="1/2", resume=True))
    assert len(merge(MergeConfig(folders, tmp_path / "merged"))) == 6


def test_an_episode_that_was_run_again_after_an_error_counts_once(tmp_path: Path):
    rows = run(settings(tmp_path / "run"))
    path = tmp_path / "run" / "episodes.jsonl"
    append_row(path, asdict(replace(rows[0], success=not rows[0].success)))
    latest = latest_episodes(path)
    assert len(read_episodes(path)) == len(rows) + 1 and len(latest) == len(rows)
    assert latest[0].success != rows[0].success and latest[1:] == rows[1:]
    assert compare(pair_episodes(latest, rows)).n == len(rows)


def test_rows_say_what_they_were_perturbed_by(tmp_path: Path):
    clean = run(settings(tmp_path / "clean"))
    noisy = run(settings(tmp_path / "noisy", perturb=PerturbConfig("state_noise", 5)))
    same = run(settings(tmp_path / "same", perturb=PerturbConfig("state_noise", 0)))
    assert {row.perturbation for row in noisy} == {"state_noise-5"} and {row.perturbation for row in clean} == {"none"}
    assert [replace(row, perturbation="none") for row in same] != noisy
    assert [each | {"perturbation": ""} for each in outcomes(same)] == [each | {"perturbation": ""} for each in outcomes(clean)]
    assert [row.steps for row in noisy] != [row.steps for row in clean]


CHANGES = [(("blur", 2), ("none", 3)), (("none", 3), ("blur", 2)), (("blur", 2), ("blur", 3))]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_folder_is_resumed_under_its_own_perturbation_only(tmp_path: Path, before, after):
    run(settings(tmp_path / "run", episodes=1, perturb=PerturbConfig(*before)))
    with pytest.raises(ValueError, match="cannot be resumed: perturb was"):
        run(settings(tmp_path / "run", resume=True, perturb=PerturbConfig(*after)))


def test_folders_of_before_perturbations_are_read_and_resumed(tmp_path: Path):
    rows = run(settings(tmp_path / "run", tasks=[0]))
    path = tmp_path / "run" / "episodes.jsonl"
    old = [{key: value for key, value in asdict(row).items() if key != "perturbation"} for row in rows[:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps({key: kept[key] for key in kept.keys() - {"perturb", "shard"}}))
    assert read_episodes(path) == rows[:2]
    assert outcomes(run(settings(tmp_path / "run", tasks=[0], resume=True))) == outcomes(rows)


def test_the_default_folder_names_perturbation_and_shard(tmp_path: Path):
    config = EvaluateConfig(perturb=PerturbConfig("camera", 4), shard="1/8")
    assert sim.evaluate.output_dir(config, "0123456789").name == "robosuite_lift-validation-01234567-camera-4-shard-1-of-8"
