"""Paragraphs: captions short and long, one thing's place among the others, comparisons, states."""

from collections.abc import Callable, Sequence

from sim.language.account import Account, Item
from sim.language.grammar import enumerate_words
from sim.language.lexicon import count_word
from sim.language.properties import colour, gripper, holding, larger, more, part, stove, taller, tipped
from sim.language.questions import above, closest, contents, depth, extreme, hand_side, place_of
from sim.scene_facts import CLOSE, FRONT, LEFT, NEARER, OPPOSITE
from sim.scene_state import Thing

LONG_WORDS = (70, 140)  # of a long caption; a token is about 0.8 words
# What a long caption tells besides places, in this order or any.
DESCRIBED = (part, stove, gripper, holding, tipped, extreme, larger, taller, colour, hand_side, above, closest, part, depth)
SETTINGS = {
    "table": ("a table", "a wooden table", "a bright table"),
    "kitchen table": ("a kitchen table", "a kitchen counter", "a kitchen worktop"),
    "low table": ("a low table", "a living room table", "a low dark table"),
    "desk": ("a desk", "a writing desk", "a study desk"),
    "floor": ("a floor", "a tiled floor", "a stretch of floor"),
}


def short_caption(account: Account) -> str | None:
    """One sentence with up to five things."""
    things = account.things
    if not things:
        return None
    some = sorted(account.shuffled(things)[:5], key=things.index)
    return account.say("caption.short", {"list": _some(account, some), **_setting(account)})


def long_caption(account: Account) -> str | None:
    """Setting, what there is, where it is, states, the hand, a comparison: in some order, of LONG_WORDS words."""
    if not account.things or account.facts.unclear:
        return None
    chance = account.chance
    number = len(account.things)
    opening = {"n": count_word(number), "noun": "thing" if number == 1 else chance.choice(("things", "objects", "items"))}
    opening |= {"be": "is" if number == 1 else "are", **_setting(account)}
    sentences = [account.say("caption.open", opening)]
    if number > 1 and chance.random() < 0.5:
        sentences.append(account.say("caption.listing", {"list": _some(account, account.things)}))
    body = [*_places(account), *_chain(account)]
    extra = _told(account, DESCRIBED)
    if chance.random() < 0.3:
        extra.append(account.say("caption.task", {"instruction": account.scene.instruction}))
    rest = body + extra if chance.random() < 0.6 else account.shuffled(body + extra)
    limit = chance.randint(*LONG_WORDS)
    for sentence in _joined(account, rest):
        if sum(len(text.split()) for text in sentences) + len(sentence.split()) > limit and len(sentences) > 2:
            break
        sentences.append(sentence)
    return " ".join(sentences)


def relations_of(account: Account, a: Thing) -> str | None:
    """Three to six sentences on where a is."""
    sentences = [] if place_of(account, a) is None or a.is_fixture else [_place_sentence(account, a)]
    for b in account.shuffled([b for b in account.things if b is not a]):
        sentence = _relation(account, a, b)
        if sentence:
            sentences.append(sentence)
    chosen = sentences[: account.chance.randint(3, 6)]
    return " ".join(chosen) if len(chosen) >= 2 else None


def sizes(account: Account) -> str | None:
    sentences = _told(account, account.shuffled([taller, larger, depth, taller, larger, more, extreme, closest, depth]))
    return " ".join(sentences[: account.chance.randint(3, 6)]) if len(sentences) >= 2 else None


def states(account: Account) -> str | None:
    makers = [gripper, holding, part, part, part, stove, hand_side, above, contents, tipped]
    sentences = _told(account, account.shuffled(makers))
    return " ".join(sentences[: account.chance.randint(2, 6)]) if len(sentences) >= 2 else None


def _told(account: Account, makers: Sequence[Callable[[Account], Item | None]]) -> list[str]:
    """Full answers without their questions; no fact twice."""
    sentences, seen = [], set()
    for maker in makers:
        item = maker(account)
        if item is None:
            continue
        slots = {**item.slots, **item.told}
        key = (item.tell, *sorted(str(value) for value in slots.values()))
        if key not in seen:
            seen.add(key)
            sentences.append(account.say(item.tell, {"surface": account.scene.surface, **slots}))
    return sentences


