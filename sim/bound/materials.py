"""What things are made of, as far as a drop, a microphone, a thermal camera and a lamp can tell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Material:
    """Properties of one material. Orders of magnitude are those of engineering tables; hollow things count as lighter."""

    density: float  # kg/m^3 of the body's outline, effective
    damping_ratio: float  # of a contact: below 1 it bounces
    time_constant: float  # s of a contact: short is stiff
    friction: float  # sliding
    pitch: float  # Hz of the first mode of a body 0.1 m long
    ring: float  # s in which a mode at 1 kHz decays to 1/e; higher ones decay faster in proportion
    emissivity: float  # of thermal radiation: polished metal shows the room's temperature, not its own
    cooling: float  # s in which a body 0.1 m long loses all but 1/e of its warmth
    colour: tuple[float, float, float]  # usual one, RGB in [0, 1]
    specular: float
    shininess: float
    opacity: float = 1.0


MATERIALS: dict[str, Material] = {
    "metal": Material(1500, 0.35, 0.005, 0.35, 900, 0.120, 0.25, 420, (0.66, 0.67, 0.70), 1.0, 0.9),
    "glass": Material(900, 0.30, 0.005, 0.30, 1300, 0.060, 0.92, 700, (0.55, 0.75, 0.70), 1.0, 1.0, 0.75),
    "wood": Material(600, 0.60, 0.007, 0.60, 480, 0.018, 0.88, 900, (0.62, 0.43, 0.25), 0.1, 0.1),
    "cardboard": Material(250, 0.90, 0.012, 0.70, 260, 0.008, 0.90, 260, (0.72, 0.58, 0.42), 0.0, 0.0),
    "bread": Material(300, 1.20, 0.030, 0.90, 110, 0.004, 0.95, 1300, (0.80, 0.58, 0.32), 0.0, 0.0),
    "fruit": Material(950, 0.90, 0.020, 0.65, 170, 0.006, 0.95, 1800, (0.92, 0.82, 0.22), 0.4, 0.4),
    "rubber": Material(1100, 0.20, 0.025, 1.10, 140, 0.010, 0.94, 1500, (0.70, 0.25, 0.25), 0.2, 0.2),
    "ceramic": Material(1300, 0.50, 0.006, 0.45, 1100, 0.040, 0.90, 1000, (0.88, 0.88, 0.85), 0.7, 0.7),
}
