"""Plans from the scene as it is: which steps still lead to a goal, and which comes next. Goals are LIBERO's predicates."""

import re
from dataclasses import dataclass, field

from sim.language.account import Account, Item
from sim.language.grammar import Slots
from sim.language.naming import Noun
from sim.language.questions import place_of
from sim.scene_facts import opening_state
from sim.scene_state import Part, Thing

OVER, NOT_OVER = 0.03, 0.06  # m horizontally from the hand to a thing: above it, not above it; between them nobody can say
MAX_STEPS = 12  # longer plans are not written
GRASPABLE = 0.075  # m, the lesser horizontal extent of what plans pick up
RECEIVERS_ON = frozenset("plate flat_stove wooden_cabinet white_cabinet cubeB cubeA wine_rack cookies".split())
RECEIVERS_IN = frozenset("basket wooden_tray akita_black_bowl white_bowl chefmate_8_frypan desk_caddy".split())


@dataclass(frozen=True)
class Step:
    """One movement; `kind` names its templates step.KIND."""

    kind: str
    slots: Slots = field(default_factory=dict)
    short: str = ""  # as the answer to "what next?"


@dataclass(frozen=True)
class Goal:
    """What is to be brought about; `kind` names its templates goal.KIND."""

    kind: str  # put_on, put_in, lift, open, close, turn_on, turn_off
    slots: Slots
    thing: Thing  # what is moved or worked
    target: Thing | None = None  # what it goes on or into
    part: Part | None = None  # drawer or door to work, or to put into


def made_up_goals(account: Account) -> list[Goal]:
    """Everything that could be asked of a robot here."""
    names, surface = account.names, account.scene.surface
    loose = [a for a in account.loose if min(a.size[:2]) < GRASPABLE or account.facts.held is a]
    goals = [Goal("lift", {"a": names[a], "surface": surface}, a) for a in loose]
    for a in loose:
        for b in account.things:
            if a is b or account.facts.are_stacked(b, a) and not _is_at(account, a, b, None):
                continue
            if b.category in RECEIVERS_ON:
                goals.append(Goal("put_on", {"a": names[a], "b": names[b]}, a, b))
            if b.category in RECEIVERS_IN and not b.is_tipped:
                goals.append(Goal("put_in", {"a": names[a], "b": names[b], "place": names[b]}, a, b))
            for part in b.parts:
                if part.name.split()[-1] in ("drawer", "door"):
                    place = names.part(b, part) if part.name != "door" else names[b]
                    goals.append(Goal("put_in", {"a": names[a], "b": names[b], "place": place}, a, b, part))
    for b, part, noun in account.parts("drawer", "door"):
        goals += [Goal(kind, {"part": noun}, b, part=part) for kind in ("open", "close")]
    for b, part, _ in account.parts("knob"):
        goals += [Goal(kind, {"a": names[b]}, b, part=part) for kind in ("turn_on", "turn_off")]
    return goals


def holds(account: Account, goal: Goal) -> bool | None:
    """Whether the goal is reached; None if a viewer could dispute it."""
    if goal.kind in ("open", "close"):
        state = opening_state(goal.part.opening)
        return None if state == "partly open" else (state == "open") == (goal.kind == "open")
    if goal.kind in ("turn_on", "turn_off"):
        is_on = True if goal.part.opening > 0.25 else False if goal.part.opening < 0.2 else None
        return None if is_on is None else is_on == (goal.kind == "turn_on")
    if goal.kind == "lift":
        return account.facts.held is goal.thing
    return False if account.facts.held is goal.thing else _is_at(account, goal.thing, goal.target, goal.part)


def steps(account: Account, goal: Goal) -> list[Step] | None:
    """What is left to do, empty if nothing; None if where things stand cannot be told."""
    reached = holds(account, goal)
    if reached is None or account.facts.hand_is_empty is None:
        return [] if reached else None
    if reached:
        return []
    if goal.kind in ("open", "close", "turn_on", "turn_off"):
        return _free_hand(account, None) + _work(goal)
    opening = []
    if goal.part is not None and goal.kind == "put_in":
        state = opening_state(goal.part.opening)
        if state == "partly open":
            return None
        if state == "closed":
            noun = account.names.part(goal.target, goal.part)
            opening = _free_hand(account, None) + _work(Goal("open", {"part": noun}, goal.target, part=goal.part))
    a = account.names[goal.thing]
    if account.facts.held is goal.thing and not opening:
        return _deliver(account, goal)
    origin = place_of(account, goal.thing)
    if origin is None or (origin == "in the gripper" and not opening):
        return None
    start = opening or _free_hand(account, goal.thing)
    where, place = ("on", f"the {account.scene.surface}") if origin == "in the gripper" else origin.split(" ", 1)
    source = f"{'off' if where == 'on' else 'out of'} {place}"
    pick = [
        Step("approach", {"a": a}, f"move above {a.name}"),
        Step("descend", {"a": a}, f"lower the hand to {a.name}"),
        Step("close", {"a": a}, f"grasp {a.name}"),
        Step("lift", {"a": a, "from": source}, f"lift {a.name}"),
    ]
    return start + pick + ([] if goal.kind == "lift" else _deliver(account, goal))


def next_step(account: Account, goal: Goal) -> str | None:
    """The first of `steps`, with an eye on where the hand is on its way to a thing; None if that is between two steps."""
    plan = steps(account, goal)
    if not plan:
        return None if plan is None else "nothing"
    if plan[0].kind != "approach":
        if plan[0].kind == "carry":
            return _unless_between(_apart(account, goal.thing, goal.target), plan[0].short, plan[1].short)
        return plan[0].short
    hand, thing = account.scene.gripper, goal.thing
    apart = ((hand.across - thing.across) ** 2 + (hand.distance - thing.distance) ** 2) ** 0.5
    is_clear = hand.position_w[2] > thing.top + 0.03 or apart > NOT_OVER  # else it may be about to grasp
    return _unless_between(apart, plan[0].short, plan[1].short) if is_clear else None


