"""Referring to things so that a listener knows which is meant: "the milk", "the left black bowl", "the top drawer of ..."."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sim.language.lexicon import WORDS, Word
from sim.scene_facts import FARTHER, LEFT, NEARER, RIGHT, Facts
from sim.scene_state import Part, Thing

# How twins are told apart: relation -> what comes before the noun, what comes after it. The first is the name's.
_QUALIFIERS = {
    LEFT: (("left {}", "leftmost {}"), ("{} on the left", "{} further to the left")),
    RIGHT: (("right {}", "rightmost {}"), ("{} on the right", "{} further to the right")),
    NEARER: (("front {}", "nearer {}"), ("{} in front", "{} closer to the camera")),
    FARTHER: (("back {}", "farther {}"), ("{} at the back", "{} further from the camera")),
    "middle": (("middle {}", "central {}"), ("{} in the middle", "{} between the other two")),
}


@dataclass(frozen=True)
class Noun:
    """A thing by its nouns; see grammar.Mention."""

    nouns: tuple[str, ...]
    indefinite: tuple[str, ...]

    def say(self, form: str, chance: random.Random) -> str:
        if form == "a":
            return chance.choice(self.indefinite)
        noun = self.nouns[0] if form == "name" else chance.choice(self.nouns)
        return noun if form == "bare" else f"the {noun}"

    @property
    def name(self) -> str:
        """What short answers say."""
        return f"the {self.nouns[0]}"


class It:
    """A thing that was spoken of just before."""

    def say(self, form: str, chance: random.Random) -> str:
        return "it"


class Names:
    """The things of a scene that can be named, and their names."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._nouns: dict[str, Noun] = {}
        for thing in facts.clear:
            noun = self._noun(thing)
            if noun is not None:
                self._nouns[thing.name] = noun
        self.things = tuple(thing for thing in facts.clear if thing.name in self._nouns)  # from left to right

    def has(self, name: str | None) -> bool:
        return name in self._nouns

    def __getitem__(self, thing: Thing | str) -> Noun:
        return self._nouns[thing if isinstance(thing, str) else thing.name]

    def part(self, thing: Thing, part: Part | str) -> Noun:
        """A drawer, door or knob of a named thing."""
        name = part if isinstance(part, str) else part.name
        nouns = [f"{name} of the {noun}" for noun in self[thing].nouns]
        if name == "door":
            nouns.append(f"{self[thing].nouns[0]} door")
        return Noun(tuple(nouns), tuple(f"a {noun}" for noun in nouns))

    def _noun(self, thing: Thing) -> Noun | None:
        word = WORDS.get(thing.category)
        if word is None:
            return None
        if any(_is_alike(thing, other) for other in self.facts.unclear):
            return None
        alike = [other for other in self.facts.clear if _is_alike(thing, other)]
        if len(alike) == 1:
            return Noun(word.nouns, word.indefinite)
        key = self._distinction(thing, alike)
        return _qualified(word, key) if key else None

    def _distinction(self, thing: Thing, alike: Sequence[Thing]) -> str | None:
        """What sets a thing apart from two or three of its kind, by side or else by depth."""
        facts, others = self.facts, [other for other in alike if other is not thing]
        sides = [facts.side(thing, other) for other in others]
        if None not in sides and len(set(sides)) == 1:
            return sides[0]
        if None not in sides and len(others) == 2 and _is_ordered(facts, alike):
            return "middle"
        if len(others) == 1 and sides == [None] and not facts.are_stacked(thing, others[0]):
            return facts.depth(thing, others[0])
        return None


def _is_ordered(facts: Facts, things: Sequence[Thing]) -> bool:
    """Whether every two of them have a side."""
    return all(facts.side(a, b) for index, a in enumerate(things) for b in things[index + 1 :])


def _is_alike(a: Thing, b: Thing) -> bool:
    return a.category in WORDS and b.category in WORDS and WORDS[a.category].nouns[0] == WORDS[b.category].nouns[0]


def _qualified(word: Word, key: str) -> Noun:
    before, after = _QUALIFIERS[key]
    nouns = [shape.format(noun) for shape in before for noun in word.nouns] + [shape.format(word.nouns[0]) for shape in after]
    return Noun(tuple(nouns), tuple(shape.format(indefinite) for shape in after for indefinite in word.indefinite))
