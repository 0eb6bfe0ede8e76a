"""Laws of the corpus's language: templates are sound, halves never mix, texts are clean, answers are what the scene says."""

import random
import re
from collections import defaultdict
from itertools import count

import pytest

from multimodal.dialogue import SPECIAL_TOKENS
from multimodal.tokenizer import train_tokenizer
from sim.language.account import Account
from sim.language.grammar import HELD_OUT, TRAINING, Grammar, default_grammar
from sim.language.lexicon import KINDS, WORDS, colour_name
from sim.language.naming import Names
from sim.language.plans import made_up_goals, next_step, steps
from sim.language.texts import KINDS as TEXT_KINDS
from sim.language.texts import QUESTIONS, Text, write_texts
from sim.scene_facts import Facts
from sim.scene_state import Scene
from tests.scenes import place, random_scene

NUM_SCENES = 100


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return default_grammar()


@pytest.fixture(scope="module")
def texts(grammar: Grammar) -> dict[bool, list[Text]]:
    """Texts of training and of held-out scenes."""
    return {
        held_out: [
            text
            for seed in range(NUM_SCENES)
            for text in write_texts(random_scene(seed), grammar, count=16, held_out=held_out, seed=seed)
        ]
        for held_out in (False, True)
    }


def sentences(texts: list[Text]) -> set[str]:
    """Questions, and answers in sentences; short answers have one form and are shared."""
    said = [said for text in texts for turn in text.turns for said in turn if len(said.split()) > 5]
    return {sentence for text in said for sentence in re.split(r"(?<=[.?!])\s+|\n", text) if len(sentence.split()) > 3}


def test_held_out_templates_never_occur_in_training(texts: dict[bool, list[Text]]) -> None:
    trained = {template for text in texts[False] for template in text.templates}
    by_half = {half: [text for text in texts[True] if text.half == half] for half in (TRAINING, HELD_OUT)}
    held_out = {template for text in by_half[HELD_OUT] for template in text.templates}
    assert {text.half for text in texts[False]} == {TRAINING} and not trained & held_out
    assert not {template for text in by_half[TRAINING] for template in text.templates} & held_out
    assert len(by_half[HELD_OUT]) == pytest.approx(len(texts[True]) / 2, rel=0.1)


def test_held_out_words_never_occur_in_training(texts: dict[bool, list[Text]]) -> None:
    """The same law on the surface: no sentence of the held-out half is a training sentence.

    Up to plans, whose steps may be filled alike, and statements of a slot alone: less than one in fifty.
    """
    new = sentences([text for text in texts[True] if text.half == HELD_OUT])
    old = sentences(texts[False])
    assert len(new) > 1000 and len(new & old) < 0.02 * len(new), sorted(new & old)[:20]


def test_no_two_templates_of_a_list_are_alike(grammar: Grammar) -> None:
    for name, lines in grammar.templates.items():
        plain = [re.sub(r"\W+", " ", template.text.lower()).strip() for template in lines]
        assert len(set(plain)) == len(plain), name


def test_every_list_of_templates_is_used(texts: dict[bool, list[Text]], grammar: Grammar) -> None:
    used = {template.rsplit(".", 1)[0] for group in texts.values() for text in group for template in text.templates}
    for family in QUESTIONS:
        used |= {name for _, _, item in items(grammar, family) for name in (item.ask, item.tell) if name}
    assert set(grammar.templates) == used, set(grammar.templates) ^ used


def test_every_kind_has_dozens_of_templates(texts: dict[bool, list[Text]]) -> None:
    used = defaultdict(set)
    for text in [*texts[False], *texts[True]]:
        used[text.kind] |= set(text.templates)
    assert set(used) == set(TEXT_KINDS) and min(map(len, used.values())) >= 24, {kind: len(ids) for kind, ids in used.items()}


