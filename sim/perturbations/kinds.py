"""THE table of perturbations: kinds, what they do, how much at each severity; and the settings that name one.

Severities 1 to 5 as in ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261); 0 changes nothing. The kinds cover
LIBERO-plus's seven dimensions (arXiv 2510.13626: camera, robot start, language, light, background, sensor noise, layout);
the magnitudes are ours.
"""

from dataclasses import dataclass

from sim.perturbations.arrangement import Layout, RobotStart
from sim.perturbations.camera import CameraPose
from sim.perturbations.distractors import Distractors
from sim.perturbations.effect import Effect
from sim.perturbations.instruction import Paraphrase
from sim.perturbations.light import Light
from sim.perturbations.sensors import Blur, CameraNoise, Latency, StateNoise
from sim.perturbations.surfaces import Background, Texture

SEVERITIES = range(0, 6)
NONE = "none"


@dataclass(frozen=True)
class Kind:
    """One row."""

    effect: type[Effect]
    magnitudes: tuple[float, ...]  # by severity, 0 to 5
    unit: str
    changes_simulation: bool = False  # else the same actions lead through the same states as without it


KINDS: dict[str, Kind] = {
    "camera": Kind(CameraPose, (0, 2, 4, 7, 11, 16), "degrees that the fixed camera orbits about the scene"),
    "light": Kind(Light, (0, 0.15, 0.3, 0.5, 0.75, 1.0), "log of the factor in brightness; tint and direction in proportion"),
    "texture": Kind(Texture, (0, 0.15, 0.3, 0.45, 0.6, 0.8), "share of things' lightness that a pattern takes"),
    "background": Kind(Background, (0, 0.15, 0.3, 0.5, 0.75, 1.0), "share of drawn colours and patterns in walls, floor, ..."),
    "distractors": Kind(Distractors, (0, 1, 2, 4, 6, 9), "shapes on the table, drawn only"),
    "layout": Kind(Layout, (0, 0.01, 0.02, 0.03, 0.045, 0.06), "m that each thing is moved", True),
    "robot": Kind(RobotStart, (0, 0.05, 0.1, 0.15, 0.2, 0.3), "rad, standard deviation of the arm's joints", True),
    "instruction": Kind(Paraphrase, (0, 1, 2, 3, 4, 5), "level of paraphrase"),
    "noise": Kind(CameraNoise, (0, 4, 8, 16, 28, 45), "standard deviation in a pixel, of 255"),
    "state_noise": Kind(StateNoise, (0, 0.001, 0.002, 0.005, 0.01, 0.02), "m, standard deviation in proprioception"),
    "blur": Kind(Blur, (0, 0.006, 0.01, 0.016, 0.024, 0.034), "standard deviation, share of the picture's width"),
    "latency": Kind(Latency, (0, 1, 2, 3, 5, 8), "control periods that observations are old"),
}


@dataclass(frozen=True)
class PerturbConfig:
    """Which perturbation an evaluation runs under."""

    kind: str = NONE  # see sim/perturbations/kinds.py
    severity: int = 3  # 1 to 5; 0 changes nothing

    def __post_init__(self) -> None:
        if self.kind not in (NONE, *KINDS):
            raise ValueError(f"perturb.kind is {self.kind!r}; allowed: {', '.join((NONE, *KINDS))}.")
        if self.severity not in SEVERITIES:
            raise ValueError(f"perturb.severity is {self.severity}; allowed: {SEVERITIES[0]} to {SEVERITIES[-1]}.")

    @property
    def name(self) -> str:
        """As rows and folders say it: "camera-3", or "none"."""
        return NONE if self.kind == NONE else f"{self.kind}-{self.severity}"


def build_effect(config: PerturbConfig) -> Effect:
    """The kind's effect at the severity's magnitude. Raises ValueError for kind "none"."""
    if config.kind == NONE:
        raise ValueError(f"perturb.kind is {NONE!r}, which has no effect; allowed: {', '.join(KINDS)}.")
    row = KINDS[config.kind]
    return row.effect(row.magnitudes[config.severity])
