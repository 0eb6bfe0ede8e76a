"""The texts of one scene: captions, descriptions, questions, plans and dialogues, each in the words of one half."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sim.language.account import Account, Item
from sim.language.captions import long_caption, relations_of, short_caption, sizes, states
from sim.language.grammar import HELD_OUT, TRAINING, Grammar, capitalised, enumerate_words
from sim.language.locations import locate, locations
from sim.language.naming import It
from sim.language.plans import MAX_STEPS, Step, made_up_goals, next_question, steps, task_steps
from sim.language.properties import PROPERTY_QUESTIONS
from sim.language.questions import PLACE_QUESTIONS
from sim.scene_state import Scene

QUESTIONS: dict[str, Callable[[Account], Item | None]] = {
    **PLACE_QUESTIONS,
    **PROPERTY_QUESTIONS,
    "locate": locate,
    "next": next_question,
}
# Question lists that read well with "it" for what was spoken of just before.
PRONOUN_ASKS = ("side.ask", "third.ask", "closest.ask", "where.ask", "check.ask", "wrist.ask", "tipped.ask")
BRIEF_CHANCE = 0.4  # that a question says that a short answer will do


@dataclass(frozen=True)
class Text:
    """One training or test text on one scene."""

    kind: str  # see KINDS
    family: str  # of a question: what it asks for; else the kind
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    templates: tuple[str, ...]  # ids of all templates used
    half: str  # TRAINING or HELD_OUT, of all of them
    is_exact: bool  # the (single) answer is the only right one


def question(account: Account) -> Text | None:
    """A question with its short answer."""
    item = _item(account)
    if item is None:
        return None
    ask = _ask(account, item, brief=account.chance.random() < BRIEF_CHANCE)
    return _text(account, "question", item.family, [(ask, sentence_of(item.short))], is_exact=item.is_exact)


def answer(account: Account) -> Text | None:
    """A question that wants a full sentence."""
    item = _item(account, needs_tell=True)
    if item is None:
        return None
    ask = f"{_ask(account, item)} {account.say('full.ask', {})}"
    return _text(account, "answer", item.family, [(ask, _tell(account, item))])


def caption(account: Account) -> Text | None:
    return _pair(account, "caption", account.say("caption.ask_short", {}), short_caption(account))


def description(account: Account) -> Text | None:
    return _pair(account, "description", account.say("caption.ask_long", {}), long_caption(account))


def relations(account: Account) -> Text | None:
    """Where one thing is with respect to the others."""
    if len(account.things) < 3:
        return None
    thing = account.chance.choice(account.things)
    ask = account.say("about.ask", {"a": account.names[thing]})
    return _pair(account, "relations", ask, relations_of(account, thing))


def comparison(account: Account) -> Text | None:
    return _pair(account, "comparison", account.say("sizes.ask", {}), sizes(account))


def location(account: Account) -> Text | None:
    return _pair(account, "location", account.say("locate.ask_all", {}), locations(account))


def state(account: Account) -> Text | None:
    return _pair(account, "state", account.say("states.ask", {}), states(account))


def plan(account: Account) -> Text | None:
    """Steps to the task's goal, or to one that somebody made up."""
    found, goal = None, account.scene.instruction
    if account.chance.random() < 0.25:
        found = task_steps(account)
    if found is None:
        for made_up in account.shuffled(made_up_goals(account))[:12]:
            found = steps(account, made_up)
            if found is not None and (found or account.chance.random() < 0.3):
                goal = account.say(f"goal.{made_up.kind}", made_up.slots, sentence=False)
                break
            found = None
    if found is None or len(found) > MAX_STEPS:
        return None
    return _pair(account, "plan", account.say("plan.ask", {"goal": goal}), _in_words(account, goal, found))


