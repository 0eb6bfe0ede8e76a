"""Laws of the paired comparison: antisymmetry, pairing by start, errors left out, exact test against enumeration."""

import json
import math
from dataclasses import asdict, fields, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from rich.table import Table

import sim.compare_policies
import sim.evaluate
from sim.compare import compare, main, mcnemar, pair_episodes, paired_interval
from sim.compare_policies import SIGNIFICANT, ComparePoliciesConfig, evaluate_both, one_sided_p, output_folder
from sim.perturbations.kinds import PerturbConfig
from sim.results import EpisodeRow
from tests.point_world import PointPolicy, build_point_world
from tests.tiny_policy import write_policy
from vla.attacked_policy import AttackedPolicy
from vla.show import show


def row(index: int, success: bool, task: int = 0, error: str | None = None, seed: int = 7) -> EpisodeRow:
    values = {field.name: "x" for field in fields(EpisodeRow)}
    values |= dict(
        task=task, episode=index, initial_state_index=index, seed=seed, success=success, steps=10, error=error, wall_s=1.0,
        chunks=1, rounds=1.0, policy_ms=1.0, jerk=0.1, video=None,
    )  # fmt: skip
    return EpisodeRow(**values)


def rows(outcomes, **more) -> list[EpisodeRow]:
    return [row(index, bool(success), **more) for index, success in enumerate(outcomes)]


def test_exchanging_the_sides_exchanges_the_result():
    a, b = rows([1, 1, 0, 0, 1, 1, 0]), rows([1, 0, 1, 1, 1, 1, 1])
    there, back = compare(pair_episodes(a, b)), compare(pair_episodes(b, a))
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a) == (1, 3)
    assert there.difference == -back.difference == pytest.approx(2 / 7)
    assert there.p_value == back.p_value
    assert there.interval[0] <= there.difference <= there.interval[1]


@pytest.mark.parametrize("discordant", range(9))
def test_the_exact_test_counts_all_coin_sequences(discordant):
    """p = share of fair coin sequences at least as lopsided as the one seen."""
    for only_b in range(discordant + 1):
        seen = abs(2 * only_b - discordant)
        sequences = [abs(2 * sum(coins) - discordant) for coins in product((0, 1), repeat=discordant)]
        expected = np.mean([lopsided >= seen for lopsided in sequences])
        assert mcnemar(discordant - only_b, only_b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        ((59, 6, 16, 80), (0.0046, 0.1186)),  # R package contingencytables, tests/testthat/test-ch8.R, sides turned
        # Cited from memory, the papers were not at hand:
        ((36, 2, 12, 0), (0.0569, 0.3404)),  # Newcombe 1998
        ((14, 0, 5, 22), (0.011, 0.226)),  # Altman et al. 2000, Statistics with Confidence
        ((1, 1, 7, 12), (0.026, 0.507)),  # Fagerland et al. 2014, Statistics in Medicine 33:2850
    ],
)
def test_the_interval_is_the_published_one(counts: tuple, published: tuple):
    assert paired_interval(*counts) == pytest.approx(published, abs=5e-4)


def tables(n: int) -> list[tuple[int, int, int, int]]:
    """All (both, only_a, only_b, neither) of n pairs."""
    return [each for each in product(range(n + 1), repeat=4) if sum(each) == n]


def test_the_interval_holds_the_estimate_has_a_width_and_turns_with_the_sides():
    for both, only_a, only_b, neither in [table for n in (1, 2, 7) for table in tables(n)]:
        low, high = paired_interval(both, only_a, only_b, neither)
        difference = (only_b - only_a) / (both + only_a + only_b + neither)
        assert -1 <= low <= difference <= high <= 1 and low < high
        assert paired_interval(both, only_b, only_a, neither) == pytest.approx((-high, -low))


@pytest.mark.parametrize("share", [0, 0.5, 0.9, 1])
def test_without_discordant_pairs_more_of_them_narrow_the_interval(share: float):
    widths = []
    for n in (10, 40, 160):
        low, high = paired_interval(round(share * n), 0, 0, n - round(share * n))
        assert low == pytest.approx(-high)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0


@pytest.mark.parametrize(("a", "b", "correlation"), [(0.95, 0.9, 0), (0.95, 0.9, 0.4), (0.9, 0.6, 0.2), (0.5, 0.5, 0.9), (1, 0.8, 0)])
def test_the_interval_covers_the_difference_as_often_as_it_says(a: float, b: float, correlation: float):
    """Exact: the probability of every outcome of 10 episodes whose interval holds the true difference; rates a and b."""
    both = a * b + correlation * math.sqrt(a * (1 - a) * b * (1 - b))
    shares = both, a - both, b - both, 1 - a - b + both
    covered = 0.0
    for counts in tables(10):
        low, high = paired_interval(*counts)
        ways = math.factorial(10) / math.prod(map(math.factorial, counts))
        covered += (low <= b - a <= high) * ways * math.prod(share**count for share, count in zip(shares, counts, strict=True))
    assert covered > 0.93


