"""Question makers about places: sides, depth, neighbours, on and in. Each gives an `Item`, or None if the scene has no case."""

from collections.abc import Callable

from sim.language.account import Account, Item
from sim.language.grammar import enumerate_words
from sim.scene_facts import BEHIND, CLOSE, FARTHER, FRONT, IN, LEFT, NEARER, ON, OPPOSITE, RIGHT
from sim.scene_state import Thing

RELATIONS = (LEFT, RIGHT, NEARER, FARTHER, FRONT, BEHIND, CLOSE, ON, IN)
RELATION_PHRASES = {
    LEFT: "left_of",
    RIGHT: "right_of",
    NEARER: "nearer_than",
    FARTHER: "farther_than",
    FRONT: "front_of",
    BEHIND: "behind_of",
    CLOSE: "close_to",
    ON: "on_of",
    IN: "in_of",
}


def side(account: Account) -> Item | None:
    pair = account.find(account.pairs(), lambda a, b: account.facts.holds(LEFT, a, b) is not None)
    if pair is None:
        return None
    a, b = pair
    found = account.facts.side(a, b)
    slots = {"a": account.names[a], "b": account.names[b], "side": found, "other": OPPOSITE[found]}
    return Item("side", "side.ask", "side.tell", found, slots, a.name)


def depth(account: Account) -> Item | None:
    pair = account.find(account.pairs(), lambda a, b: account.facts.holds(NEARER, a, b))
    if pair is None:
        return None
    near, far = pair
    first, second = account.shuffled(pair)
    ask, wanted = account.chance.choice([("depth.ask_near", near), ("depth.ask_far", far)])
    question = {"a": account.names[first], "b": account.names[second]}
    answer = {"a": account.names[near], "b": account.names[far]}
    return Item("depth", ask, "depth.tell", account.name(wanted), question, told=answer)


def check(account: Account) -> Item | None:
    """Yes or no, equally often; a false claim is about things for which it could be true."""
    truth, facts = account.chance.random() < 0.5, account.facts
    for relation in account.shuffled(RELATIONS):
        firsts = account.loose if relation in (ON, IN) else account.things
        seconds = [b for b in account.things if relation not in (ON, IN) or _carries(account, b, relation)]
        pair = account.find(account.pairs(firsts, seconds), lambda a, b: facts.holds(relation, a, b) is truth)
        if pair is not None:
            a, b = pair
            rel = account.phrase(RELATION_PHRASES[relation])
            slots = {"a": account.names[a], "b": account.names[b], "rel": rel}
            return Item("check", "check.ask", "check.yes" if truth else "check.no", yes_or_no(truth), slots, a.name)
    return None


def between(account: Account) -> Item | None:
    triples = [
        (a, b, c) for a in account.things for b in account.things for c in account.things if len({a.name, b.name, c.name}) == 3
    ]
    for a, b, c in account.shuffled(triples):
        others = [d for d in account.things if d not in (a, b, c)]
        if account.facts.is_between(a, b, c) and not any(account.facts.is_between(d, b, c) for d in others):
            slots = {"a": account.names[a], "b": account.names[b], "c": account.names[c]}
            return Item("between", "between.ask", "between.tell", account.name(a), slots)
    return None


def third(account: Account) -> Item | None:
    for a in account.shuffled(account.things):
        found = account.facts.third(a)
        if found:
            return Item("third", "third.ask", "third.tell", found, {"a": account.names[a], "third": found}, a.name)
    return None


def extreme(account: Account) -> Item | None:
    """Leftmost, rightmost of all; nearest, farthest of what can be moved. No unclear thing may compete."""
    if account.facts.unclear or len(account.things) < len(account.facts.clear):
        return None
    for relation in account.shuffled((LEFT, RIGHT, NEARER, FARTHER)):
        among = account.things if relation in (LEFT, RIGHT) else account.loose
        found = account.facts.extreme(relation, among)
        if found:
            slots = {"a": account.names[found]}
            return Item("extreme", f"extreme.ask_{relation}", f"extreme.tell_{relation}", account.name(found), slots)
    return None


def closest(account: Account) -> Item | None:
    if account.facts.unclear or len(account.things) < len(account.facts.clear):
        return None
    for a in account.shuffled(account.things):
        b = account.facts.nearest(a, account.things)
        if b:
            slots = {"a": account.names[a], "b": account.names[b]}
            return Item("closest", "closest.ask", "closest.tell", account.name(b), slots, a.name)
    return None


def where(account: Account) -> Item | None:
    for a in account.shuffled(account.loose):
        place = place_of(account, a)
        if place:
            return Item("where", "where.ask", "where.tell", place, {"a": account.names[a], "where": place}, a.name)
    return None


