"""Question makers about what there is: presence, numbers, sizes, colours, states, the hand, the task. See questions.py."""

from collections.abc import Callable

from sim.language.account import Account, Item
from sim.language.grammar import enumerate_words
from sim.language.lexicon import KINDS, PLAIN_NOUNS, STANDING_KINDS, WORDS, colour_name, count_word
from sim.language.naming import Noun
from sim.language.questions import RELATION_PHRASES, yes_or_no
from sim.scene_facts import FARTHER, LEFT, NEARER, RIGHT, opening_state
from sim.scene_state import Thing

STOVE_ON, STOVE_OFF = 0.25, 0.2  # of the knob's way; LIBERO lights the plate at 0.238
PART_PIXELS = 200  # at 128 x 128, that a fixture must show before its parts are asked for


def exists(account: Account) -> Item | None:
    """Absent are things of which not one pixel shows; twins by name count as one."""
    truth = account.chance.random() < 0.5
    present = {_noun(thing) for thing in account.scene.things if thing.base.pixels}
    clear = {_noun(thing) for thing in account.facts.clear}
    for word in account.shuffled(list(WORDS.values())):
        if (word.nouns[0] in clear) if truth else (word.nouns[0] not in present):
            slots = {"a": Noun(word.nouns, word.indefinite)}
            return Item("exists", "exists.ask", "exists.yes" if truth else "exists.no", yes_or_no(truth), slots)
    return None


def listing(account: Account) -> Item | None:
    """Names from left to right, if all have one and a clear order."""
    things = account.things
    if not things or account.facts.unclear or len(things) < len(account.facts.clear):
        return None
    if any(b.base.centre[0] - a.base.centre[0] < 0.02 for a, b in zip(things, things[1:])):
        return None
    names = ", ".join(account.name(thing) for thing in things)
    told = {"list": enumerate_words([account.name(thing) for thing in things])}
    return Item("list", "list.ask", "list.tell", names, told=told)


def countables(account: Account) -> list[tuple[str, str, int]]:
    """(singular, plural, count) of every kind and category that can be counted here, zeros of kinds included."""
    found = []
    for kind, (singular, plural) in KINDS.items():
        number = account.facts.count(lambda thing: kind in _kinds(thing))
        if number is not None:
            found.append((singular, plural, number))
    for category in sorted({thing.category for thing in account.facts.clear if thing.category in WORDS}):
        number = account.facts.count(lambda thing: thing.category == category)
        if number is not None:
            word = WORDS[category]
            found.append((word.indefinite[0].split(" ", 1)[1], word.plural, number))
    return found


def count(account: Account) -> Item | None:
    options = countables(account)
    several = [option for option in options if option[2] > 1]
    pool = several if several and account.chance.random() < 0.7 else options
    if not pool:
        return None
    singular, plural, number = account.chance.choice(pool)
    slots = {"plural": plural, **_amount("", number, singular, plural)}
    return Item("count", "count.ask", "count.tell", count_word(number), slots)


def count_side(account: Account) -> Item | None:
    """Every movable thing must be clearly on one side or the other."""
    if account.facts.unclear:
        return None
    for b in account.shuffled(account.things):
        for relation in account.shuffled((LEFT, RIGHT, NEARER, FARTHER)):
            others = [a for a in account.facts.clear if not a.is_fixture and a is not b]
            held = [account.facts.holds(relation, a, b) for a in others]
            if others and None not in held:
                number = sum(held)
                rel = account.phrase(RELATION_PHRASES[relation])
                slots = {"b": account.names[b], "rel": rel, **_amount("", number, "object", "objects")}
                return Item("count_side", "count_side.ask", "count_side.tell", count_word(number), slots)
    return None


def more(account: Account) -> Item | None:
    options = [option for option in countables(account) if option[2] > 0]
    for first in account.shuffled(options):
        for second in account.shuffled(options):
            if first[2] != second[2]:
                short = yes_or_no(first[2] > second[2])
                slots = {"many": first[1], "few": second[1], "short": short}
                slots |= _amount("_a", first[2], *first[:2]) | _amount("_b", second[2], *second[:2])
                return Item("more", "more.ask", "more.tell", short, slots)
    return None


def taller(account: Account) -> Item | None:
    pair = account.find(account.pairs(), lambda a, b: account.facts.taller(a, b) is a)
    if pair is None:
        return None
    tall, low = pair
    a, b = account.shuffled(pair)
    told = {"tall": account.names[tall], "low": account.names[low]}
    told |= {"tall_cm": str(round(100 * tall.size[2])), "low_cm": str(round(100 * low.size[2]))}
    slots = {"a": account.names[a], "b": account.names[b]}
    return Item("taller", "taller.ask", "taller.tell", account.name(tall), slots, told=told)


