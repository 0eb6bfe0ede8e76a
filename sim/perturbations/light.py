"""Light: lamps and headlight brighter or darker, tinted, and shining from elsewhere."""

import numpy as np

from sim.environment import Environment
from sim.perturbations.effect import Effect, ModelChanges, arm_of, unit_vector
from sim.perturbations.views import refresh_views
from vla.rotations import rotation_about

TINT = 0.25  # of the magnitude: standard deviation of each colour channel's own factor
TURN = np.radians(40.0)  # of the magnitude: how far a lamp's direction turns


class Light(Effect):
    """Magnitude: natural logarithm of the factor by which the light grows or, as often, shrinks."""

    def __init__(self, magnitude: float) -> None:
        super().__init__(magnitude)
        self._changes = ModelChanges()

    def undo(self) -> None:
        self._changes.undo()

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        arm = arm_of(environment, "light")
        model, headlight = arm.model, arm.model.vis.headlight
        sign = generator.choice((-1.0, 1.0))
        factor = np.exp(self.magnitude * (sign + TINT * generator.standard_normal(3)))  # [3], one of each channel
        for view in (model.light_diffuse, model.light_ambient, headlight.diffuse, headlight.ambient):
            view[...] = self._changes.keep(view) * factor.astype(view.dtype)
        kept = self._changes.keep(model.light_dir)
        for index in range(model.nlight):
            turn = rotation_about(unit_vector(generator), TURN * self.magnitude)
            model.light_dir[index] = kept[index] + (turn - np.eye(3)) @ kept[index]
        refresh_views(arm)