def next_question(account: Account) -> Item | None:
    """What to do next towards a goal."""
    for goal in account.shuffled(made_up_goals(account))[:12]:
        short = next_step(account, goal)
        if short and (short != "nothing" or account.chance.random() < 0.3):
            return Item("next", "next.ask", "", short, {"goal": account.say(f"goal.{goal.kind}", goal.slots, sentence=False)})
    return None


def task_goals(account: Account) -> list[Goal] | None:
    """The task's own goals in the order of work: open and switch, then put, then close; None if a part of it has no name."""
    goals = []
    for predicate, *arguments in account.scene.goal:
        goal = _goal_of(account, predicate, *arguments)
        if goal is None:
            return None
        goals.append(goal)
    order = ("open", "turn_on", "turn_off", "lift", "put_on", "put_in", "close")
    return sorted(goals, key=lambda goal: order.index(goal.kind))


def task_steps(account: Account) -> list[Step] | None:
    """Steps to the task's goals, one goal after another; None if where things stand cannot be told."""
    goals = task_goals(account)
    if goals is None:
        return None
    plan: list[Step] = []
    filled = [goal.part for goal in goals if goal.kind == "put_in" and holds(account, goal) is not True]
    for goal in goals:
        if goal.kind == "close" and goal.part in filled:  # it must be open by then
            plan += _work(goal)
            continue
        more = steps(account, goal)
        if more is None:
            return None
        plan += more
    return plan


def _goal_of(account: Account, predicate: str, name: str, region: str = "") -> Goal | None:
    """A predicate as a Goal, if its things can be named."""
    names, surface = account.names, account.scene.surface
    owner = next((thing for thing in account.things if (region or name).startswith(thing.name)), None)
    level = re.search(r"_(top|middle|bottom)_region$", region or name)
    part = None
    if owner is not None and owner.parts:
        wanted = f"{level[1]} drawer" if level else None
        part = next((part for part in owner.parts if wanted in (None, part.name)), None)
    if predicate in ("open", "close") and part is not None:
        return Goal(predicate, {"part": names.part(owner, part)}, owner, part=part)
    if predicate in ("turnon", "turnoff") and part is not None:
        return Goal(predicate.replace("turn", "turn_"), {"a": names[owner]}, owner, part=part)
    if not names.has(name) or account.scene.thing(name).is_fixture:
        return None
    thing = account.scene.thing(name)
    if predicate == "lifted":
        return Goal("lift", {"a": names[thing], "surface": surface}, thing)
    if owner is None or predicate not in ("on", "in") or "init_region" in region:
        return None
    if predicate == "on":
        return Goal("put_on", {"a": names[thing], "b": names[owner]}, thing, owner)
    drawer = part if part is not None and part.name != "knob" else None
    place = names.part(owner, drawer) if drawer is not None and drawer.name != "door" else names[owner]
    return Goal("put_in", {"a": names[thing], "b": names[owner], "place": place}, thing, owner, drawer)


def _unless_between(apart: float, far: str, near: str) -> str | None:
    return far if apart > NOT_OVER else near if apart < OVER else None


def _apart(account: Account, a: Thing, b: Thing) -> float:
    return ((a.across - b.across) ** 2 + (a.distance - b.distance) ** 2) ** 0.5


def _is_at(account: Account, a: Thing, b: Thing, part: Part | None) -> bool | None:
    """Whether a is on b or in it (in the drawer, if one is named)."""
    facts = account.facts
    if facts.is_in_air(a):
        return None
    inside = facts.container(a) == b.name
    if part is not None and part.name.endswith("drawer"):
        return inside and facts.region(a) == part.name
    support = facts.rests_on(a)
    return inside or (support is not None and support.name == b.name)


def _free_hand(account: Account, wanted: Thing | None) -> list[Step]:
    """Steps before the hand can take `wanted` or a handle."""
    held = account.facts.held
    if held is None:
        closed = account.facts.gripper_state == "closed"
        return [Step("open_hand", {}, "open the gripper")] if closed else []
    if held is wanted:
        return []
    noun = account.names[held] if account.names.has(held.name) else Noun(("thing in the hand",), ("a thing",))
    return [Step("put_aside", {"a": noun, "surface": account.scene.surface}, f"put {noun.name} aside")]


def _work(goal: Goal) -> list[Step]:
    """Steps at a handle or knob."""
    retreat = Step("retreat", {}, "retreat")
    if goal.kind in ("turn_on", "turn_off"):
        a = goal.slots["a"]
        return [Step("knob", {"a": a}, "reach for the knob"), Step(goal.kind, {"a": a}, "turn the knob"), retreat]
    part = goal.slots["part"]
    if goal.kind == "close":
        return [Step("push", {"part": part}, f"push {part.name} shut"), retreat]
    return [
        Step("handle", {"part": part}, f"reach for the handle of {part.name}"),
        Step("pull", {"part": part}, f"pull {part.name} open"),
        retreat,
    ]


def _deliver(account: Account, goal: Goal) -> list[Step]:
    """Steps once the thing is held."""
    a, b = account.names[goal.thing], account.names[goal.target]
    place = goal.slots.get("place", b)
    lower = "lower_in" if goal.kind == "put_in" else "lower_on"
    return [
        Step("carry", {"a": a, "b": place}, f"carry {a.name} to {place.name}"),
        Step(lower, {"a": a, "b": b, "place": place}, f"lower {a.name}"),
        Step("release", {"a": a}, f"release {a.name}"),
        Step("retreat", {}, "retreat"),
    ]
