"""What question makers share: a scene's facts and names, a source of chance, and what a question is made of."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sim.language.grammar import TRAINING, Grammar, Slots
from sim.language.naming import Names, Noun
from sim.scene_facts import Facts
from sim.scene_state import Part, Scene, Thing

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One question to a scene and its answers, not yet in words."""

    family: str  # what it asks for; the first part of its templates' names
    ask: str  # template list of the question
    tell: str  # template list of the full-sentence answer
    short: str  # the short answer
    slots: Slots = field(default_factory=dict)
    subject: str | None = None  # simulator's name of slot "a" if the question is about one named thing
    told: Slots = field(default_factory=dict)  # slots that the full answer has otherwise
    is_exact: bool = True  # whether the short answer is the only right one


class Account:
    """One scene to tell of, in the words of one half of the templates."""

    def __init__(self, scene: Scene, grammar: Grammar, chance: random.Random) -> None:
        self.scene, self.grammar, self.chance = scene, grammar, chance
        self.facts = Facts(scene)
        self.names = Names(self.facts)
        self.things = self.names.things  # what can be named, from left to right
        self.loose = tuple(thing for thing in self.things if not thing.is_fixture)
        self.begin(TRAINING)

    def begin(self, half: str) -> None:
        """A new text, in the words of this half."""
        self.half, self.used = half, []

    def say(self, name: str, slots: Slots, *, sentence: bool = True) -> str:
        """Words from template list `name`; what was used is noted in `used`."""
        template = self.grammar.choose(name, self.half, self.chance)
        self.used.append(template.id)
        return self.grammar.fill(template, slots, self.chance, sentence=sentence)

    def name(self, thing: Thing) -> str:
        """How short answers call a thing."""
        return self.names[thing].name

    def phrase(self, name: str) -> str:
        """One of the grammar's phrases of that name."""
        return self.chance.choice(self.grammar.phrases[name])

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.chance.sample(list(values), len(values))

    def pairs(
        self, first: Sequence[Thing] | None = None, second: Sequence[Thing] | None = None
    ) -> Iterator[tuple[Thing, Thing]]:
        """Every ordered pair of two different things, at random."""
        firsts, seconds = self.things if first is None else first, self.things if second is None else second
        yield from self.shuffled([(a, b) for a in firsts for b in seconds if a is not b])

    def find(self, pairs: Iterator[tuple[Thing, Thing]], test: Callable[[Thing, Thing], object]) -> tuple[Thing, Thing] | None:
        """The first pair that passes."""
        return next((pair for pair in pairs if test(*pair)), None)

    def parts(self, *kinds: str) -> list[tuple[Thing, Part, Noun]]:
        """Parts of named things by the last word of their name: "drawer", "door", "knob"."""
        return [
            (thing, part, self.names.part(thing, part))
            for thing in self.things
            for part in thing.parts
            if part.name.split()[-1] in kinds
        ]
