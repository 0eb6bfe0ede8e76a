"""Instruction paraphrase: the same task in other words, from a verb exchanged to a sentence said another way.

The words are those of robosuite's and LIBERO's instructions. A colour's and a thing's synonym never is another thing of those
suites, so a paraphrase names one task only. Paraphrases stay within four words of the original, which is the room that
`vla train` leaves (--model.text_slack); a policy that cannot read one says so, and the episode counts as an error.
"""

import re
from dataclasses import replace

import numpy as np

from sim.environment import Environment
from sim.perturbations.effect import Effect
from vla.interface import Observation

VERBS = {
    "pick up": ("take", "grab", "collect"),
    "put both": ("place both", "set both"),
    "put": ("place", "set", "deposit"),
    "place it": ("put it", "set it", "deposit it"),
    "lift": ("raise", "hoist"),
    "stack": ("pile", "heap"),
    "turn on": ("start", "activate"),  # no "on" that a place's synonym would take for its own
    "turn off": ("stop", "deactivate"),
    "open": ("pull open", "swing open"),
    "close": ("shut", "push shut"),
    "push": ("move", "shove", "slide"),
}
PLACES = {
    "on top of": ("atop", "upon"),
    "to the front of": ("before", "in front of"),
    "to the left of": ("left of",),
    "to the right of": ("right of",),
    "next to": ("beside", "near"),
    "between": ("amid", "betwixt"),
    "from": ("off", "out of"),
    "in the": ("into the", "inside the"),
    "in it": ("into it", "inside it"),
    "on the": ("onto the", "upon the"),
    "on it": ("onto it", "upon it"),
}
NOUNS = {
    "basket": ("hamper",),
    "cabinet": ("cupboard", "sideboard"),
    "stove": ("cooker", "hob"),
    "plate": ("platter",),
    "bowl": ("basin",),
    "bowls": ("basins",),
    "cube": ("block",),
    "mug": ("cup", "beaker"),
    "drawer": ("compartment",),
    "microwave": ("microwave oven",),
    "moka pot": ("espresso maker",),
    "moka pots": ("espresso makers",),
    "milk": ("milk carton",),
    "ketchup": ("catsup",),
    "orange juice": ("juice carton",),
    "chocolate pudding": ("chocolate dessert",),
    "wine bottle": ("wine flask",),
    "book": ("volume", "tome"),
    "frying pan": ("skillet",),
    "rack": ("stand", "holder"),
    "caddy": ("organizer",),
    "table center": ("table middle",),
    "red": ("crimson", "scarlet"),
    "black": ("jet-black",),
    "green": ("emerald",),
    "yellow": ("golden",),
}
FRAMES = ("please {}", "{} please", "now {}", "robot, {}", "could you {}")
LEVELS = ("as it is", "one verb exchanged", "all verbs", "verbs and places", "verbs, places, nouns", "all, said otherwise")


class Paraphrase(Effect):
    """Magnitude: level, 0 to 5; see LEVELS."""

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        self._seed = generator.integers(2**32)

    def observe(self, environment: Environment) -> Observation:
        seen = environment.observe()
        generator = np.random.default_rng(self._seed)  # one paraphrase an episode
        return replace(seen, instruction=paraphrase(seen.instruction, int(self.magnitude), generator))


def paraphrase(instruction: str, level: int, generator: np.random.Generator) -> str:
    """`instruction` in other words; see LEVELS. An instruction with none of the words above is only framed."""
    frame = str(generator.choice(FRAMES))
    text = instruction
    if level >= 1:
        text = exchanged(text, VERBS, generator, most=1 if level == 1 else None)
    if level >= 3:
        text = exchanged(text, PLACES, generator)
    if level >= 4:
        text = exchanged(text, NOUNS, generator)
    if level >= 5 or (level >= 1 and text == instruction):
        text = frame.format(text)
    return text


def exchanged(text: str, table: dict[str, tuple[str, ...]], generator: np.random.Generator, most: int | None = None) -> str:
    """`text` with the table's phrases exchanged, longer phrases first, at most `most` of them from the left."""
    phrases = sorted(table, key=lambda phrase: (-len(phrase), phrase))
    chosen = {phrase: str(generator.choice(table[phrase])) for phrase in phrases}  # one word for one thing
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, phrases)) + r")\b")
    return pattern.sub(lambda found: chosen[found[0]], text, count=most or 0)
