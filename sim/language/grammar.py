"""Templates and how they become sentences: choices in brackets, shared phrases by name, slots; one half is held out.

A line of grammar.yaml is a template:

    [Right now|At the moment], {a} <is> to the left of {b}[| in the picture].

`[x|y]` is one of x and y (either may be empty, brackets nest), `<is>` a phrase of the file's section `phrases`, `{a}` a
slot: text, or a `Mention`, which says itself anew each time (`{a}` "the red cup", `{a.a}` "a red mug", `{a.bare}` "red
mug", `{a.name}` the name that short answers use). Every second template of a list is held out: no training text uses it.
"""

import functools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

TRAINING, HELD_OUT = "training", "held_out"
_TOKEN = re.compile(r"\[|\]|\||<(\w+)>|\{(\w+)(?:\.(\w+))?\}")


class Mention(Protocol):
    """Something that templates can name."""

    def say(self, form: str, chance: random.Random) -> str:
        """form: "the", "a", "bare" or "name"."""
        ...


Slots = Mapping[str, str | Mention]


@dataclass(frozen=True)
class Template:
    """One line of the file."""

    id: str  # "side.ask.3"
    text: str

    @property
    def half(self) -> str:
        """TRAINING or HELD_OUT, by its place in its list."""
        return HELD_OUT if int(self.id.rsplit(".", 1)[1]) % 2 else TRAINING


class Grammar:
    """All templates and phrases of one file."""

    def __init__(self, phrases: Mapping[str, Sequence[str]], templates: Mapping[str, Sequence[Template]]) -> None:
        self.phrases, self.templates = phrases, templates
        self._halves = {
            (name, half): [template for template in lines if template.half == half]
            for name, lines in templates.items()
            for half in (TRAINING, HELD_OUT)
        }

    @classmethod
    def parse(cls, text: str) -> "Grammar":
        """Read a grammar. Raises ValueError on an unknown phrase, an unbalanced bracket, or a list of one template."""
        sections = yaml.safe_load(text)
        phrases = {name: _lines(block) for name, block in sections.pop("phrases").items()}
        templates = {
            f"{family}.{use}": tuple(Template(f"{family}.{use}.{index}", line) for index, line in enumerate(_lines(block)))
            for family, uses in sections.items()
            for use, block in uses.items()
        }
        grammar = cls(phrases, templates)
        for name, lines in templates.items():
            if len(lines) < 2:
                raise ValueError(f"{name} has {len(lines)} templates; at least 2, so that one can be held out.")
        for line in [*sum(phrases.values(), ()), *(template.text for lines in templates.values() for template in lines)]:
            grammar._check(line)
        return grammar

    def choose(self, name: str, half: str, chance: random.Random) -> Template:
        """A template of list `name` in this half. Raises KeyError if there is no such list."""
        return chance.choice(self._halves[name, half])

    def fill(self, template: Template, slots: Slots, chance: random.Random, *, sentence: bool = True) -> str:
        """The template with every choice made; a sentence begins with a capital. Raises KeyError on a missing slot."""
        text, rest = self._expand(template.text, 0, slots, chance)
        assert rest == len(template.text)
        return capitalised(tidy(text)) if sentence else tidy(text)

    def _expand(self, line: str, start: int, slots: Slots, chance: random.Random) -> tuple[str, int]:
        """Text of line[start:] up to its end, or of one bracket whose "[" is just before; and where it ended."""
        options, current, position = [], "", start
        while position < len(line):
            token = _TOKEN.search(line, position)
            if token is None:
                current, position = current + line[position:], len(line)
                break
            current, position = current + line[position : token.start()], token.end()
            if token[0] == "[":
                inner, position = self._expand(line, position, slots, chance)
                current += inner
            elif token[0] == "|":
                options, current = [*options, current], ""
            elif token[0] == "]":
                return chance.choice([*options, current]), position
            elif token[1]:
                phrase = chance.choice(self.phrases[token[1]])
                current += self._expand(phrase, 0, slots, chance)[0]
            else:
                value = slots[token[2]]
                current += value if isinstance(value, str) else value.say(token[3] or "the", chance)
        return current, position

    def _check(self, line: str) -> None:
        depth = 0
        for token in _TOKEN.finditer(line):
            depth += {"[": 1, "]": -1}.get(token[0], 0)
            if depth < 0 or (token[0] == "|" and depth == 0):
                raise ValueError(f"Brackets of {line!r} do not match: write [this|that].")
            if token[1] and token[1] not in self.phrases:
                raise ValueError(f"{line!r} names the phrase <{token[1]}>; there are {', '.join(sorted(self.phrases))}.")
        if depth:
            raise ValueError(f"Brackets of {line!r} do not match: write [this|that].")


@functools.cache
def default_grammar() -> Grammar:
    """The grammar that ships with the package."""
    return Grammar.parse((Path(__file__).parent / "grammar.yaml").read_text())


def tidy(text: str) -> str:
    """One space between words, none before a stop."""
    return re.sub(r"\s+([.,;:?!])", r"\1", re.sub(r"[ \t]+", " ", text)).strip()


def capitalised(text: str) -> str:
    """A capital at the beginning and after each stop and line break, numbers of a list skipped."""
    return re.sub(r"(^|[.?!]\s+|\n)((?:\d+\. )?)([a-z])", lambda found: found[1] + found[2] + found[3].upper(), text)


def enumerate_words(words: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.splitlines() if line.strip())
