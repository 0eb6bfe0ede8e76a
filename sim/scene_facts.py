"""What is true of a scene, as the base camera sees it: pure functions of `Scene`, silent wherever a viewer could dispute.

A relation holds only with a margin, and its opposite only with the same margin, so between "left" and "right" lies
`None`: such pairs are not spoken of. A thing is spoken of if it is clear to see; if others of its kind are half hidden,
they are not counted at all.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

from sim.scene_state import CARRIER_TABLE, Scene, Thing

CLEAR_PIXELS = 25  # at 128 x 128; scaled with the picture's area
SIDE_MARGIN = 0.04  # of the picture's width, plus a quarter of the mean width of the two
DEPTH_MARGIN = 0.03  # m, plus a quarter of the mean depth of the two
NEAR, FAR = 0.04, 0.20  # m of free space between two boxes, seen from above
DRAWER_CLOSED, DRAWER_OPEN = 0.08, 0.45  # shares of the way
RIM = 0.004  # m that the foot of what lies in a bowl is below the bowl's top
HOLLOW = frozenset({"akita_black_bowl", "white_bowl", "glazed_rim_porcelain_ramekin", "chefmate_8_frypan"})
WIDE_OPEN, SHUT = 0.06, 0.02  # m between the fingers

ASIDE = 0.08  # m of free space across the view beyond which "behind" would not be said

LEFT, RIGHT, NEARER, FARTHER, FRONT, BEHIND, ON, IN, CLOSE = "left right nearer farther front behind on in close".split()
OPPOSITE = {LEFT: RIGHT, RIGHT: LEFT, NEARER: FARTHER, FARTHER: NEARER, FRONT: BEHIND, BEHIND: FRONT}


class Facts:
    """Questions to one scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._things = {thing.name: thing for thing in scene.things}
        self._clear_pixels = CLEAR_PIXELS * (scene.image_size / 128) ** 2
        self._inside = {thing: (container, region) for thing, container, region in scene.inside}

    # ---------------------------------------------------------------------------------------------------------- seeing

    @cached_property
    def clear(self) -> tuple[Thing, ...]:
        """Things that a viewer can name, from left to right."""
        seen = [thing for thing in self.scene.things if thing.base.pixels >= self._clear_pixels]
        return tuple(sorted(seen, key=lambda thing: thing.base.centre[0]))

    @cached_property
    def unclear(self) -> tuple[Thing, ...]:
        """Things of which a few pixels show."""
        return tuple(thing for thing in self.scene.things if 0 < thing.base.pixels < self._clear_pixels)

    def in_wrist_view(self, thing: Thing) -> bool | None:
        """Whether the hand's camera sees it; None if only a little."""
        return True if thing.wrist.pixels >= 2 * self._clear_pixels else None if thing.wrist.pixels else False

    def count(self, belongs: Callable[[Thing], bool]) -> int | None:
        """How many clear things belong; None if an unclear one does, since a viewer may count it or not."""
        if any(belongs(thing) for thing in self.unclear):
            return None
        return sum(belongs(thing) for thing in self.clear)

    # ------------------------------------------------------------------------------------------------------- relations

    def side(self, a: Thing, b: Thing) -> str | None:
        """LEFT if a is left of b in the picture, RIGHT, or None if disputable: pixels and boxes must both say so."""
        seen = a.base.centre[0] - b.base.centre[0]
        boxes = a.centre[0] - b.centre[0]
        widths = sum(thing.base.box[2] - thing.base.box[0] for thing in (a, b))
        if abs(seen) < SIDE_MARGIN + widths / 8 or seen * boxes <= 0:
            return None
        return LEFT if seen < 0 else RIGHT

    def depth(self, a: Thing, b: Thing) -> str | None:
        """NEARER if a is nearer to the viewer than b, FARTHER, or None if disputable."""
        gap = a.distance - b.distance
        if abs(gap) < DEPTH_MARGIN + (a.size[1] + b.size[1]) / 8:
            return None
        return NEARER if gap < 0 else FARTHER

    def order(self, a: Thing, b: Thing) -> str | None:
        """FRONT if a stands in front of b, BEHIND, None if disputable or too far to one side."""
        aside = abs(a.across - b.across) - (a.size[0] + b.size[0]) / 2
        found = self.depth(a, b) if aside < ASIDE else None
        return None if found is None else FRONT if found == NEARER else BEHIND

    def gap(self, a: Thing, b: Thing) -> float:
        """m of free space between the two boxes seen from above; 0 if they overlap there."""
        across = abs(a.across - b.across) - (a.size[0] + b.size[0]) / 2
        along = abs(a.distance - b.distance) - (a.size[1] + b.size[1]) / 2
        return (max(across, 0.0) ** 2 + max(along, 0.0) ** 2) ** 0.5

    def is_near(self, a: Thing, b: Thing) -> bool | None:
        """True within NEAR, False beyond FAR, None between."""
        gap = self.gap(a, b)
        return True if gap <= NEAR else False if gap >= FAR else None

    def is_between(self, a: Thing, b: Thing, c: Thing) -> bool:
        """a lies on the middle half of the line from b to c, seen from above and in the picture."""
        if len({self.level(thing) for thing in (a, b, c)}) > 1 or self.level(a) is None:
            return False
        if not self.side(a, b) or not self.side(a, c) or self.side(a, b) == self.side(a, c) or self.are_stacked(a, b, c):
            return False
        line = (c.across - b.across, c.distance - b.distance)
        length = (line[0] ** 2 + line[1] ** 2) ** 0.5
        offset = (a.across - b.across, a.distance - b.distance)
        along = (offset[0] * line[0] + offset[1] * line[1]) / length
        beside = abs(offset[0] * line[1] - offset[1] * line[0]) / length
        return 0.25 * length < along < 0.75 * length and beside < max(0.03, min(a.size[0], a.size[1]) / 2)

    def are_stacked(self, *things: Thing) -> bool:
        """Whether one of them carries or contains another."""
        names = {thing.name for thing in things}
        return any(self.carrier(thing) in names or self.container(thing) in names for thing in things)

    def carrier(self, a: Thing) -> str | None:
        """Name of what it stands on (CARRIER_TABLE for the table); None if the hand holds it, it falls, or it leans on two."""
        lower = [below for above, below in self.scene.supports if above == a.name]
        return lower[0] if len(lower) == 1 and a.name != self.scene.gripper.holding else None

    def container(self, a: Thing) -> str | None:
        """Name of the container that it is in, if any.

        Either the simulator has a region for it, or it stands on a hollow thing whose rim is above its foot.
        """
        if a.name == self.scene.gripper.holding:
            return None
        if a.name in self._inside:
            return self._inside[a.name][0]
        lower = self._things.get(self.carrier(a) or "")
        is_hollow = lower is not None and lower.category in HOLLOW and not lower.is_tipped
        return lower.name if is_hollow and a.position_w[2] - a.size[2] / 2 < lower.top - RIM else None

    def region(self, a: Thing) -> str:
        """The container's region that holds it: "top drawer", ... or "" for the container itself."""
        return self._inside[a.name][1] if a.name in self._inside else ""

    def rests_on(self, a: Thing) -> Thing | None:
        """The thing under it, if that is a thing and not a container around it."""
        lower = self.carrier(a)
        return None if lower in (None, CARRIER_TABLE) or self.container(a) is not None else self._things[lower]

    def is_on_table(self, a: Thing) -> bool:
        return self.carrier(a) == CARRIER_TABLE and self.container(a) is None

    def holds(self, relation: str, a: Thing, b: Thing) -> bool | None:
        """Whether a is LEFT of b, ..., CLOSE to b; None if disputable."""
        if relation in (ON, IN):
            where = self.container(a) if relation == IN else self.rests_on(a).name if self.rests_on(a) else None
            return None if self.is_in_air(a) else where == b.name
        if self.are_stacked(a, b):
            return None
        if relation in (LEFT, RIGHT):
            found = self.side(a, b)
        elif self.is_in_air(a) or self.is_in_air(b):  # how far away it is does not show
            found = None
        elif relation == CLOSE:
            return self.is_near(a, b) if self.level(a) == self.level(b) else None
        else:
            found = self.depth(a, b) if relation in (NEARER, FARTHER) else self.order(a, b)
        return None if found is None else found == relation

    def level(self, a: Thing) -> str | None:
        """What it stands on or in; None in the air. How close two things are is only told of things on one level."""
        return CARRIER_TABLE if a.is_fixture else self.container(a) or self.carrier(a)

    def is_in_air(self, a: Thing) -> bool:
        """Whether it is held, falls, or leans on several things, so that where it is, seen from above, says little."""
        return self.carrier(a) is None and self.container(a) is None and not a.is_fixture

    # ------------------------------------------------------------------------------------------------------ comparisons

    def extreme(self, relation: str, among: Iterable[Thing]) -> Thing | None:
        """The one that is LEFT (RIGHT, NEARER, FARTHER) of every other; None if there is none or fewer than two."""
        things = tuple(among)
        for a in things:
            if len(things) > 1 and all(self.holds(relation, a, b) for b in things if b is not a):
                return a
        return None

    def taller(self, a: Thing, b: Thing) -> Thing | None:
        """The one that is higher from foot to top, by a quarter and 1 cm at least."""
        return _larger(a, b, lambda thing: thing.size[2], ratio=1.25, margin=0.01)

    def larger(self, a: Thing, b: Thing) -> Thing | None:
        """The one whose box has the larger volume, by half at least and not smaller from above."""
        volume = _larger(a, b, lambda thing: thing.size[0] * thing.size[1] * thing.size[2], ratio=1.5, margin=0.0)
        area = _larger(a, b, lambda thing: thing.size[0] * thing.size[1], ratio=1.1, margin=0.0)
        return volume if volume is area else None

    def nearest(self, a: Thing, among: Iterable[Thing]) -> Thing | None:
        """The one with the least free space to a, by 3 cm at least; of those on its level; None among fewer than two."""
        level = self.level(a)
        others = sorted((self.gap(a, b), index, b) for index, b in enumerate(among) if b is not a and self.level(b) == level)
        if len(others) < 2 or level is None or others[1][0] - others[0][0] < 0.03:
            return None
        return others[0][2]

    def third(self, a: Thing) -> str | None:
        """LEFT, "middle" or RIGHT third of the picture; None near the borders of thirds."""
        u = a.base.centre[0]
        return LEFT if u < 0.28 else RIGHT if u > 0.72 else "middle" if 0.38 < u < 0.62 else None

    # ----------------------------------------------------------------------------------------------------------- states

    @property
    def gripper_state(self) -> str | None:
        """ "open", "closed" or None in between or around a thing."""
        gripper = self.scene.gripper
        if gripper.touching is not None:
            return None
        return "open" if gripper.width > WIDE_OPEN else "closed" if gripper.width < SHUT else None

    @property
    def held(self) -> Thing | None:
        """What the hand holds in the air."""
        name = self.scene.gripper.holding
        return self._things[name] if name else None

    @property
    def hand_is_empty(self) -> bool | None:
        """None while it touches something that it does not hold in the air."""
        return True if self.scene.gripper.touching is None else False if self.held else None

    @property
    def is_done(self) -> bool:
        return all(self.scene.goal_holds)


def opening_state(opening: float) -> str:
    """ "closed", "partly open" or "open", of a drawer or door."""
    return "closed" if opening < DRAWER_CLOSED else "open" if opening > DRAWER_OPEN else "partly open"


def _larger(a: Thing, b: Thing, measure: Callable[[Thing], float], *, ratio: float, margin: float) -> Thing | None:
    low, high = sorted((a, b), key=measure)
    return high if measure(high) > ratio * measure(low) and measure(high) - measure(low) > margin else None