def _places(account: Account) -> list[str]:
    """What is on or in something else."""
    odd = [a for a in account.loose if account.facts.container(a) or account.facts.rests_on(a)]
    return [_place_sentence(account, a) for a in odd if place_of(account, a)]


def _place_sentence(account: Account, a: Thing) -> str:
    """That a is on, in, or held by something that has a name; place_of(account, a) is not None."""
    facts, names = account.facts, account.names
    container, support = facts.container(a), facts.rests_on(a)
    slots = {"a": names[a], "surface": account.scene.surface}
    if container is not None:
        region = facts.region(a)
        b = names[container]
        place = names.part(account.scene.thing(container), region) if region else b
        return account.say("in.tell", {**slots, "b": b, "place": place})
    if support is not None:
        return account.say("on.tell", {**slots, "b": names[support]})
    return account.say("where.tell", {**slots, "where": place_of(account, a)})


def _chain(account: Account) -> list[str]:
    """One relation per thing, to one that was mentioned before it."""
    order = list(account.things)
    way = account.chance.random()
    if way < 0.3:
        order.reverse()
    elif way < 0.5:
        order.sort(key=lambda thing: thing.distance)
    elif way < 0.7:
        order = account.shuffled(order)
    sentences = []
    for index in range(1, len(order)):
        for earlier in (order[index - 1], *account.shuffled(order[: index - 1])):
            sentence = _relation(account, order[index], earlier)
            if sentence:
                sentences.append(sentence)
                break
    return sentences


def _relation(account: Account, a: Thing, b: Thing) -> str | None:
    """A sentence on a and b, of a relation that holds."""
    facts, names = account.facts, account.names
    for relation in account.shuffled((LEFT, LEFT, FRONT, NEARER, CLOSE, "between")):
        if relation == LEFT and facts.holds(LEFT, a, b) is not None:
            found = facts.side(a, b)
            first, second = (a, b) if account.chance.random() < 0.7 else (b, a)
            found = found if first is a else OPPOSITE[found]
            slots = {"a": names[first], "b": names[second], "side": found, "other": OPPOSITE[found]}
            return account.say("side.tell", slots)
        if relation in (FRONT, NEARER) and facts.holds(relation, a, b) is not None:
            near, far = (a, b) if facts.holds(relation, a, b) else (b, a)
            return account.say("front.tell" if relation == FRONT else "depth.tell", {"a": names[near], "b": names[far]})
        if relation == CLOSE and facts.holds(CLOSE, a, b) is not None:
            if facts.holds(CLOSE, a, b):
                return account.say("near.tell", {"a": names[a], "b": names[b]})
            gap = str(5 * round(20 * facts.gap(a, b)))
            return account.say("far.tell", {"a": names[a], "b": names[b], "cm": gap})
        if relation == "between":
            for c in account.things:
                if c is not a and c is not b and facts.is_between(a, b, c):
                    return account.say("between.tell", {"a": names[a], "b": names[b], "c": names[c]})
    return None


def _joined(account: Account, sentences: Sequence[str]) -> list[str]:
    """Some neighbours made into one sentence."""
    result, waiting = [], list(sentences)
    while waiting:
        first = waiting.pop(0)
        if waiting and account.chance.random() < 0.3:
            second = waiting.pop(0)
            slots = {"first": first.rstrip("."), "second": _lowered(second.rstrip("."))}
            first = account.say("caption.join", slots)
        result.append(first)
    return result


def _lowered(sentence: str) -> str:
    """Without the capital at its beginning, unless that is the word "I"."""
    return sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]


def _some(account: Account, things: Sequence[Thing]) -> str:
    return enumerate_words([account.names[thing].say("a", account.chance) for thing in things])


def _setting(account: Account) -> dict[str, str]:
    surface = account.scene.surface
    return {"setting": account.chance.choice(SETTINGS[surface]), "on_setting": f"on the {surface}"}