def test_texts_are_clean(texts: dict[bool, list[Text]]) -> None:
    for text in [*texts[False], *texts[True]]:
        for question, answer in text.turns:
            assert question[0].isupper() and question[-1] in ".?!", question
            assert answer[0].isupper() or answer[0].isdigit(), answer
            assert answer[-1] in ".?!" or text.kind in ("question", "dialogue"), answer
            for said in (question, answer):
                assert not re.search(r"[{}\[\]|<>]|\s[.,;:?!]|  |\.\.|\bthe the\b", said), said
                assert not re.search(r"\ba (?!one)(?=[aeio])|\ban (?=[^aeio])", said), said


def test_texts_are_a_function_of_scene_and_seed(grammar: Grammar) -> None:
    scene = random_scene(5)
    first = write_texts(scene, grammar, count=12, held_out=True, seed=1)
    assert first == write_texts(scene, grammar, count=12, held_out=True, seed=1)
    assert first != write_texts(scene, grammar, count=12, held_out=True, seed=2)
    assert len({text.turns[0][0] for text in first}) == len(first) == 12


def test_lengths_are_short_and_long(texts: dict[bool, list[Text]]) -> None:
    words = defaultdict(list)
    for text in texts[False]:
        words[text.kind].append(sum(len(said.split()) for _, said in text.turns))
    assert max(words["question"]) < 30 and sum(words["question"]) / len(words["question"]) < 5
    longest = sorted(words["description"])
    assert longest[len(longest) // 2] > 50 and longest[-1] <= 150
    assert max(max(lengths) for lengths in words.values()) < 300


def test_a_tokenizer_of_the_corpus_loses_nothing(texts: dict[bool, list[Text]]) -> None:
    said = [said for group in texts.values() for text in group for turn in text.turns for said in turn]
    tokenizer = train_tokenizer(said[: len(said) // 2], 600, "bpe", SPECIAL_TOKENS)
    for text in said:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_id not in ids


# ------------------------------------------------------------------------------------------------------------ answers


def items(grammar: Grammar, family: str, scenes: int = 300):
    """(scene, facts, item) wherever a scene has a case; things by the name that answers use."""
    for seed in range(scenes):
        scene = random_scene(seed)
        account = Account(scene, grammar, random.Random(seed))
        item = QUESTIONS[family](account)
        if item is not None:
            yield account, {account.name(thing): thing for thing in account.things}, item


def thing_of(account: Account, noun) -> object:
    """The thing that a noun of this account names."""
    return next(thing for thing in account.things if account.names[thing] is noun)


def test_names_are_unambiguous() -> None:
    for seed in range(300):
        facts = Facts(random_scene(seed))
        names = Names(facts)
        said = [noun for thing in names.things for noun in names[thing].nouns]
        assert len(set(said)) == len(said), seed


def test_twins_are_told_apart_by_where_they_are() -> None:
    scene = random_scene(1)
    things = (place("butter_1", 0.2, 0.0), place("butter_2", -0.2, 0.0), place("milk_1", 0.0, 0.1))
    names = Names(Facts(Scene(**{**vars(scene), "things": things, "supports": (), "inside": ()})))
    assert names["butter_1"].name == "the right butter" and names["butter_2"].name == "the left butter"
    assert names["milk_1"].name == "the milk"


def test_side_answers_agree_with_the_pixels(grammar: Grammar) -> None:
    seen = set()
    for account, _, item in items(grammar, "side"):
        a, b = (thing_of(account, item.slots[name]) for name in ("a", "b"))
        assert item.short == ("left" if a.base.centre[0] < b.base.centre[0] else "right")
        seen.add(item.short)
    assert seen == {"left", "right"}


def test_places_in_numbers_are_the_pixels_to_the_nearest_five(grammar: Grammar) -> None:
    for account, _, item in items(grammar, "locate", 50):
        u, v = thing_of(account, item.slots["a"]).base.centre
        x, y = map(int, re.fullmatch(r"x (\d+), y (\d+)", item.short).groups())
        assert abs(x - 100 * u) <= 2.5 and abs(y - 100 * v) <= 2.5 and not item.is_exact


def test_depth_answers_agree_with_the_distance(grammar: Grammar) -> None:
    for account, things, item in items(grammar, "depth"):
        pair = [thing_of(account, item.slots[name]) for name in ("a", "b")]
        wanted = (min if item.ask == "depth.ask_near" else max)(pair, key=lambda thing: thing.distance)
        assert things[item.short] is wanted


def test_count_answers_equal_the_bodies(grammar: Grammar) -> None:
    words = {plural: kind for kind, (_, plural) in KINDS.items()} | {word.plural: category for category, word in WORDS.items()}
    seen = set()
    for account, _, item in items(grammar, "count"):
        wanted = words[item.slots["plural"]]
        number = sum(
            thing.base.pixels >= 25 and (wanted in word.kinds or word.plural == item.slots["plural"])
            for thing in account.scene.things
            for word in (WORDS[thing.category],)
        )
        assert item.short == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")[number]
        seen.add(number)
    assert len(seen) >= 4


def test_presence_answers_agree_with_the_pixels(grammar: Grammar) -> None:
    for account, _, item in items(grammar, "exists"):
        found = [thing for thing in account.scene.things if WORDS[thing.category].nouns == item.slots["a"].nouns]
        assert any(thing.base.pixels >= 25 for thing in found) if item.short == "yes" else not any(t.base.pixels for t in found)


def test_yes_and_no_are_about_as_frequent(grammar: Grammar) -> None:
    for family in ("check", "exists", "wrist"):
        answers = [item.short for _, _, item in items(grammar, family)]
        assert 0.3 < answers.count("yes") / len(answers) < 0.7, family


def test_contents_name_all_that_is_there(grammar: Grammar) -> None:
    filled = count()
    for account, things, item in items(grammar, "contents"):
        b = thing_of(account, item.slots["b"])
        below = {upper for upper, lower in account.scene.supports if lower == b.name}
        named = set() if item.short == "nothing" else {things[name].name for name in re.split(", | and ", item.short)}
        assert named == {name for name in below if account.scene.gripper.holding != name}
        next(filled) if named else None
    assert next(filled) > 10


def test_a_colour_question_does_not_tell_the_colour(grammar: Grammar) -> None:
    seen = set()
    for _, _, item in items(grammar, "colour"):
        assert not any(item.short in noun for noun in item.slots["a"].nouns)
        seen.add(item.short)
    assert {"red", "black"} <= seen


def test_doubtful_colours_have_no_name() -> None:
    assert colour_name((160, 60, 70)) == "red" and colour_name((20, 20, 22)) == "black"
    assert colour_name((66, 104, 66)) == "green" and colour_name((200, 198, 196)) == "white"
    assert colour_name((88, 75, 70)) is None


# -------------------------------------------------------------------------------------------------------------- plans


def account_of(grammar: Grammar, *things, holding: str | None = None, width: float = 0.08, **values) -> Account:
    scene = random_scene(0, num_things=1)
    gripper = scene.gripper.__class__(**{**vars(scene.gripper), "touching": holding, "holding": holding, "width": width})
    supports = tuple((thing.name, "table") for thing in things if thing.name != holding and not thing.is_fixture)
    changed = {"things": things, "supports": supports, "inside": (), "gripper": gripper, "goal": (), "goal_holds": (), **values}
    return Account(Scene(**{**vars(scene), **changed}), grammar, random.Random(0))


def plan_for(account: Account, kind: str, thing: str, target: str | None = None, part: str | None = None) -> list[str] | None:
    for goal in made_up_goals(account):
        is_it = goal.kind == kind and goal.thing.name == thing and (goal.target.name if goal.target else None) == target
        if is_it and (part is None or (goal.part is not None and goal.part.name == part)):
            found = steps(account, goal)
            return None if found is None else [step.kind for step in found]
    raise AssertionError("no such goal")


def test_a_plan_starts_from_the_scene_as_it_is(grammar: Grammar) -> None:
    milk, butter, basket = place("milk_1", -0.2, 0.0), place("butter_1", 0.0, 0.1), place("basket_1", 0.25, 0.0)
    pick, deliver = ["approach", "descend", "close", "lift"], ["carry", "lower_in", "release", "retreat"]
    things = (milk, butter, basket)
    assert plan_for(account_of(grammar, *things), "put_in", "milk_1", "basket_1") == pick + deliver
    assert plan_for(account_of(grammar, *things, width=0.0), "put_in", "milk_1", "basket_1") == ["open_hand", *pick, *deliver]
    assert plan_for(account_of(grammar, *things, holding="milk_1"), "put_in", "milk_1", "basket_1") == deliver
    other = account_of(grammar, *things, holding="butter_1")
    assert plan_for(other, "put_in", "milk_1", "basket_1") == ["put_aside", *pick, *deliver]
    there = account_of(grammar, *things, supports=(("milk_1", "basket_1"),), inside=(("milk_1", "basket_1", ""),))
    assert plan_for(there, "put_in", "milk_1", "basket_1") == []
    assert plan_for(account_of(grammar, *things, holding="milk_1"), "lift", "milk_1") == []


def test_a_closed_drawer_is_opened_first(grammar: Grammar) -> None:
    cabinet, butter = place("white_cabinet_1", 0.2, 0.1), place("butter_1", -0.2, 0.0)
    account = account_of(grammar, cabinet, butter)
    plan = plan_for(account, "put_in", "butter_1", "white_cabinet_1", "top drawer")
    assert plan[:3] == ["handle", "pull", "retreat"] and plan[3] == "approach" and plan[-1] == "retreat"
    assert plan_for(account, "open", "white_cabinet_1", part="top drawer") == ["handle", "pull", "retreat"]
    assert plan_for(account, "close", "white_cabinet_1", part="top drawer") == []


def test_the_next_step_depends_on_where_the_hand_is(grammar: Grammar) -> None:
    milk = place("milk_1", -0.2, 0.0)
    for across, expected in ((0.2, "move above the milk"), (-0.2, "lower the hand to the milk"), (-0.155, None)):
        account = account_of(grammar, milk)
        hand = {**vars(account.scene.gripper), "across": across, "distance": milk.distance, "position_w": (0, 0, 0.4)}
        moved = account_of(grammar, milk, gripper=account.scene.gripper.__class__(**hand))
        (goal,) = (goal for goal in made_up_goals(moved) if goal.kind == "lift")
        assert next_step(moved, goal) == expected


# ------------------------------------------------------------------------------------------------------------ grammar


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phrases: {}\na:\n  ask: |\n    one <two>.\n    three.", "names the phrase <two>"),
        ("phrases: {}\na:\n  ask: |\n    one [two|three.\n    four.", "do not match"),
        ("phrases: {}\na:\n  ask: |\n    one | two.\n    three.", "do not match"),
        ("phrases: {}\na:\n  ask: |\n    one.", "at least 2"),
    ],
)
def test_a_faulty_grammar_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar.parse(text)


def test_choices_nest_and_sentences_begin_with_capitals() -> None:
    phrases = "phrases:\n  is: |\n    is\n    sits\n"
    grammar = Grammar.parse(f"{phrases}a:\n  ask: |\n    [so|well [then|]], {{a}} <is> here. {{b}}.\n    x.")
    template = grammar.templates["a.ask"][0]
    said = {grammar.fill(template, {"a": "it", "b": "good"}, random.Random(seed)) for seed in range(60)}
    heads = ("So", "Well then", "Well")
    assert said == {f"{head}, it {verb} here. Good." for head in heads for verb in ("is", "sits")}
