"""What a describer knows of one moment: things, where the base camera sees them, what carries what. Values, no simulator.

Picture coordinates are shares of the stored image's width and height: u to the right, v downwards, both 0..1 inside. Where
an environment stores mirrored images (LIBERO), u is mirrored with them, so "left" is what a viewer of the file calls left.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CARRIER_TABLE = "table"  # in `Scene.supports`: the table, floor or desk that everything stands on


@dataclass(frozen=True)
class Part:
    """A drawer, door or knob of a fixture."""

    name: str  # "top drawer", "middle drawer", "bottom drawer", "door", "knob"
    opening: float  # 0 closed (off), 1 as far as it goes; a drawer pushed in beyond its closed place has 0


@dataclass(frozen=True)
class Sight:
    """What the pixels of one camera show of a thing; `share`, `centre` and `box` are meaningless without a pixel."""

    pixels: int = 0  # of the stored image, less the rim that a crop may remove
    centre: tuple[float, float] = (0.0, 0.0)  # u, v of the mean of these pixels
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # least u, v, largest u, v
    colour: tuple[int, int, int] = (0, 0, 0)  # median red, green, blue, 0..255


@dataclass(frozen=True)
class Thing:
    """One object or fixture."""

    name: str  # the simulator's, e.g. "akita_black_bowl_1"
    category: str  # the name without its number
    position_w: tuple[float, float, float]  # m, centre of the collision box
    size: tuple[float, float, float]  # m, extent in the world: towards the camera's right, along its view, upwards
    centre: tuple[float, float]  # u, v of the box's centre
    distance: float  # m from the camera to the box's centre, horizontally along the view
    across: float  # m of the box's centre to the right of the stored image's middle, horizontally
    is_fixture: bool = False
    is_tipped: bool = False  # its upright axis at the start of the episode now lies flat
    parts: tuple[Part, ...] = ()
    base: Sight = field(default_factory=Sight)
    wrist: Sight = field(default_factory=Sight)

    @property
    def top(self) -> float:
        """Height in m of its highest point."""
        return self.position_w[2] + self.size[2] / 2


@dataclass(frozen=True)
class Gripper:
    """The hand."""

    position_w: tuple[float, float, float]  # m, between the finger tips
    centre: tuple[float, float]  # u, v of that point
    distance: float  # m, as Thing.distance
    across: float  # m, as Thing.across
    width: float  # m between the fingers
    touching: str | None = None  # the thing between the fingers, touched by both
    holding: str | None = None  # the same, if nothing else carries it


@dataclass(frozen=True)
class Scene:
    """One moment of one episode."""

    suite: str
    layout: str  # which furniture and objects: "KITCHEN_SCENE3", "libero_object_2", "robosuite_lift"
    surface: str  # what all stands on: "table", "floor", "desk", "low table", "kitchen table"
    instruction: str
    goal: tuple[tuple[str, ...], ...]
    goal_holds: tuple[bool, ...]  # per predicate of the goal, by the simulator's own check
    things: tuple[Thing, ...]
    gripper: Gripper
    supports: tuple[tuple[str, str], ...]  # (upper, lower): lower pushes upper up; lower may be CARRIER_TABLE
    inside: tuple[tuple[str, str, str], ...]  # (thing, container, its region: "top drawer", ... or "")
    image_size: int

    def thing(self, name: str) -> Thing:
        """Raises KeyError if there is none of that name."""
        return {thing.name: thing for thing in self.things}[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON writes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scene":
        """Inverse of `to_dict`, also after JSON."""
        things = tuple(
            Thing(
                **_tuples(thing)
                | {"parts": tuple(Part(**part) for part in thing["parts"])}
                | {camera: Sight(**_tuples(thing[camera])) for camera in ("base", "wrist")}
            )
            for thing in values["things"]
        )
        return cls(**_tuples(values) | {"things": things, "gripper": Gripper(**_tuples(values["gripper"]))})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, also in lists, as tuples."""
    return {name: _frozen(value) for name, value in values.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