def larger(account: Account) -> Item | None:
    pair = account.find(account.pairs(), lambda a, b: account.facts.larger(a, b) is a)
    if pair is None:
        return None
    big, small = pair
    a, b = account.shuffled(pair)
    slots = {"a": account.names[a], "b": account.names[b]}
    told = {"big": account.names[big], "small": account.names[small]}
    return Item("larger", "larger.ask", "larger.tell", account.name(big), slots, told=told)


def colour(account: Account) -> Item | None:
    """By the pixels, of things that are of one colour; asked with a noun that does not tell it."""
    for a in account.shuffled(account.facts.clear):
        plain = PLAIN_NOUNS.get(a.category)
        twins = [b for b in account.scene.things if PLAIN_NOUNS.get(b.category) == plain and b.base.pixels]
        found = colour_name(a.base.colour)
        if plain and len(twins) == 1 and found:
            return Item("colour", "colour.ask", "colour.tell", found, {"a": Noun((plain,), (f"a {plain}",)), "colour": found})
    return None


def tipped(account: Account) -> Item | None:
    """More often of things that lie, since most stand."""
    able = [a for a in account.loose if STANDING_KINDS & _kinds(a) and not account.facts.is_in_air(a)]
    lying = [a for a in able if a.is_tipped]
    pool = lying if lying and account.chance.random() < 0.7 else able
    if not pool:
        return None
    a = account.chance.choice(pool)
    tell = "tipped.tell_down" if a.is_tipped else "tipped.tell_up"
    return Item("tipped", "tipped.ask", tell, "on its side" if a.is_tipped else "upright", {"a": account.names[a]}, a.name)


def part(account: Account) -> Item | None:
    parts = [case for case in account.parts("drawer", "door") if _shows(account, case[0])]
    if not parts:
        return None
    _, chosen, noun = account.chance.choice(parts)
    state = opening_state(chosen.opening)
    return Item("part", "part.ask", "part.tell", state, {"part": noun, "state": state})


def open_count(account: Account) -> Item | None:
    drawers = [chosen for thing, chosen, _ in account.parts("drawer") if _shows(account, thing)]
    if len(drawers) != 3:  # one cabinet
        return None
    number = sum(opening_state(drawer.opening) != "closed" for drawer in drawers)
    return Item("open_count", "open_count.ask", "open_count.tell", count_word(number), _amount("", number, "drawer", "drawers"))


def stove(account: Account) -> Item | None:
    for thing, knob, _ in account.parts("knob"):
        if STOVE_OFF < knob.opening < STOVE_ON or 3 * thing.base.pixels < PART_PIXELS:
            continue
        state = "on" if knob.opening >= STOVE_ON else "off"
        return Item("stove", "stove.ask", f"stove.tell_{state}", state, {"a": account.names[thing]}, thing.name)
    return None


def gripper(account: Account) -> Item | None:
    state = account.facts.gripper_state
    return Item("gripper", "gripper.ask", "gripper.tell", state, {"state": state}) if state else None


def holding(account: Account) -> Item | None:
    held = account.facts.held
    if held is not None and account.names.has(held.name):
        return Item("holding", "holding.ask", "holding.tell", account.name(held), {"a": account.names[held]})
    return Item("holding", "holding.ask", "holding.tell_none", "nothing") if account.facts.hand_is_empty else None


def done(account: Account) -> Item | None:
    """Only if all that the goal names can be seen."""
    things = {thing.name for predicate in account.scene.goal for thing in account.scene.things if thing.name in predicate}
    if not all(account.names.has(name) for name in things):
        return None
    truth = account.facts.is_done
    slots = {"instruction": account.scene.instruction}
    return Item("done", "done.ask", "done.yes" if truth else "done.no", yes_or_no(truth), slots)


def _kinds(thing: Thing) -> frozenset[str]:
    return frozenset(WORDS[thing.category].kinds) if thing.category in WORDS else frozenset()


def _noun(thing: Thing) -> str | None:
    return WORDS[thing.category].nouns[0] if thing.category in WORDS else None


def _shows(account: Account, thing: Thing) -> bool:
    return thing.base.pixels >= PART_PIXELS * (account.scene.image_size / 128) ** 2


def _amount(suffix: str, number: int, singular: str, plural: str) -> dict[str, str]:
    """Slots n, noun and be, which agree."""
    noun, be = (singular, "is") if number == 1 else (plural, "are")
    return {f"n{suffix}": count_word(number), f"noun{suffix}": noun, f"be{suffix}": be}


PROPERTY_QUESTIONS: dict[str, Callable[[Account], Item | None]] = {
    maker.__name__: maker
    for maker in (
        *(exists, listing, count, count_side, more, taller, larger, colour, tipped, part, open_count, stove),
        *(gripper, holding, done),
    )
}
