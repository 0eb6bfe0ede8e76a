"""Laws of the paired comparison: antisymmetry, pairing by start, errors left out, exact test against enumeration."""

import json
from dataclasses import asdict, fields, replace
from itertools import product

import numpy as np
import pytest

import sim.evaluate
from sim.compare import compare, main, mcnemar, pair_episodes
from sim.compare_policies import ComparePoliciesConfig, evaluate_both, is_worse
from sim.results import EpisodeRow
from tests.point_world import PointPolicy, build_point_world


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


def test_the_bootstrap_interval_is_that_of_resampled_episodes():
    pairs = pair_episodes(rows([1] * 30 + [0] * 20), rows([1] * 20 + [0] * 10 + [1] * 15 + [0] * 5))
    gains = np.array([int(b.success) - int(a.success) for a, b in pairs])
    drawn = np.random.default_rng(1).choice(gains, size=(10_000, len(gains))).mean(1)
    np.testing.assert_allclose(compare(pairs).interval, np.quantile(drawn, [0.025, 0.975]), atol=0.021)


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
    assert (found.n, found.only_a, found.only_b, found.p_value) == (4, 0, 0, 1.0) and not is_worse(pairs)
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "other"}


def test_worse_beyond_chance_needs_lopsided_losses():
    assert not is_worse(pair_episodes(rows([1] * 4), rows([0] * 4)))  # 1 / 16
    assert is_worse(pair_episodes(rows([1] * 5), rows([0] * 5)))  # 1 / 32
    assert not is_worse(pair_episodes(rows([0] * 5), rows([1] * 5)))
