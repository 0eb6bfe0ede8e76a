"""Laws of facts: a relation and its opposite never hold together, counts are of what is there, doubt is silence."""

import json
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from sim.scene_facts import BEHIND, CLOSE, FARTHER, FRONT, IN, LEFT, NEARER, ON, OPPOSITE, RIGHT, Facts, opening_state
from sim.scene_state import Scene
from tests.scenes import place, random_scene

seeds = st.integers(0, 10_000)


@given(seeds)
def test_relations_are_antisymmetric_and_nearness_symmetric(seed: int) -> None:
    facts = Facts(random_scene(seed))
    for a, b in permutations(facts.clear, 2):
        for relation in OPPOSITE:
            assert facts.holds(relation, a, b) == facts.holds(OPPOSITE[relation], b, a)
            if facts.holds(relation, a, b):
                assert facts.holds(OPPOSITE[relation], a, b) is False and facts.holds(relation, b, a) is False
        assert facts.holds(CLOSE, a, b) == facts.holds(CLOSE, b, a)
        for relation in (ON, IN):
            assert not (facts.holds(relation, a, b) and facts.holds(relation, b, a))
        assert facts.taller(a, b) is facts.taller(b, a) and facts.larger(a, b) is facts.larger(b, a)


@given(seeds)
def test_left_and_right_agree_with_the_pixels(seed: int) -> None:
    facts = Facts(random_scene(seed))
    for a, b in permutations(facts.clear, 2):
        if facts.holds(LEFT, a, b):
            assert a.base.centre[0] + 0.04 <= b.base.centre[0] and a.centre[0] < b.centre[0]


@given(seeds)
def test_left_is_transitive(seed: int) -> None:
    """Through margins it need not hold, but it never turns round."""
    facts = Facts(random_scene(seed))
    for a, b, c in permutations(facts.clear, 3):
        if facts.side(a, b) == facts.side(b, c) == LEFT:
            assert facts.side(a, c) != RIGHT


@given(seeds)
def test_counts_are_of_clear_things_and_doubt_is_none(seed: int) -> None:
    scene = random_scene(seed)
    facts = Facts(scene)
    for category in {thing.category for thing in scene.things}:
        pixels = [thing.base.pixels for thing in scene.things if thing.category == category]
        expected = None if any(0 < count < 25 for count in pixels) else sum(count >= 25 for count in pixels)
        assert facts.count(lambda thing: thing.category == category) == expected


@given(seeds)
def test_what_is_held_is_nowhere_else(seed: int) -> None:
    facts = Facts(random_scene(seed))
    held = facts.held
    if held is not None:
        assert facts.carrier(held) is facts.container(held) is facts.rests_on(held) is None
        assert not facts.is_on_table(held) and facts.hand_is_empty is False and facts.gripper_state is None
        for b in facts.clear:
            assert facts.holds(NEARER, held, b) is None and facts.nearest(held, facts.clear) is None


def table_of(*things) -> Facts:
    scene = random_scene(0, num_things=1)
    supports = tuple((thing.name, "table") for thing in things)
    values = {**vars(scene), "things": tuple(things), "supports": supports, "inside": ()}
    values["gripper"] = scene.gripper.__class__(**{**vars(scene.gripper), "touching": None, "holding": None})
    return Facts(Scene(**values))


def test_close_calls_are_not_told() -> None:
    milk, ketchup, soup = place("milk_1", -0.02, 0.0), place("ketchup_1", 0.02, 0.01), place("alphabet_soup_1", 0.3, 0.3)
    facts = table_of(milk, ketchup, soup)
    assert facts.side(milk, ketchup) is None and facts.depth(milk, ketchup) is None and facts.is_near(milk, ketchup)
    assert facts.side(milk, soup) == LEFT and facts.depth(milk, soup) == NEARER
    assert facts.order(milk, soup) is None and facts.is_near(milk, soup) is False
    assert facts.extreme(LEFT, facts.clear) is None and facts.extreme(RIGHT, facts.clear) is soup
    assert facts.nearest(milk, facts.clear) is ketchup


def test_behind_is_said_of_things_in_line_only() -> None:
    front, behind, aside = place("milk_1", 0.0, -0.2), place("ketchup_1", 0.03, 0.1), place("butter_1", 0.4, 0.1)
    facts = table_of(front, behind, aside)
    assert facts.holds(FRONT, front, behind) and facts.holds(BEHIND, behind, front) and facts.holds(NEARER, front, behind)
    assert facts.holds(FRONT, front, aside) is None and facts.holds(NEARER, front, aside) and facts.holds(FARTHER, aside, front)


def test_close_is_said_of_things_on_one_level_only() -> None:
    plate, butter, milk = place("plate_1", 0.0, 0.0), place("butter_1", 0.0, 0.0, 0.019), place("milk_1", 0.08, 0.0)
    facts = table_of(plate, butter, milk)
    assert facts.holds(CLOSE, butter, milk)
    supports = (("butter_1", "plate_1"), ("plate_1", "table"), ("milk_1", "table"))
    stacked = Facts(Scene(**{**vars(facts.scene), "supports": supports}))
    assert stacked.holds(CLOSE, butter, milk) is None and stacked.holds(CLOSE, plate, milk)
    assert stacked.nearest(butter, stacked.clear) is None


def test_between_needs_both_sides_and_the_line() -> None:
    left, middle, right = place("milk_1", -0.3, 0.0), place("ketchup_1", 0.0, 0.01), place("butter_1", 0.3, 0.0)
    off = place("alphabet_soup_1", 0.0, 0.25)
    facts = table_of(left, middle, right, off)
    assert facts.is_between(middle, left, right) and facts.is_between(middle, right, left)
    assert not facts.is_between(off, left, right) and not facts.is_between(left, middle, right)


def test_drawers_have_three_states() -> None:
    openings = {0.0: "closed", 0.07: "closed", 0.3: "partly open", 0.5: "open", 1.0: "open"}
    assert {opening: opening_state(opening) for opening in openings} == openings


@given(seeds)
def test_a_scene_survives_json(seed: int) -> None:
    scene = random_scene(seed)
    assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene
