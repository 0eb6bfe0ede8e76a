"""Laws of the studies' arms: one thing is changed at a time, every remasking rule is there, all are paired with the first."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from sim.evaluate import EvaluateConfig
from sim.policy_source import PolicySource
from sim.report.verb import build_section
from sim.results import append_row
from tests.benchmarks import arms as compared
from tests.benchmarks import bench_options, bench_prefix, harness, studies
from tests.benchmarks.bench_decode_study import FACTORS, plot, variants_of
from tests.benchmarks.bench_options import OPTIONS, arms_of, chosen
from tests.benchmarks.bench_prefix import COMPRESSORS
from tests.point_world import PointPolicy, build_point_world, point_expert
from tests.test_evaluate import CHECKPOINT, settings, three_tasks  # noqa: F401 (three_tasks is a fixture)
from tests.test_report import episode
from tests.tiny_policy import write_policy
from vla.cli import parse_config
from vla.model import VLAConfig
from vla.train import TrainConfig
from vla.unmasking import REMASK_RULES, DecodeConfig


def test_a_decode_variant_differs_from_the_base_in_one_setting():
    base, decode = EvaluateConfig(policy=PolicySource(path="P")), DecodeConfig(rounds=6, remask="none")
    variants = variants_of(base, decode, FACTORS)
    assert variants.pop("base").policy.decode == asdict(decode)
    for name, config in variants.items():
        changed = [key for key, value in config.policy.decode.items() if value != getattr(decode, key)]
        assert len(changed) == 1 and name.startswith(changed[0])
        assert replace(config, policy=base.policy) == base, "nothing but the decoding"
    assert len(variants) == sum(map(len, FACTORS.values())) - len(FACTORS), "the base's own values are not run twice"
    assert {"remask-" + rule for rule in REMASK_RULES} - {"remask-none"} <= set(variants)
    assert {f"rounds-{rounds}" for rounds in (1, 2, 4, 8, 12)} <= set(variants)


def test_the_study_is_drawn_with_or_without_some_of_its_variants(tmp_path: Path):
    row = {"success %": 90.0, "95 % low": 80.0, "95 % high": 95.0, "n": 100, "ms per chunk": 24.0}
    rows = [row | {"decoding": name} for name in ("base", "rounds-1", "rounds-12", "remask-remdm")]
    plot([*rows, row | {"decoding": "threshold-0.5", "n": 0}], DecodeConfig(), tmp_path / "study" / "plot.png")
    assert (tmp_path / "study" / "plot.png").stat().st_size > 5000


def arms(tmp_path: Path, **changes):
    base = {"model": {"preset": "desk-s"}, "objective": {"type": "hl_gauss", "sigma": 2.0}, "head": {"mask_draws": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    given = {"config": tmp_path / "base.yaml", "options": list(OPTIONS), "seeds": [0], "backbone": None, **changes}
    return base, arms_of(argparse.Namespace(**given), tmp_path / "arms")


def test_an_option_changes_one_section_of_the_base(tmp_path: Path):
    base, found = arms(tmp_path, backbone="VLM")
    assert found[0].name == "base" and yaml.safe_load(found[0].config.read_text()) == base
    for arm in found[1:-1]:
        config = yaml.safe_load(arm.config.read_text())
        assert sum(config.get(section) != base.get(section) for section in config) == 1, arm.name
    assert found[-1].settings == ("--policy.backbone.path=VLM",)
    names = [arm.name for arm in found]
    assert len(names) == len(set(names)) and "objective-hl_gauss" not in names and "mask_draws-2" not in names


def test_an_option_is_tried_at_all_its_values_or_at_those_named(tmp_path: Path):
    _, found = arms(tmp_path, options=["mask_draws=8,1", "objective=earth_mover"])
    assert [arm.name for arm in found] == ["base", "mask_draws-8", "mask_draws-1", "objective-earth_mover"]
    assert chosen("mask_draws") == ("mask_draws", tuple(OPTIONS["mask_draws"]))
    with pytest.raises(ValueError, match=r"no option 'masks'; there are replace_visible, .*augmentation"):
        chosen("masks=1")
    with pytest.raises(ValueError, match=r"mask_draws has no value 3; it has 1, 2, 4, 8"):
        chosen("mask_draws=1,3")


def test_further_seeds_train_the_base_again_and_the_first_trains_all(tmp_path: Path):
    _, found = arms(tmp_path, seeds=[0, 1, 1], options=["mask_draws"])
    assert [arm.name for arm in found] == ["base", "base, seed 1", "mask_draws-1", "mask_draws-4", "mask_draws-8"]
    words = [[f"--config_path={arm.config}", f"--output_dir={tmp_path / arm.name}"] for arm in found]
    configs = [parse_config(TrainConfig, each) for each in words]
    assert [config.training.seed for config in configs] == [0, 1, 0, 0, 0]
    assert replace(configs[1], training=configs[0].training, output_dir=configs[0].output_dir) == configs[0]
    assert configs[1].output_dir == tmp_path / "base, seed 1"
    _, found = arms(tmp_path, seeds=[3], options=["mask_draws"])
    assert {parse_config(TrainConfig, [f"--config_path={arm.config}"]).training.seed for arm in found} == {3}


def test_arms_are_paired_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    solved = {"base": [True, False] * 5, "worse": [False] * 10}
    found = [compared.Arm(name, tmp_path / "base.yaml") for name in solved]
    (tmp_path / "base.yaml").write_text("{}")
    for name in solved:
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"step": 7, "validation/action_error": 0.5}\n{"step": 9}\n')
    monkeypatch.setattr(compared, "start_training", lambda *_: None)
    monkeypatch.setattr(compared, "arms_milliseconds", lambda *_: dict.fromkeys(solved, 24.0))
    monkeypatch.setattr(compared, "evaluate_arm", lambda arm, *_: [episode(0, i, s) for i, s in enumerate(solved[arm.name])])
    options = argparse.Namespace(dataset="D", tasks="", minutes=1, suite="libero_object", concurrent=2)
    rows = compared.compare_arms(found, tmp_path, options)
    base, worse = (dict(zip(compared.COLUMNS, row[1:], strict=True)) for row in rows)
    assert [base[name] for name in ("difference", "low", "high", "p")] == [None] * 4
    assert worse["difference"] == -50.0 and worse["low"] < -50 < worse["high"] < 0 and worse["p"] == pytest.approx(2 / 2**5)
    assert (worse["n"], worse["ms per chunk"], worse["steps trained"], worse["held-out error"]) == (10, 24.0, 9, 0.5)


def test_an_arm_is_judged_on_the_starts_asked_for_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A finished arm may hold more, of an earlier call: beside one with fewer, its rate would be of other starts."""
    arm = compared.Arm("base", tmp_path / "base.yaml")
    (tmp_path / "base-evaluation").mkdir()
    for index in range(8):
        append_row(tmp_path / "base-evaluation" / "episodes.jsonl", asdict(episode(index % 4, index // 4, True)))
    monkeypatch.setattr(compared.subprocess, "run", lambda *_, **__: None)
    rows = compared.evaluate_arm(arm, tmp_path, argparse.Namespace(tasks="[1, 2]", suite="libero_object", episodes=3))
    assert [(row.task, row.episode) for row in rows] == [(1, 0), (2, 0)]


def test_a_benchmark_says_its_command_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "git_commit", lambda: 40 * "a" + "-dirty")
    monkeypatch.setattr(sys, "argv", ["vla", "bench", "options", "--tasks", "[0, 1]"])
    harness.report("options-x", ["option"], [["base"]], tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["command"] == sys.argv[1:]
    facts = build_section("bench.json", tmp_path).facts
    assert facts["command"] == "`vla bench options --tasks '[0, 1]'`" and facts["commit"] == 12 * "a" + "-dirty"


def test_a_prefix_arm_changes_the_compressor_alone_and_can_be_trained(tmp_path: Path):
    base = {"model": {"preset": "desk-s", "compressor": {"mode": "conv", "conv_ratio": 2}}, "head": {"mask_draws": 2}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    options = argparse.Namespace(config=tmp_path / "base.yaml", compressors=list(COMPRESSORS))
    found = bench_prefix.arms_of(options, tmp_path / "arms")
    assert [arm.name for arm in found] == list(COMPRESSORS)
    for arm in found:
        config = parse_config(TrainConfig, [f"--config_path={arm.config}"])
        unchanged = parse_config(TrainConfig, [f"--config_path={options.config}"])
        assert replace(config, model=replace(config.model, compressor=unchanged.model.compressor)) == unchanged
        given = COMPRESSORS[arm.name]
        assert VLAConfig(compressor=config.model.compressor) and asdict(config.model.compressor).items() >= given.items()


def test_visual_tokens_are_counted_before_and_after(tmp_path: Path):
    assert bench_prefix.visual_tokens(write_policy(tmp_path / "policy")) == (8, 8)


def test_every_option_is_a_setting_of_training(tmp_path: Path):
    sections = {field.name: field for field in fields(TrainConfig)}
    for values in OPTIONS.values():
        for section, given in values.values():
            if section != "objective":
                known = {field.name for field in fields(type(getattr(TrainConfig(), section)))}
                assert section in sections and set(given) <= known, (section, given)


@pytest.fixture
def point_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folder "loud" has a policy with more noise; both live in the point world."""

    def load(source: PolicySource, workers: int) -> PointPolicy:
        policy = PointPolicy(noise=2.0 if source.path == "loud" else 0.2)
        policy.content_hash = CHECKPOINT
        return policy

    real = studies.evaluate
    monkeypatch.setattr(studies, "load_source", load)
    monkeypatch.setattr(studies, "evaluate", lambda *arguments: real(*arguments, build=build_point_world))


def test_a_study_is_paired_and_resumes(tmp_path: Path, point_policies, capsys):
    base = settings(tmp_path, resume=True, output_dir=None)
    variants = {"base": base, "same": base, "loud": replace(base, policy=PolicySource(path="loud"))}
    found = studies.evaluate_variants(variants, tmp_path)
    rows = {row[0]: dict(zip(studies.COLUMNS, row[1:], strict=True)) for row in studies.study_rows(found, "base")}
    assert rows["base"]["difference"] is None and rows["same"]["difference"] == 0.0 and rows["same"]["p"] == 1.0
    assert rows["loud"]["difference"] < 0 and rows["loud"]["n"] == 12
    assert studies.evaluate_variants(variants, tmp_path) == found, "a second call runs nothing"


def test_a_chunk_is_timed_on_what_a_whole_episode_shows(point_policies, monkeypatch: pytest.MonkeyPatch):
    """The first picture alone takes the most rounds: a lift policy decoded it in 6.0 and those of whole episodes in 5.4."""
    monkeypatch.setattr(studies, "build_environment", build_point_world)
    monkeypatch.setattr(studies, "build_expert", point_expert)
    monkeypatch.setattr(studies, "STRIDE", 4)
    monkeypatch.setattr(studies, "quiet_machine", contextlib.nullcontext)
    config = EvaluateConfig(policy=PolicySource(path="quiet"), suite="libero_object", tasks=[1])
    seen = studies.observations_along(config)
    assert len(seen) > 1 and not seen[0].state.any() and len({each.state.tobytes() for each in seen}) == len(seen)
    asked = []
    monkeypatch.setattr(PointPolicy, "act", lambda self, observations, **_: asked.extend(each.state.tobytes() for each in observations))
    studies.variants_milliseconds({"base": config}, argparse.Namespace(threads=1, repetitions=1))
    assert set(asked) == {each.state.tobytes() for each in seen}


def test_an_objective_is_replaced_as_a_whole():
    base = {"objective": {"type": "hl_gauss", "sigma": 2.0}, "head": {"mask_draws": 2}}
    assert bench_options.changed(base, "objective", {"type": "comp_sum"})["objective"] == {"type": "comp_sum"}
    assert bench_options.changed(base, "head", {"known_prefix": 0.5})["head"] == {"mask_draws": 2, "known_prefix": 0.5}
