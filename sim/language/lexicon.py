"""What things are called: nouns, kinds and colours of every category in robosuite's and LIBERO's scenes."""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """How one category is spoken of."""

    nouns: tuple[str, ...]  # after "the"; the first is the name that short answers use
    indefinite: tuple[str, ...]  # with article
    plural: str
    kinds: tuple[str, ...] = ()  # groups that it is counted in, see KINDS


# Group -> (singular, plural). Whoever counts a group counts every category of it.
KINDS: Mapping[str, tuple[str, str]] = {
    "bowl": ("bowl", "bowls"),
    "mug": ("mug", "mugs"),
    "can": ("can", "cans"),
    "bottle": ("bottle", "bottles"),
    "carton": ("carton", "cartons"),
    "box": ("small box", "small boxes"),
    "book": ("book", "books"),
    "cube": ("cube", "cubes"),
    "cabinet": ("cabinet", "cabinets"),
    "food": ("food package", "food packages"),
    "dish": ("piece of tableware", "pieces of tableware"),
    "loose": ("movable object", "movable objects"),
}

NAMED_COLOURS = ("black", "grey", "white", "red", "orange", "yellow", "green", "blue", "brown")


def _food(nouns: str, indefinite: str, plural: str, kind: str) -> Word:
    return Word(tuple(nouns.split("|")), tuple(indefinite.split("|")), plural, (kind, "food", "loose"))


def _loose(nouns: str, indefinite: str, plural: str, *kinds: str) -> Word:
    return Word(tuple(nouns.split("|")), tuple(indefinite.split("|")), plural, (*kinds, "loose"))


def _fixed(nouns: str, indefinite: str, plural: str, *kinds: str) -> Word:
    return Word(tuple(nouns.split("|")), tuple(indefinite.split("|")), plural, kinds)


WORDS: Mapping[str, Word] = {
    "alphabet_soup": _food(
        "alphabet soup|can of alphabet soup|alphabet soup can|tin of alphabet soup",
        "a can of alphabet soup|a tin of alphabet soup|an alphabet soup can",
        "cans of alphabet soup",
        "can",
    ),
    "tomato_sauce": _food(
        "tomato sauce|can of tomato sauce|tomato sauce can|tin of tomato sauce",
        "a can of tomato sauce|a tin of tomato sauce|a tomato sauce can",
        "cans of tomato sauce",
        "can",
    ),
    "ketchup": _food(
        "ketchup|ketchup bottle|bottle of ketchup", "a bottle of ketchup|a ketchup bottle", "ketchup bottles", "bottle"
    ),
    "bbq_sauce": _food(
        "barbecue sauce|barbecue sauce bottle|bottle of barbecue sauce",
        "a bottle of barbecue sauce|a barbecue sauce bottle",
        "bottles of barbecue sauce",
        "bottle",
    ),
    "salad_dressing": _food(
        "salad dressing|salad dressing bottle|bottle of salad dressing|bottle of dressing",
        "a bottle of salad dressing|a salad dressing bottle",
        "bottles of salad dressing",
        "bottle",
    ),
    "milk": _food("milk|milk carton|carton of milk", "a carton of milk|a milk carton", "milk cartons", "carton"),
    "orange_juice": _food(
        "orange juice|orange juice carton|carton of orange juice|juice carton",
        "a carton of orange juice|an orange juice carton",
        "cartons of orange juice",
        "carton",
    ),
    "cream_cheese": _food(
        "cream cheese|cream cheese box|box of cream cheese|package of cream cheese",
        "a box of cream cheese|a package of cream cheese",
        "boxes of cream cheese",
        "box",
    ),
    "butter": _food(
        "butter|box of butter|butter box|package of butter", "a box of butter|a package of butter", "boxes of butter", "box"
    ),
    "chocolate_pudding": _food(
        "chocolate pudding|box of chocolate pudding|chocolate pudding box|pudding box",
        "a box of chocolate pudding|a chocolate pudding box",
        "boxes of chocolate pudding",
        "box",
    ),
    "cookies": _food("cookie box|box of cookies|package of cookies", "a box of cookies|a cookie box", "cookie boxes", "box"),
    "akita_black_bowl": _loose(
        "black bowl|dark bowl|round black bowl", "a black bowl|a dark bowl", "black bowls", "bowl", "dish"
    ),
    "white_bowl": _loose(
        "white bowl|small white bowl|round white bowl", "a white bowl|a small white bowl", "white bowls", "bowl", "dish"
    ),
    "glazed_rim_porcelain_ramekin": _loose(
        "ramekin|porcelain ramekin|little ramekin", "a ramekin|a porcelain ramekin", "ramekins", "dish"
    ),
    "plate": _loose("plate|round plate|dinner plate", "a plate|a round plate|a dinner plate", "plates", "dish"),
    "porcelain_mug": _loose("white mug|porcelain mug|white cup", "a white mug|a porcelain mug", "white mugs", "mug", "dish"),
    "red_coffee_mug": _loose("red mug|red coffee mug|red cup", "a red mug|a red coffee mug", "red mugs", "mug", "dish"),
    "white_yellow_mug": _loose(
        "yellow and white mug|yellow-and-white mug|yellow and white cup",
        "a yellow and white mug|a yellow-and-white mug",
        "yellow and white mugs",
        "mug",
        "dish",
    ),
    "wine_bottle": _loose(
        "wine bottle|bottle of wine|dark wine bottle", "a wine bottle|a bottle of wine", "wine bottles", "bottle"
    ),
    "moka_pot": _loose("moka pot|coffee maker|stovetop coffee pot", "a moka pot|a stovetop coffee pot", "moka pots"),
    "chefmate_8_frypan": _loose("frying pan|pan|skillet", "a frying pan|a pan|a skillet", "frying pans"),
    "black_book": _loose("black book|dark book|book with the black cover", "a black book|a dark book", "black books", "book"),
    "yellow_book": _loose(
        "yellow book|book with the yellow cover", "a yellow book|a book with a yellow cover", "yellow books", "book"
    ),
    "basket": _loose("basket|brown basket|square basket", "a basket|a brown basket", "baskets"),
    "wooden_tray": _loose("wooden tray|tray|slatted tray", "a wooden tray|a tray", "wooden trays"),
    "cube": _loose("red cube|red block|small red cube", "a red cube|a red block", "red cubes", "cube"),
    "cubeA": _loose("red cube|red block|small red cube", "a red cube|a red block", "red cubes", "cube"),
    "cubeB": _loose("green cube|green block|larger green cube", "a green cube|a green block", "green cubes", "cube"),
    "wooden_cabinet": _fixed(
        "wooden cabinet|dark cabinet|dark chest of drawers|brown cabinet",
        "a wooden cabinet|a dark cabinet|a dark chest of drawers",
        "wooden cabinets",
        "cabinet",
    ),
    "white_cabinet": _fixed(
        "white cabinet|white chest of drawers|pale cabinet",
        "a white cabinet|a white chest of drawers",
        "white cabinets",
        "cabinet",
    ),
    "flat_stove": _fixed("stove|cooker|hot plate|flat stove", "a stove|a flat stove|a small cooker", "stoves"),
    "wine_rack": _fixed("wine rack|rack for wine bottles|wooden rack", "a wine rack|a wooden rack", "wine racks"),
    "wooden_two_layer_shelf": _fixed(
        "wooden shelf|two-layer shelf|dark shelf", "a wooden shelf|a two-layer shelf", "wooden shelves"
    ),
    "microwave": _fixed("microwave|microwave oven", "a microwave|a microwave oven", "microwaves"),
    "desk_caddy": _fixed("desk caddy|caddy|desk organiser", "a desk caddy|a caddy|a desk organiser", "desk caddies"),
}
WORDS = {**WORDS, "new_salad_dressing": WORDS["salad_dressing"]}

