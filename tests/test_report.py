"""Laws of `vla report`: a table is what the rows say, blocks are rewritten and nothing else, a stale number is found."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sim.report.others import bench_command
from sim.report.readme import disagreements, rewritten, split_blocks
from sim.report.section import markdown_table
from sim.report.verb import build_section, main
from sim.results import EpisodeRow, append_row, wilson

TEXT = "# Title\n\n<!-- report:lift -->\nold\n<!-- /report -->\n\nBetween.\n\n<!-- report:heads -->\n<!-- /report -->\nEnd."


def episode(task: int, index: int, success: bool, **changes) -> EpisodeRow:
    values = dict(
        suite="libero_object", task=task, instruction=f"reach ball {task}", episode=index, split="validation",
        initial_state_index=index, seed=1_000_000_000 + index, success=success, steps=10, error=None, wall_s=1.0, chunks=2,
        rounds=6.0, policy_ms=24.0, jerk=0.1, video=None, mujoco="3.3.2", robosuite="1.4.0", torch="2.10.0", remask="0.1.0",
        renderer="llvmpipe", gl="egl", assets="LIBERO assets, some stood in for (its README.md)", checkpoint="abcdef0123456789",
        git_commit="0123456789abcdef-dirty",
    )  # fmt: skip
    return EpisodeRow(**{**values, **changes})


def evaluation(folder: Path, successes: list[bool], **changes) -> Path:
    folder.mkdir(parents=True)
    for index, success in enumerate(successes):
        append_row(folder / "episodes.jsonl", asdict(episode(index % 2, index // 2, success, **changes)))
    settings = {"protocol": "openpi", "execution_horizon": 5, "max_steps": 280, "decode": {}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def cells(section, row: int) -> list[str]:
    return [cell.strip() for cell in section.table.splitlines()[2 + row].strip("|").split(" | ")]


def test_an_evaluation_is_told_by_task_with_all_that_it_rests_on(tmp_path: Path):
    section = build_section(evaluation(tmp_path / "run", [True, False] * 5), tmp_path)
    low, high = wilson(5, 10)
    assert cells(section, 0)[:3] == ["0", "reach ball 0", "5/5"] and cells(section, 1)[2] == "0/5"
    assert cells(section, 2)[2:4] == ["5/10", f"50 % [{100 * low:.1f}, {100 * high:.1f}]"]
    for fact in (
        "commit: 0123456789ab-dirty", "checkpoint: abcdef0123456789", "mujoco 3.3.2", "torch 2.10.0", "95 % Wilson", "llvmpipe",
        "stood in for", "seeds 1000000000 to 1000000004", "execution_horizon 5", "validation",
    ):  # fmt: skip
        assert fact in section.block


def test_evaluations_of_one_name_are_told_apart_and_none_is_lost(tmp_path: Path):
    names = ["a/round_1/evaluation", "b/round_1/evaluation", "b/round_2/evaluation"]
    for count, name in enumerate(names, start=1):
        evaluation(tmp_path / name, [True] * count + [False] * (4 - count))
    section = build_section(names, tmp_path)
    assert [cells(section, row)[:2] for row in range(3)] == [[names[0], "1/4"], [names[1], "2/4"], ["round_2/evaluation", "3/4"]]
    with pytest.raises(ValueError, match="named twice: .*round_1/evaluation"):
        build_section([names[0], names[0]], tmp_path)


def test_errors_are_in_no_rate_and_the_latest_row_counts(tmp_path: Path):
    folder = evaluation(tmp_path / "run", [True, True])
    append_row(folder / "episodes.jsonl", asdict(episode(0, 1, False, error="crashed")))
    assert cells(build_section(folder, tmp_path), 0)[2:5][::2] == ["1/1", "1"]
    append_row(folder / "episodes.jsonl", asdict(episode(0, 1, False)))
    assert cells(build_section(folder, tmp_path), 0)[2:5][::2] == ["1/2", "0"]


def test_evaluations_are_paired_with_the_first(tmp_path: Path):
    evaluation(tmp_path / "study" / "a", [False, True, False, True])
    evaluation(tmp_path / "study" / "b", [True, True, True, True])
    section = build_section("study", tmp_path)
    assert cells(section, 0)[0] == "a" and cells(section, 1)[0] == "b"
    assert cells(section, 1)[-1].startswith("+50.0 [") and "n 4" in cells(section, 1)[-1]


def test_perturbations_stand_against_the_clean_row(tmp_path: Path):
    evaluation(tmp_path / "study" / "clean", [True] * 8)
    evaluation(tmp_path / "study" / "camera-1", [True] * 8, perturbation="camera-1")
    evaluation(tmp_path / "study" / "camera-5", [False] * 8, perturbation="camera-5")
    evaluation(tmp_path / "study" / "state_noise-5", [True, False] * 4, perturbation="state_noise-5")
    section = build_section("study", tmp_path)
    assert cells(section, 1) == ["camera", "100, +0 [-32, +32]", "0, -100 [-100, -54]"], "none seen is not none"
    assert cells(section, 2)[:2] == ["state_noise", "-"] and cells(section, 2)[2].startswith("50, -50 [")
    with pytest.raises(ValueError, match="0 of the evaluations .* are clean"):
        build_section([tmp_path / "study" / "camera-1", tmp_path / "study" / "camera-5"], tmp_path)


def test_only_evaluations_by_one_protocol_are_paired(tmp_path: Path):
    for name, changes in (("study/a", {}), ("study/b", {}), ("kinds/clean", {}), ("kinds/blur-2", {"perturbation": "blur-2"})):
        folder = evaluation(tmp_path / name, [True] * 4, **changes)
        if name in ("study/b", "kinds/blur-2"):
            (folder / "settings.json").write_text(json.dumps({"protocol": "lerobot", "max_steps": 280}))
    for source in ("study", "kinds"):
        with pytest.raises(ValueError, match="protocol was 'openpi', is 'lerobot'"):
            build_section(source, tmp_path)


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"perturbation": "blur-2"}, "again and blur-2 are both of blur-2"), ({"perturbation": "blur-3", "checkpoint": "b"}, "one checkpoint")],
)
def test_a_perturbation_study_has_one_checkpoint_and_each_cell_once(tmp_path: Path, changes: dict, names: str):
    evaluation(tmp_path / "study" / "clean", [True] * 4)
    evaluation(tmp_path / "study" / "blur-2", [True] * 4, perturbation="blur-2")
    evaluation(tmp_path / "study" / "again", [False] * 4, **changes)
    with pytest.raises(ValueError, match=names):
        build_section("study", tmp_path)


def test_json_files_and_other_folders_become_tables(tmp_path: Path):
    record = {"benchmark": "heads-x", "rows": [{"head": "flow", "ms": 1.23456}], "minutes": 20, "versions": {"torch": "2.10.0"}}
    (tmp_path / "heads.json").write_text(json.dumps(record))
    assert cells(build_section("heads.json", tmp_path), 0) == ["flow", "1.235"]
    rounds = [{"number": 0, "labels": 0, "successes": 3, "episodes": 4, "interval_95": [0.3, 0.95], "corrected_success": None}]
    (tmp_path / "dagger").mkdir()
    (tmp_path / "dagger" / "rounds.json").write_text(json.dumps(rounds))
    assert cells(build_section("dagger", tmp_path), 0) == ["0", "0", "3/4", "75 % [30.0, 95.0]", "-"]
    control = {"successes": 2, "episodes": 4, "interval_95": [0.1, 0.9]}
    rounds.append(rounds[0] | {"number": 1, "labels": 9, "corrected_success": 0.5, "control": control})
    (tmp_path / "dagger" / "rounds.json").write_text(json.dumps(rounds))
    assert cells(build_section("dagger", tmp_path), 1) == ["1", "9", "3/4", "75 % [30.0, 95.0]", "50 %", "2/4", "50 % [10.0, 90.0]"]
    (tmp_path / "data").mkdir()
    each = {"successes": 3, "episodes": 4, "errors": 0, "interval_95": [0.3, 0.95], "mean_steps": 90.5}
    (tmp_path / "data" / "collect.json").write_text(json.dumps({"suite": "s", "expert": {"0": each}, "expert_all": each}))
    assert cells(build_section("data", tmp_path), 1) == ["all", "3/4", "75 % [30.0, 95.0]", "0", "90.5"]


def test_a_benchmarks_command_names_no_folder_of_its_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REMASK_HOME", "/some/disk")
    typed = ["bench", "decode_study", "--policy", "/some/disk/runs/a b/policy", "--output", "/tmp/x.json", "--episodes", "6"]
    shown = "vla bench decode_study --policy 'REMASK_HOME/runs/a b/policy' --episodes 6"
    assert bench_command({"benchmark": "decode_study", "command": typed}) == shown
    typed[4:6] = ["--output=/tmp/x.json"]
    assert bench_command({"benchmark": "decode_study", "command": typed}) == shown
    assert bench_command({"benchmark": "options-robosuite_lift"}) == "vla bench options"


def test_a_source_that_is_none_says_what_was_looked_for(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    wrong = {"nowhere": "no source", "empty": "no episodes.jsonl, rounds.json", "other.json": "key 'benchmark'"}
    for given, names in wrong.items():
        with pytest.raises((FileNotFoundError, ValueError), match=names):
            build_section(given, tmp_path)


def test_rewriting_changes_blocks_and_nothing_else():
    new = rewritten(TEXT, {"lift": "| a |\n"})
    assert new == TEXT.replace("old", "| a |")
    assert rewritten(new, {"lift": "| a |"}) == new, "a second time changes nothing"
    assert "".join(part for _, part in split_blocks(TEXT)) == TEXT
    assert list(disagreements(TEXT, {"lift": "new", "heads": ""})) == ["lift"]
    assert not disagreements(new, {"lift": "| a |", "heads": ""})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("<!-- report:a -->\n", "'a' is not closed"),
        ("<!-- /report -->\n", "line 1 ends a block"),
        ("<!-- report:a -->\n<!-- report:b -->\n", "'b' inside block 'a'"),
        ("<!-- report:a -->\n<!-- /report -->\n<!-- report:a -->\n<!-- /report -->\n", "'a' a second time"),
    ],
)
def test_torn_blocks_are_refused(text: str, names: str):
    with pytest.raises(ValueError, match=names):
        split_blocks(text)


def test_the_verb_writes_then_agrees_and_finds_a_changed_number(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, readme = evaluation(tmp_path / "run", [True] * 10), tmp_path / "README.md"
    readme.write_text("Before\n<!-- report:lift -->\n<!-- /report -->\nAfter\n")
    common = [f"--sources={{lift: {folder}}}", f"--readme={readme}", f"--output_dir={tmp_path / 'report'}"]
    assert main([*common, "--check"]) == 1 and "10/10" in capsys.readouterr().err
    assert "10/10" not in readme.read_text(), "a check writes nothing"
    assert main(common) == 0 and "10/10" in readme.read_text()
    assert (tmp_path / "report" / "report.md").exists() and (tmp_path / "report" / "lift-success.png").stat().st_size > 1000
    assert main([*common, "--check"]) == 0
    readme.write_text(readme.read_text().replace("10/10", "11/11"))
    assert main([*common, "--check"]) == 1
    readme.write_text("<!-- report:other -->\n<!-- /report -->\n")
    with pytest.raises(ValueError, match="blocks .'other'. without a source; sources: lift"):
        main([*common, "--check"])


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_several_tables_of_experts_are_a_line_each(tmp_path: Path):
    rate = {"errors": 0, "interval_95": [0.5, 0.9], "mean_steps": 80.0}
    paths = []
    for suite, solved in (("libero_object", 10), ("libero_goal", 7)):
        tasks = {
            "0": {"instruction": "a", "successes": 10, "episodes": 10, **rate},
            "1": {"instruction": "b", "successes": solved, "episodes": 10, **rate},
        }
        config = {"suite": suite, "split": "official", "noise": 0.0}
        paths.append(tmp_path / f"{suite}.json")
        paths[-1].write_text(json.dumps({"config": config, "tasks": tasks, "all": {"successes": 10 + solved, "episodes": 20, **rate}}))
    section = build_section([path.name for path in paths], tmp_path)
    assert cells(section, 0)[:4] == ["libero_object", "official", "2", "20/20"] and cells(section, 0)[-2:] == ["2", ""]
    assert cells(section, 1)[3] == "17/20" and cells(section, 1)[-2:] == ["1", "b: 7/10"]
    (tmp_path / "bench.json").write_text('{"benchmark": "x", "rows": []}')
    with pytest.raises(ValueError, match="bench.json is no file of `vla experts`"):
        build_section([paths[0].name, "bench.json"], tmp_path)
