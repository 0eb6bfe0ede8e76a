"""The classes of the bound corpus: words, material, and a body made of one of robosuite's meshes or of primitives."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multimodal.bind.corpus_file import ObjectClass


@dataclass(frozen=True)
class Body:
    """What a class is built of, lengths in metres before scaling."""

    name: str
    shape: str  # a word of MODES
    material: str  # a word of MATERIALS
    mesh: str = ""  # robosuite's mesh file; none: `parts`
    parts: Callable[[], list[str]] | None = None  # MuJoCo geoms, without material
    is_seen: bool = True


# Frequencies of the first modes over the lowest, by shape. Free bar and ring (bending), free disc, solid sphere, panels of a
# box: Fletcher and Rossing, "The Physics of Musical Instruments", chapters 2, 3 and 17; the rest are mixtures of those.
MODES: dict[str, tuple[float, ...]] = {
    "cylinder": (1.0, 2.83, 5.42, 8.77),
    "carton": (1.0, 1.41, 2.24, 3.16),
    "loaf": (1.0, 1.30, 1.61, 2.10),
    "box": (1.0, 1.58, 2.55, 3.54),
    "ellipsoid": (1.0, 1.22, 1.53, 1.94),
    "flask": (1.0, 1.86, 3.10, 5.42),
    "tool": (1.0, 2.76, 5.40, 8.93),
    "ring": (1.0, 2.60, 4.85, 7.70),
    "lever": (1.0, 2.10, 3.90, 6.27),
    "sphere": (1.0, 1.53, 2.00, 2.65),
    "cup": (1.0, 2.34, 4.50, 7.10),
    "disc": (1.0, 1.73, 2.33, 3.91),
}


def box(x: float, y: float, z: float, position: tuple[float, float, float] = (0, 0, 0), yaw: float = 0.0) -> str:
    """A geom of these half sides."""
    return f'type="box" size="{x} {y} {z}" pos="{position[0]} {position[1]} {position[2]}" axisangle="0 0 1 {yaw}"'


def cylinder(radius: float, half: float, position: tuple[float, float, float] = (0, 0, 0), axis: str = "z") -> str:
    turn = {"z": "0 0 1 0", "x": "0 1 0 1.5708", "y": "1 0 0 1.5708"}[axis]
    return f'type="cylinder" size="{radius} {half}" pos="{position[0]} {position[1]} {position[2]}" axisangle="{turn}"'


def ring(radius: float, width: float, half: float, count: int = 8) -> list[str]:
    """Boxes along a circle."""
    side = radius * np.tan(np.pi / count) * 1.1
    angles = [2 * np.pi * index / count for index in range(count)]
    return [box(width, side, half, (radius * np.cos(a), radius * np.sin(a), 0.0), a) for a in angles]


def hammer() -> list[str]:
    return [cylinder(0.008, 0.06, axis="x"), box(0.014, 0.034, 0.014, (0.062, 0.0, 0.0))]


def nut() -> list[str]:
    return [*ring(0.032, 0.009, 0.009), box(0.018, 0.011, 0.009, (0.056, 0.0, 0.0))]


def door_handle() -> list[str]:
    return [cylinder(0.024, 0.006), cylinder(0.009, 0.018, (0.0, 0.0, 0.022)), cylinder(0.008, 0.05, (0.045, 0.0, 0.04), "x")]


def mug() -> list[str]:
    handle = [box(0.010, 0.005, 0.004, (0.048, 0.0, z)) for z in (-0.02, 0.02)] + [box(0.004, 0.005, 0.024, (0.058, 0.0, 0.0))]
    return [*ring(0.036, 0.004, 0.042), cylinder(0.036, 0.005, (0.0, 0.0, -0.038)), *handle]


def plate() -> list[str]:
    return [cylinder(0.06, 0.004), *ring(0.062, 0.008, 0.007, 10)]


BODIES: tuple[Body, ...] = (
    Body("can", "cylinder", "metal", mesh="can"),
    Body("milk carton", "carton", "cardboard", mesh="milk"),
    Body("bread", "loaf", "bread", mesh="bread"),
    Body("cereal", "box", "cardboard", mesh="cereal"),
    Body("lemon", "ellipsoid", "fruit", mesh="lemon"),
    Body("bottle", "flask", "glass", mesh="bottle"),
    Body("hammer", "tool", "wood", parts=hammer),
    Body("nut", "ring", "metal", parts=nut),
    Body("door handle", "lever", "metal", parts=door_handle),
    Body("block", "box", "wood", parts=lambda: [box(0.03, 0.03, 0.03)]),
    Body("ball", "sphere", "rubber", parts=lambda: ['type="sphere" size="0.032"']),
    Body("mug", "cup", "ceramic", parts=mug),
    Body("plate", "disc", "ceramic", parts=plate),
    # Held out: both words of each occur in classes above.
    Body("marble", "sphere", "glass", parts=lambda: ['type="sphere" size="0.026"'], is_seen=False),
    Body("tin", "box", "metal", parts=lambda: [box(0.04, 0.028, 0.022)], is_seen=False),
)


def prompts(body: Body) -> tuple[str, ...]:
    """Sentences that are true of every sample of the class."""
    stuff, shape, name = body.material, body.shape, body.name
    return (
        f"a {name}",
        f"a photo of a {name} on a table",
        f"a {name} made of {stuff}",
        f"a {shape} made of {stuff}",
        f"a {stuff} {shape}",
        f"a {name} is a {shape} of {stuff}",
    )


def object_classes() -> tuple[ObjectClass, ...]:
    return tuple(ObjectClass(body.name, body.shape, body.material, body.is_seen, prompts(body)) for body in BODIES)


def mesh_file(name: str) -> Path:
    """One of robosuite's meshes; robosuite itself is not imported. Raises ValueError if it is not installed."""
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("The bound corpus uses robosuite's meshes; install robosuite (`make`, or the extra `sim`).")
    return Path(spec.submodule_search_locations[0]) / "models" / "assets" / "objects" / "meshes" / f"{name}.obj"
