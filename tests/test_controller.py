"""The controller maximises expected tokens a second: against brute force, against drafters that do and do not pay, and without
changing answers.
"""

import numpy as np
import pytest

from serve.controller import AdaptiveConfig, AdaptiveController, Calibration, CostTable, Drafting, Round
from serve.costs import build_controller, measure_costs
from serve.drafters import OracleDrafter, RandomDrafter
from serve.engine import Engine, EngineConfig
from serve.tree import DraftTree, chain, root_only
from tests.tiny_vlm import VOCAB, naive, request, target

TARGET = CostTable((1, 4, 8, 16, 64), (10e-3, 10e-3, 11e-3, 15e-3, 40e-3))
DRAFT = CostTable((1, 8), (1e-3, 1.5e-3))


def build(**changes) -> AdaptiveController:
    return AdaptiveController(TARGET, DRAFT, 0.5e-3, AdaptiveConfig(**changes))


class Asked:
    """As much of a generation as the controller reads."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id


def simulate(controller: AdaptiveController, chance, rounds: int, count: int = 1) -> tuple[list[int], float]:
    """Nodes drafted per round, and seconds per token, where a drafted token is right with probability chance(round)."""
    random, nodes, seconds, tokens = np.random.default_rng(0), [], 0.0, 0
    asked = [Asked(index) for index in range(count)]
    for number in range(rounds):
        limits = controller.plan(asked)
        trees, levels = [], {}
        for limit in limits:
            score = np.log(max(chance(number), 1e-6))
            depth = 0
            while depth < limit.max_depth and (depth == 0 or depth * score >= limit.expand_score):
                depth += 1
            depth = depth if limit.allow_any else 0
            levels |= {len(trees): depth} if depth else {}
            trees.append(chain(0, [1] * depth, [score] * depth).best(limit.max_nodes) if depth else root_only(0))
        drafting = Drafting(levels)
        trees = controller.trim(trees, drafting) if levels else trees
        accepted = [int(np.cumprod(random.random(tree.num_drafted) < chance(number)).sum()) for tree in trees]
        rows = count * max(len(tree.tokens) for tree in trees)
        spent = drafting.num_levels * DRAFT(count * 3), TARGET(rows)
        paths = tuple(tuple(range(size + 1)) for size in accepted)
        total = sum(spent) + 0.5e-3
        controller.observe(Round(tuple(range(count)), tuple(trees), paths, tuple(accepted), drafting, *spent, total))
        nodes.append(sum(tree.num_drafted for tree in trees))
        seconds, tokens = seconds + total, tokens + count + sum(accepted)
    return nodes, seconds / tokens


def test_the_size_of_a_round_is_the_brute_force_maximum():
    random, controller = np.random.default_rng(1), build()
    for _ in range(50):
        trees = []
        for _ in range(random.integers(1, 4)):
            size = int(random.integers(0, 14))
            parents = (-1, *(int(random.integers(0, node + 1)) for node in range(size)))
            scores = [0.0]
            for parent in parents[1:]:
                scores.append(float(np.float32(scores[parent] + np.log(random.uniform(0.2, 1)))))
            trees.append(DraftTree(tuple(range(size + 1)), parents, tuple(scores)))

        def rate(size: int, trees=trees) -> float:
            cut = [tree.best(size) for tree in trees]
            expected = sum(1 + controller.calibration.probability(tree.scores[1:]).sum() for tree in cut)
            rows = len(cut) * (size + 1)
            return expected / (controller.draft_seconds(drafting) + TARGET(rows) + 0.5e-3)

        drafting = Drafting({index: int(random.integers(0, 6)) for index in range(len(trees))})
        rates = [rate(size) for size in range(max(tree.num_drafted for tree in trees) + 1)]
        assert rates[controller.best_size(trees, drafting)] == pytest.approx(max(rates))


def test_what_does_not_pay_is_switched_off_and_probed_rarely():
    nodes, per_token = simulate(build(), lambda number: 0.02, 400)
    assert np.count_nonzero(nodes[50:]) <= 40
    plain = TARGET(1) + 0.5e-3
    assert per_token < 1.03 * plain


def test_what_pays_is_drafted_deep():
    nodes, per_token = simulate(build(), lambda number: 0.9, 300)
    assert np.mean(nodes[20:]) >= 3
    assert per_token < 0.5 * (TARGET(1) + 0.5e-3)


def test_it_comes_back_when_drafting_pays_again():
    nodes, _ = simulate(build(longest_pause=32), lambda number: 0.02 if number < 150 else 0.9, 400)
    assert np.count_nonzero(nodes[100:150]) < 15 and np.mean(nodes[-150:]) >= 3


def test_more_requests_share_the_flat_zone():
    alone, _ = simulate(build(), lambda number: 0.7, 300)
    eight, _ = simulate(build(), lambda number: 0.7, 300, count=8)
    assert np.mean(eight[50:]) / 8 < np.mean(alone[50:])  # a row costs more when there are many


def played(levels: dict[int, int], count: int = 1, draft_seconds: float = 0.0, verify: float = 10e-3) -> Round:
    """A round in which nothing was kept of the drafts of `levels`."""
    trees, nothing = (root_only(0),) * count, (0,) * count
    seconds = verify + draft_seconds + 0.5e-3
    return Round(tuple(range(count)), trees, ((0,),) * count, nothing, Drafting(levels), draft_seconds, verify, seconds)


def drafts(controller: AdaptiveController, count: int = 1) -> list[bool]:
    return [limit.allow_any for limit in controller.plan([Asked(index) for index in range(count)])]


def test_the_scale_of_costs_is_that_of_the_levels_that_ran():
    controller = build()
    for _ in range(50):
        drafts(controller)
        controller.observe(played({0: 4}, draft_seconds=4 * DRAFT(3)))  # of whose nodes none was worth verifying
    assert controller.draft_scale == pytest.approx(1.0)


def test_who_was_not_asked_is_not_judged_and_teaches_nothing():
    controller = build()
    for _ in range(50):
        assert drafts(controller) == [True]
        controller.observe(played({}, draft_seconds=1e-6))  # the last token, or speculation refused
    assert controller.draft_scale == 1.0
    assert (controller.calibration.probability(np.log([0.1, 0.9])) == Calibration().probability(np.log([0.1, 0.9]))).all()


def test_a_request_with_nothing_to_begin_with_does_not_pay_for_its_mate():
    controller = build()
    for _ in range(controller.config.warmup):
        assert drafts(controller, 2) == [True, True]
        controller.observe(played({0: 0, 1: 3}, 2, draft_seconds=3 * DRAFT(3)))
    assert drafts(controller, 2) == [True, False]


def test_calibration_learns_what_confidence_is_worth():
    calibration, random = Calibration(), np.random.default_rng(0)
    for _ in range(300):
        scores = np.log(random.uniform(0.01, 1, 8))
        calibration.learn(scores, random.random(8) < np.exp(scores) * 0.5)  # boasts by a factor of two
    assert calibration.probability([np.log(0.8)])[0] == pytest.approx(0.42, abs=0.12)
    assert calibration.score_for(0.95) == np.inf
    estimates = calibration.probability(np.log(np.linspace(0.001, 1, 50)))
    assert (np.diff(estimates) >= 0).all()
    assert calibration.probability([calibration.score_for(0.2) + 1e-9])[0] >= 0.2


def test_a_cost_table_interpolates_and_never_falls():
    assert TARGET(6) == pytest.approx(10.5e-3) and TARGET(128) == pytest.approx(40e-3 + 64 * 25e-3 / 48)
    seconds = {1: 3.0, 2: 2.0, 4: 5.0}
    assert CostTable.measure(lambda rows: seconds[rows], (1, 2, 4), 2).seconds == (3.0, 3.0, 5.0)
    with pytest.raises(ValueError, match="rising"):
        CostTable((2, 1), (1.0, 1.0))


@pytest.mark.parametrize("kind", ["oracle", "random"])
def test_an_engine_under_control_says_the_same(kind):
    asked = [request(index) for index in range(12)]
    truth = [naive(target(), each) for each in asked]
    drafter = OracleDrafter(lambda generation: truth[generation.id]) if kind == "oracle" else RandomDrafter(VOCAB)
    engine = Engine(target(), EngineConfig(max_batch=2, context=64), drafter)
    engine.controller = build_controller(engine.runner, drafter, past=20)
    assert [list(finished.token_ids) for finished in engine.run(asked)] == truth
    assert engine.runner.cache.lengths == [0, 0]


def test_costs_are_measured_before_requests_only():
    engine = Engine(target(), EngineConfig(max_batch=1, context=64))
    engine.submit(request(0))
    engine.step()
    with pytest.raises(ValueError, match="Slot 0"):
        measure_costs(engine.runner, None, 8)