def dialogue(account: Account) -> Text | None:
    """Two to five questions and answers; sometimes one is about what the one before was about."""
    turns: list[tuple[str, str]] = []
    families: list[str] = []
    in_full = account.chance.random() < 0.5
    wanted = account.chance.randint(2, 5)
    last: Item | None = None
    for _ in range(3 * wanted):
        item = _item(account, needs_tell=in_full)
        if item is None or item.family in families or len(turns) == wanted:
            continue
        is_same = last is not None and item.subject is not None and item.subject == last.subject
        with_it = is_same and item.ask in PRONOUN_ASKS
        ask = _ask(account, item, with_it=with_it)
        if not turns:
            ask = account.say("dialogue.start", {"question": ask})
        elif account.chance.random() < 0.6:
            ask = account.say("dialogue.follow", {"question": ask})
        turns.append((ask, _tell(account, item) if in_full else sentence_of(item.short)))
        families.append(item.family)
        last = item
    return _text(account, "dialogue", "dialogue", turns) if len(turns) >= 2 else None


# Kind -> (maker, share of the texts of an image).
KINDS: dict[str, tuple[Callable[[Account], Text | None], float]] = {
    "question": (question, 0.32),
    "answer": (answer, 0.13),
    "description": (description, 0.11),
    "plan": (plan, 0.11),
    "dialogue": (dialogue, 0.11),
    "location": (location, 0.06),
    "caption": (caption, 0.05),
    "relations": (relations, 0.05),
    "comparison": (comparison, 0.03),
    "state": (state, 0.03),
}


def write_texts(scene: Scene, grammar: Grammar, *, count: int, held_out: bool, seed: int) -> list[Text]:
    """`count` different texts of a scene, fewer if it gives no more. A function of its arguments.

    A training scene is told in training templates only; of a held-out scene every second text is in held-out ones.
    """
    chance = random.Random(seed)
    account = Account(scene, grammar, chance)
    names, shares = list(KINDS), [share for _, share in KINDS.values()]
    texts: list[Text] = []
    seen: set[str] = set()
    for _ in range(8 * count):
        if len(texts) == count:
            break
        account.begin(HELD_OUT if held_out and len(texts) % 2 else TRAINING)
        text = KINDS[chance.choices(names, shares)[0]][0](account)
        if text is not None and text.turns[0][0] not in seen:
            seen.add(text.turns[0][0])
            texts.append(text)
    return texts


def sentence_of(short: str) -> str:
    """A short answer as it is written: "The left black bowl", "Two", "Yes"."""
    return capitalised(short)


def _item(account: Account, *, needs_tell: bool = False) -> Item | None:
    for name in account.shuffled(list(QUESTIONS)):
        item = QUESTIONS[name](account)
        if item is not None and (item.tell or not needs_tell):
            return item
    return None


def _ask(account: Account, item: Item, *, brief: bool = False, with_it: bool = False) -> str:
    slots = {**item.slots, "a": It()} if with_it else item.slots
    ask = account.say(item.ask, slots)
    return f"{ask} {account.say('brief.ask', {})}" if brief else ask


def _tell(account: Account, item: Item) -> str:
    return account.say(item.tell, {"surface": account.scene.surface, **item.slots, **item.told})


def _in_words(account: Account, goal: str, plan_steps: Sequence[Step]) -> str:
    """A numbered list, or sentences in order."""
    if not plan_steps:
        return account.say("plan.nothing", {})
    lines = [account.say(f"step.{step.kind}", step.slots, sentence=False) for step in plan_steps]
    style = account.chance.random()
    if style < 0.4:
        numbered = "\n".join(f"{index}. {line}." for index, line in enumerate(lines, 1))
        return capitalised(f"{account.say('plan.numbered', {'goal': goal})}\n{numbered}")
    if style < 0.55 and len(lines) < 6:
        return capitalised(f"{enumerate_words(lines, 'then')}.")
    places = ["first", *["middle"] * (len(lines) - 2), "last"][: len(lines)]
    return " ".join(account.say(f"step.{place}", {"step": line}) for place, line in zip(places, lines, strict=True))


def _pair(account: Account, kind: str, ask: str, told: str | None) -> Text | None:
    return None if told is None else _text(account, kind, kind, [(ask, told)])


def _text(account: Account, kind: str, family: str, turns: Sequence[tuple[str, str]], *, is_exact: bool = False) -> Text:
    return Text(kind, family, tuple(turns), tuple(account.used), account.half, is_exact)
