"""Texture and background: patterns over the things' surfaces, other colours and patterns on walls, floors and tables.

Only what is drawn changes. Textures are written in the model and uploaded to the renderer; all are restored before the next
reset. The robot keeps its looks.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from sim.environment import Environment
from sim.perturbations.effect import Effect, ModelChanges, arm_of

ROBOT = ("robot0", "mount0", "gripper0")  # beginnings of its bodies' names
COLOUR_ROLE = 1  # of a material's textures: mjTEXROLE_RGB
DEFAULT_COLOUR = 0.5  # a geom of this grey shows its material's colour instead (MuJoCo's rule)
CELLS = (4, 8, 16, 32)  # patches per side of the patterns


class Surfaces(Effect):
    """What texture and background share: choose geoms, change their textures and colours."""

    kind = ""

    def __init__(self, magnitude: float) -> None:
        super().__init__(magnitude)
        self._changes = ModelChanges()

    def undo(self) -> None:
        self._changes.undo()

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        arm = arm_of(environment, self.kind)
        model = arm.model
        things = geoms_of_things(arm)
        chosen = [geom for geom in range(model.ngeom) if self.concerns(geom in things) and not is_robot(model, geom)]
        others = set(range(model.ngeom)) - set(chosen)
        textures = textures_of(model, chosen) - textures_of(model, others)  # one shared with the rest would change the rest
        self.textures = sorted(textures)
        for texture in self.textures:
            self.change_texture(texture_view(model, texture), generator)
        for geom in self.coloured(model, chosen):
            model.geom_rgba[geom, :3] = self.colour(self._changes.keep(model.geom_rgba[geom])[:3], generator)
        for material in sorted({int(model.geom_matid[geom]) for geom in chosen} - {-1} - materials_of(model, others)):
            model.mat_rgba[material, :3] = self.colour(self._changes.keep(model.mat_rgba[material])[:3], generator)
        arm.renderer.upload_textures(self.textures)

    def concerns(self, is_thing: bool) -> bool:
        raise NotImplementedError

    def coloured(self, model: Any, geoms: Iterable[int]) -> list[int]:
        """Those that show a colour of their own."""
        return [geom for geom in geoms if model.geom_matid[geom] < 0 or (model.geom_rgba[geom, :3] != DEFAULT_COLOUR).any()]

    def change_texture(self, view: np.ndarray, generator: np.random.Generator) -> None:
        """view: uint8 [rows, columns, channels] of the model."""
        raise NotImplementedError

    def colour(self, before: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A surface's colour [3] in [0, 1]."""
        raise NotImplementedError


class Texture(Surfaces):
    """Magnitude: share of lightness that a grey pattern takes from objects and fixtures. Hues stay, since instructions name
    them."""

    kind = "texture"

    def concerns(self, is_thing: bool) -> bool:
        return is_thing

    def change_texture(self, view: np.ndarray, generator: np.random.Generator) -> None:
        before = self._changes.keep(view)
        shade = 1.0 - self.magnitude * pattern(view.shape[:2], generator)
        view[..., :3] = np.rint(before[..., :3] * shade[..., None].astype(np.float32))

    def colour(self, before: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return before * np.float32(1.0 - self.magnitude * generator.uniform())


class Background(Surfaces):
    """Magnitude: share of a drawn colour and pattern in walls, floors, tables, and whatever else has no name; 1 hides all of
    what was there."""

    kind = "background"

    def concerns(self, is_thing: bool) -> bool:
        return not is_thing

    def change_texture(self, view: np.ndarray, generator: np.random.Generator) -> None:
        before = self._changes.keep(view)
        first, second = 255.0 * generator.uniform(size=(2, 3)).astype(np.float32)
        share = pattern(view.shape[:2], generator)[..., None].astype(np.float32)
        drawn = first + share * (second - first)
        view[..., :3] = np.rint(before[..., :3] + np.float32(self.magnitude) * (drawn - before[..., :3]))

    def colour(self, before: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        drawn = generator.uniform(0.3, 1.0, 3).astype(np.float32)
        return before + np.float32(self.magnitude) * (drawn - before)


def pattern(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Patches, stripes or checks in [0, 1], float64 [rows, columns]."""
    cells, kind = int(generator.choice(CELLS)), generator.integers(3)
    rows, columns = (np.arange(size) * cells // size for size in shape)
    patches = generator.uniform(size=(cells, cells))
    if kind == 1:
        patches = np.broadcast_to(patches[:, :1], patches.shape)
    elif kind == 2:
        patches = np.add.outer(np.arange(cells), np.arange(cells)) % 2 * patches[0, 0]
    return patches[rows[:, None], columns[None]]


def geoms_of_things(arm: Any) -> set[int]:
    """Every geom, drawn or collided with, of a body that has a name in the World, and of those below it."""
    model, roots = arm.model, {part.body_id for part in arm.parts.values()}
    below = np.zeros(model.nbody, bool)
    for body in range(1, model.nbody):  # MuJoCo numbers parents before children
        below[body] = body in roots or below[model.body_parentid[body]]
    return set(np.flatnonzero(below[model.geom_bodyid]).tolist())


def is_robot(model: Any, geom: int) -> bool:
    return model.body(model.geom_bodyid[geom]).name.startswith(ROBOT)


def materials_of(model: Any, geoms: Iterable[int]) -> set[int]:
    return {int(model.geom_matid[geom]) for geom in geoms}


def textures_of(model: Any, geoms: Iterable[int]) -> set[int]:
    """Colour textures that these geoms show."""
    return {int(model.mat_texid[material, COLOUR_ROLE]) for material in materials_of(model, geoms) if material >= 0} - {-1}


def texture_view(model: Any, texture: int) -> np.ndarray:
    """uint8 [rows, columns, channels], a view into the model."""
    first, shape = model.tex_adr[texture], (model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture])
    return model.tex_data[first : first + int(np.prod(shape))].reshape(shape)