def test_episodes_pair_by_start_and_errors_have_no_partner():
    a, b = rows([1, 0, 1]), [row(2, False), row(0, True), row(9, True), row(1, True, error="ValueError: x")]
    assert [(x.episode, y.episode) for x, y in pair_episodes(a, b)] == [(0, 0), (2, 2)]


def test_evaluations_without_a_common_start_are_refused_and_so_are_doubled_starts():
    with pytest.raises(ValueError, match="share 0 starts.*same --suite"):
        pair_episodes(rows([1]), rows([1], seed=8))
    with pytest.raises(ValueError, match="start alike"):
        pair_episodes([row(0, True), row(0, False)], rows([1]))


def test_the_verb_prints_a_table_and_writes_the_result(tmp_path, capsys):
    for name, outcomes in (("a", [1, 0, 0, 1]), ("b", [1, 1, 1, 1])):
        (tmp_path / name).mkdir()
        lines = [json.dumps(asdict(row(i, bool(s), task=i % 2))) for i, s in enumerate(outcomes)]
        (tmp_path / name / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), f"--output={tmp_path / 'c.json'}"]) == 0
    assert "+50.0" in capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert (found["n"], found["only_a"], found["only_b"], found["p_value"]) == (4, 0, 2, 0.5)
    with pytest.raises(FileNotFoundError, match="episodes.jsonl"):
        main([str(tmp_path / "a"), str(tmp_path)])
    for name, protocol in (("a", "openpi"), ("b", "lerobot")):
        (tmp_path / name / "settings.json").write_text(json.dumps({"protocol": protocol, "max_steps": 220}))
    with pytest.raises(ValueError, match="protocol was 'openpi', is 'lerobot'"):
        main([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_policy_compared_with_itself_differs_nowhere(tmp_path, monkeypatch):
    suite = replace(sim.evaluate.get_suite("libero_object"), num_tasks=2)
    monkeypatch.setattr(sim.evaluate, "get_suite", lambda name: suite)
    config = ComparePoliciesConfig(
        suite="libero_object", output_dir=tmp_path, episodes=2, workers=1, max_steps=40, execution_horizon=4, max_batch=1
    )
    policies = tuple(PointPolicy() for _ in range(2))
    for number, policy in enumerate(policies):
        policy.content_hash = f"{number:016d}"
    pairs = pair_episodes(*evaluate_both(config, policies, build=build_point_world))
    found = compare(pairs)
    assert (found.n, found.only_a, found.only_b, found.p_value) == (4, 0, 0, 1.0) and one_sided_p(pairs) == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "other"}


def test_worse_beyond_chance_needs_lopsided_losses():
    assert one_sided_p(pair_episodes(rows([1] * 4), rows([0] * 4))) == 1 / 16 > SIGNIFICANT
    assert one_sided_p(pair_episodes(rows([1] * 5), rows([0] * 5))) == 1 / 32 < SIGNIFICANT
    assert one_sided_p(pair_episodes(rows([0] * 5), rows([1] * 5))) == 1.0


def test_both_policies_are_attacked_and_the_verdict_names_the_p_that_decided(tmp_path, monkeypatch, capsys):
    shown = []

    def evaluated(config: ComparePoliciesConfig, policies: tuple) -> tuple[list[EpisodeRow], list[EpisodeRow]]:
        shown.extend(policies)
        return rows([1] * 5), rows([0] * 5)

    monkeypatch.setattr(sim.compare_policies, "evaluate_both", evaluated)
    paths = [write_policy(tmp_path / str(seed), seed=seed) for seed in range(2)]
    arguments = [f"--policy.path={paths[0]}", f"--other.path={paths[1]}", "--attack={kind: noise}"]
    assert sim.compare_policies.main(arguments) == 1
    assert [type(policy) for policy in shown] == [AttackedPolicy] * 2
    printed = capsys.readouterr().out
    assert "worse beyond chance (McNemar, one-sided p = 0.031)" in printed and "noise-4-10" in printed


def test_comparisons_under_other_settings_have_other_folders():
    policies = (SimpleNamespace(content_hash="a" * 16), SimpleNamespace(content_hash="b" * 16))
    changes = [{}, {"perturb": PerturbConfig("camera", 2)}, {"attack": {"kind": "noise"}}, {"mesh_detail": 0.5}, {"split": "official"}]
    names = [output_folder(ComparePoliciesConfig(**change), policies).name for change in changes]
    assert names[0] == "compare-robosuite_lift-validation-aaaaaaaa-bbbbbbbb" and len(set(names)) == len(names)


def test_figures_are_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    wide = Table("a" * 60, "b")
    wide.add_column("c", no_wrap=True)
    wide.add_row("1", "x" * 60, "+26.0 [+9.7, +40.9]")
    show(wide)
    assert "+26.0 [+9.7, +40.9]" in capsys.readouterr().out
