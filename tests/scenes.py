"""Scenes without a simulator: things on a table before a pinhole camera, some on or in others, one perhaps in the hand."""

import random

from sim.scene_state import CARRIER_TABLE, Gripper, Part, Scene, Sight, Thing

CAMERA_DISTANCE, CAMERA_HEIGHT, SLOPE = 1.0, 0.6, 0.5  # m to the table's middle, m above it, of half the picture
SIZES = {
    "akita_black_bowl": (0.107, 0.107, 0.05),
    "butter": (0.04, 0.08, 0.018),
    "milk": (0.053, 0.053, 0.131),
    "alphabet_soup": (0.062, 0.063, 0.077),
    "ketchup": (0.056, 0.037, 0.146),
    "red_coffee_mug": (0.12, 0.094, 0.13),
    "porcelain_mug": (0.12, 0.096, 0.106),
    "black_book": (0.03, 0.11, 0.134),
    "moka_pot": (0.147, 0.081, 0.152),
    "plate": (0.138, 0.137, 0.019),
    "basket": (0.17, 0.157, 0.142),
    "white_cabinet": (0.25, 0.22, 0.218),
    "flat_stove": (0.19, 0.297, 0.07),
}
FIXTURES = {
    "white_cabinet": ("top drawer", "middle drawer", "bottom drawer"),
    "flat_stove": ("knob",),
}
COLOURS = {"red_coffee_mug": (160, 30, 30), "akita_black_bowl": (20, 20, 20), "plate": (200, 198, 196), "basket": (93, 69, 42)}


def random_scene(seed: int, *, num_things: int | None = None) -> Scene:
    """A scene as varied as the simulator's, a function of the seed."""
    chance = random.Random(seed)
    number = chance.randint(1, 8) if num_things is None else num_things
    categories = [chance.choice(list(SIZES)) for _ in range(number)]
    loose = [category for category in categories if category not in FIXTURES]
    fixed = sorted({category for category in categories if category in FIXTURES})
    things, supports, inside = [], [], []
    for index, category in enumerate([*fixed, *loose]):
        name = f"{category}_{1 + [thing.category for thing in things].count(category)}"
        across, away, floor = chance.uniform(-0.35, 0.35), chance.uniform(-0.3, 0.3), 0.0
        carrier = chance.choice(things) if things and category not in FIXTURES and chance.random() < 0.3 else None
        if carrier is not None and carrier.category in ("plate", "basket", "akita_black_bowl", "white_cabinet"):
            across, away = carrier.across, carrier.distance - CAMERA_DISTANCE
            floor = carrier.top if carrier.category in ("plate", "white_cabinet") else 0.01
            supports.append((name, carrier.name))
            if carrier.category == "basket":
                inside.append((name, carrier.name, ""))
        elif category not in FIXTURES:
            supports.append((name, CARRIER_TABLE))
        things.append(place(name, across, away, floor, chance))
    held = chance.choice([thing for thing in things if not thing.is_fixture] or [None]) if chance.random() < 0.25 else None
    if held is not None:
        supports = [pair for pair in supports if held.name not in pair]
        inside = [row for row in inside if held.name not in row]
    over = chance.choice(things)
    goal = (("in", things[0].name, "basket_1_contain_region"),) if chance.random() < 0.5 else (("lifted", things[0].name),)
    return Scene(
        suite="test",
        layout="test",
        surface=chance.choice(("table", "floor", "desk", "low table", "kitchen table")),
        instruction="put the first thing into the basket",
        goal=goal,
        goal_holds=(chance.random() < 0.5,),
        things=tuple(things),
        gripper=Gripper(
            position_w=(0.0, 0.0, 0.3),
            centre=(chance.random(), 0.3),
            distance=over.distance,
            across=over.across,
            width=0.05 if held else chance.choice((0.0, 0.04, 0.08)),
            touching=held.name if held else None,
            holding=held.name if held else None,
        ),
        supports=tuple(supports),
        inside=tuple(inside),
        image_size=128,
    )


def place(name: str, across: float, away: float, floor: float = 0.0, chance: random.Random | None = None) -> Thing:
    """A thing at a place on the table, and what the cameras see of it; upright and in full view unless `chance` says else."""
    category = name.rsplit("_", 1)[0]
    size, distance = SIZES[category], CAMERA_DISTANCE + away
    u, v = 0.5 + 0.5 * across / (distance * SLOPE), 0.5 + 0.5 * (CAMERA_HEIGHT - floor - 0.55 * distance) / (distance * SLOPE)
    half_u, half_v = size[0] / distance / SLOPE / 4, size[2] / distance / SLOPE / 4
    seen = chance.choice((1.0, 1.0, 1.0, 1.0, 1.0, 0.05, 0.0)) if chance else 1.0
    pixels = int(seen * max(60, 4 * half_u * half_v * 128**2))
    box = (u - half_u, v - half_v, u + half_u, v + half_v)
    sight = Sight(pixels, (u, v), box, COLOURS.get(category, (120, 90, 60))) if pixels else Sight()
    return Thing(
        name=name,
        category=category,
        position_w=(away, across, floor + size[2] / 2),
        size=size,
        centre=(u, v),
        distance=distance,
        across=across,
        is_fixture=category in FIXTURES,
        is_tipped=chance is not None and category not in FIXTURES and chance.random() < 0.15,
        parts=tuple(Part(part, chance.choice((0.0, 0.3, 0.9)) if chance else 0.0) for part in FIXTURES.get(category, ())),
        base=sight,
        wrist=Sight(chance.choice((0, 10, 300)) if chance else 300),
    )