def place_of(account: Account, a: Thing) -> str | None:
    """ "on the plate", "in the top drawer of the white cabinet", "on the table", "in the gripper"; None if it has no name."""
    facts, names = account.facts, account.names
    if facts.held is a:
        return "in the gripper"
    container, support = facts.container(a), facts.rests_on(a)
    if container is not None:
        if not names.has(container):
            return None
        region = facts.region(a)
        thing = account.scene.thing(container)
        return f"in {names.part(thing, region).name if region else names[container].name}"
    if support is not None:
        return f"on {names[support].name}" if names.has(support.name) else None
    return f"on the {account.scene.surface}" if facts.is_on_table(a) else None


def contents(account: Account) -> Item | None:
    """What is on or in a thing. Nothing hidden may be there, and drawers and doors must stand open."""
    facts, cases = account.facts, []
    for b in account.things:
        for relation in (ON, IN):
            if not _carries(account, b, relation):
                continue
            there = [
                thing
                for thing in account.scene.things
                if (facts.container(thing) if relation == IN else getattr(facts.rests_on(thing), "name", None)) == b.name
            ]
            if all(account.names.has(thing.name) for thing in there):
                cases += [(bool(there), relation, b, there)]
    filled = [case for case in cases if case[0]]
    chosen = filled if filled and account.chance.random() < 0.75 else cases
    if not chosen:
        return None
    _, relation, b, there = account.chance.choice(chosen)
    order = sorted(there, key=lambda thing: thing.base.centre[0])
    names = enumerate_words([account.name(thing) for thing in order]) if order else "nothing"
    tell = f"contents.tell_{relation}" if order else f"contents.tell_none_{relation}"
    return Item("contents", f"contents.ask_{relation}", tell, names, {"b": account.names[b], "list": names})


def hand_side(account: Account) -> Item | None:
    """Only while nothing is held: then hand and thing would be one."""
    gripper = account.scene.gripper
    if gripper.touching or not (0.05 < gripper.centre[0] < 0.95 and 0.05 < gripper.centre[1] < 0.95):
        return None
    for b in account.shuffled(account.things):
        offset = gripper.centre[0] - b.base.centre[0]
        if abs(offset) > 0.06 + (b.base.box[2] - b.base.box[0]) / 2:
            found = LEFT if offset < 0 else RIGHT
            slots = {"b": account.names[b], "side": found}
            return Item("hand_side", "hand_side.ask", "hand_side.tell", found, slots)
    return None


def above(account: Account) -> Item | None:
    """What the empty hand is straight above: the one thing whose inner half lies under it."""
    hand = account.scene.gripper
    if hand.touching:
        return None
    under = [
        thing
        for thing in account.scene.things
        if abs(hand.across - thing.across) < thing.size[0] / 2 + 0.02
        and abs(hand.distance - thing.distance) < thing.size[1] / 2 + 0.02
    ]
    if len(under) != 1 or not account.names.has(under[0].name):
        return None
    a = under[0]
    is_inner = abs(hand.across - a.across) < a.size[0] / 4 and abs(hand.distance - a.distance) < a.size[1] / 4
    if not is_inner or not a.top < hand.position_w[2] < a.top + 0.25:
        return None
    return Item("above", "above.ask", "above.tell", account.name(a), {"a": account.names[a]})


def wrist(account: Account) -> Item | None:
    truth = account.chance.random() < 0.5
    for a in account.shuffled(account.things):
        if account.facts.in_wrist_view(a) is truth:
            short = yes_or_no(truth)
            return Item("wrist", "wrist.ask", f"wrist.{short}", short, {"a": account.names[a]}, a.name)
    return None


def _carries(account: Account, b: Thing, relation: str) -> bool:
    """Whether asking what is on (in) b makes sense, and an answer could be seen."""
    if relation == IN:
        doors = [part for part in b.parts if part.name.split()[-1] in ("drawer", "door")]
        is_shut = bool(doors) and (b.category != "microwave" or doors[0].opening < 0.5)  # drawers are asked for one by one
        return b.category in _INSIDES and not is_shut and not b.is_tipped
    return b.category in _TOPS


_INSIDES = frozenset(
    "basket wooden_tray desk_caddy microwave akita_black_bowl white_bowl chefmate_8_frypan wooden_two_layer_shelf".split()
)
_TOPS = frozenset("plate flat_stove wooden_cabinet white_cabinet wine_rack cubeA cubeB cookies".split())


def yes_or_no(truth: bool) -> str:
    """The short answer."""
    return "yes" if truth else "no"


PLACE_QUESTIONS: dict[str, Callable[[Account], Item | None]] = {
    maker.__name__: maker
    for maker in (side, depth, check, between, third, extreme, closest, where, contents, hand_side, above, wrist)
}
