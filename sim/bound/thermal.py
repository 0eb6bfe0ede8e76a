"""What a thermal camera sees: warm things cooling on a table, through their emissivity, its optics and its noise."""

import numpy as np

from sim.bound.materials import MATERIALS, Material

REFERENCE_LENGTH = 0.1  # m
NOISE = 0.15  # K, standard deviation of an uncooled sensor (its NETD is about 0.1 K)
MATERIAL_NAMES = tuple(MATERIALS)


def apparent(material: Material, length: float, warm: float, room: float, seconds: float) -> float:
    """Degrees Celsius that the camera reads off a body `seconds` after it was `warm`.

    Newton's cooling with a time that grows with size; what it does not emit it reflects of the room. The linear mixture in
    temperature is the radiometric one to first order.
    """
    own = room + (warm - room) * np.exp(-seconds / (material.cooling * length / REFERENCE_LENGTH))
    return float(material.emissivity * own + (1 - material.emissivity) * room)


def picture(
    geoms: np.ndarray, object_geoms: np.ndarray, clutter_geoms: np.ndarray, material: Material, length: float,
    generator: np.random.Generator, noise: float,
) -> np.ndarray:  # fmt: skip
    """Degrees Celsius [S, S] of an identity picture `geoms` [S, S]."""
    room, seconds = generator.uniform(18.0, 24.0), generator.uniform(60.0, 240.0)
    degrees = np.full(geoms.shape, room + generator.uniform(-1.0, 1.0))
    for geom in clutter_geoms:
        other = MATERIALS[MATERIAL_NAMES[generator.integers(len(MATERIAL_NAMES))]]
        warm = generator.uniform(room, 45.0)
        degrees[geoms == geom] = apparent(other, 0.05, warm, room, seconds)
    mask = np.isin(geoms, object_geoms)
    degrees[mask] = apparent(material, length, generator.uniform(48.0, 56.0), room, seconds)
    if mask.any():  # warmer inside than at the rim, warmer below than above, where air carries heat away
        height = np.linspace(-1.0, 1.0, len(mask))[:, None]
        excess = degrees - room
        degrees = np.where(mask, room + excess * (0.8 + 0.2 * blur(mask.astype(float), 2) + 0.08 * height), degrees)
    return blur(degrees, 1) + generator.normal(0.0, NOISE * noise + 1e-9, degrees.shape)


def blur(values: np.ndarray, times: int) -> np.ndarray:
    """Binomial (1 2 1) / 4 along both axes, `times` over; the border repeats."""
    for _ in range(times):
        for axis in (0, 1):
            padded = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
            first, middle, last = (np.take(padded, np.arange(s, s + values.shape[axis]), axis) for s in (0, 1, 2))
            values = (first + 2 * middle + last) / 4
    return values