# Things of one colour all over, with a noun that does not tell it; their pixels decide, whichever textures are installed.
PLAIN_NOUNS: Mapping[str, str] = {
    "cube": "cube",
    "cubeA": "cube",
    "cubeB": "cube",
    "akita_black_bowl": "bowl",
    "white_bowl": "bowl",
    "plate": "plate",
    "porcelain_mug": "mug",
    "red_coffee_mug": "mug",
    "white_yellow_mug": "mug",
    "wine_bottle": "wine bottle",
    "moka_pot": "moka pot",
    "chefmate_8_frypan": "frying pan",
    "black_book": "book",
    "yellow_book": "book",
    "basket": "basket",
    "wooden_tray": "tray",
    "wooden_cabinet": "cabinet",
    "white_cabinet": "cabinet",
}
# Things of which "upright" and "on its side" make sense.
STANDING_KINDS = frozenset({"can", "bottle", "carton", "mug"})

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def count_word(count: int) -> str:
    """ "zero", "one", ... as short answers use it; digits beyond twelve."""
    return "zero" if count == 0 else NUMBERS[count] if count < len(NUMBERS) else str(count)


def colour_name(colour: tuple[int, int, int]) -> str | None:
    """One of NAMED_COLOURS for a median colour under the suites' lamps; None where two of them would do."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    if value < 0.16:
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.70 else "grey" if 0.30 < value < 0.58 else None
    if saturation < 0.30 or value < 0.25:
        return None
    degrees = 360 * hue
    if degrees < 12 or degrees > 345:
        return "red"
    if 20 < degrees < 45 and value < 0.62 and saturation > 0.35:
        return "brown"
    if 48 < degrees < 70 and value > 0.45:
        return "yellow"
    return "green" if 85 < degrees < 165 else "blue" if 190 < degrees < 260 else None
