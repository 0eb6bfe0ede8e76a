"""The world of one body: a table, the body in sizes and colours of its own, things beside it, a finger to poke with."""

import colorsys
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.bound.materials import MATERIALS, Material
from sim.bound.objects import Body, mesh_file
from sim.bound.plan import BindCorpusConfig

TIMESTEP = 0.002  # s
FINGER_RADIUS = 0.008  # m
NEAR, FAR = 0.05, 3.0  # m, the renderer's clipping planes
FIELD_OF_VIEW = 26.0  # degrees, vertical
PATTERNS = ("flat", "gradient", "checker", "none")  # of textures; none: colour alone
CLUTTER_HEIGHT = 0.035  # m at most, half of it
DROPPED = "dropped"  # the body's name in the model


@dataclass
class World:
    """A model that is redrawn for every sample, and what does not change between samples."""

    model: Any  # MjModel
    data: Any  # MjData
    body: Body
    material: Material
    length: float  # m, longest side of the body
    mass: float  # kg
    object_geoms: np.ndarray  # ids
    clutter_geoms: np.ndarray  # ids
    finger_geom: int


def build_world(body: Body, config: BindCorpusConfig, generator: np.random.Generator) -> World:
    """Compile the model of `body` in a drawn size, proportion and pattern."""
    import mujoco

    model = mujoco.MjModel.from_xml_string(world_xml(body, config, generator))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    named = lambda index: mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_GEOM, index) or ""  # noqa: E731
    names = [named(index) for index in range(model.ngeom)]
    chosen = lambda start: np.array([index for index, name in enumerate(names) if name.startswith(start)], int)  # noqa: E731
    geoms = chosen(DROPPED)
    number = model.body(DROPPED).id
    centre, half = boxes(model, data, geoms)
    length = float(((centre + half).max(0) - (centre - half).min(0)).max())
    return World(
        model, data, body, MATERIALS[body.material], length, float(model.body_mass[number]), geoms, chosen("clutter"),
        names.index("finger"),
    )  # fmt: skip


def boxes(model: Any, data: Any, geoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and half sides [N, 3] in m of upright boxes in the world that hold the geoms."""
    own, rotation = model.geom_aabb[geoms], data.geom_xmat[geoms].reshape(-1, 3, 3)  # own: in the geom's frame
    centre = data.geom_xpos[geoms] + np.einsum("nij,nj->ni", rotation, own[:, :3])
    return centre, np.einsum("nij,nj->ni", np.abs(rotation), own[:, 3:])


def world_xml(body: Body, config: BindCorpusConfig, generator: np.random.Generator) -> str:
    stuff = MATERIALS[body.material]
    scale = generator.uniform(0.85, 1.15) * generator.uniform(0.94, 1.06, 3)
    contact = f'solref="{stuff.time_constant} {stuff.damping_ratio}" friction="{stuff.friction} 0.003 0.0002" condim="4"'
    surface = f'material="object" density="{stuff.density * generator.uniform(0.85, 1.15):.1f}" {contact}'
    if body.mesh:
        sides = " ".join(f"{value:.4f}" for value in scale)
        mesh = f'<mesh name="body" file="{mesh_file(body.mesh)}" scale="{sides}"/>'
        geoms = [f'<geom name="{DROPPED}0" type="mesh" mesh="body" {surface}/>']
    else:
        mesh = ""
        parts = [scaled(part, float(scale[0])) for part in body.parts()]
        geoms = [f'<geom name="{DROPPED}{index}" {part} {surface}/>' for index, part in enumerate(parts)]
    textures = "".join(
        texture(name, PATTERNS[generator.integers(len(PATTERNS))], generator, name != "object") for name in ("object", "table")
    )
    clutter = "".join(
        f'<geom name="clutter{index}" type="{("box", "cylinder", "ellipsoid")[generator.integers(3)]}" '
        f'size=".02 .02 .02" rgba=".5 .5 .5 1" pos="0 0 -1"/>'
        for index in range(config.clutter)
    )
    return f"""<mujoco><compiler angle="radian"/><option timestep="{TIMESTEP}" cone="elliptic" impratio="3"/>
<size memory="4M"/><statistic extent="1" center="0 0 0"/>
<visual><global fovy="{FIELD_OF_VIEW}" offwidth="{config.image_size}" offheight="{config.image_size}"/>
<quality shadowsize="256" offsamples="0"/><map znear="{NEAR}" zfar="{FAR}"/></visual>
<asset>{mesh}{textures}</asset>
<worldbody><light name="lamp" pos="0 0 1" dir="0 0 -1" directional="true"/>
<geom name="table" type="plane" size="3 3 .1" material="table"/>{clutter}
<body name="{DROPPED}" pos="0 0 .2"><freejoint/>{"".join(geoms)}<site name="imu"/></body>
<body name="finger" mocap="true" pos="0 0 -1"><geom name="finger" type="sphere" size="{FINGER_RADIUS}" rgba=".1 .1 .1 1"
 solref=".01 1"/></body></worldbody>
<sensor><accelerometer site="imu"/></sensor></mujoco>"""


def scaled(geom: str, factor: float) -> str:
    """A geom's text with its sizes and position multiplied."""
    head, size, middle, position, tail = _split(geom)
    times = lambda numbers: " ".join(f"{float(value) * factor:.5f}" for value in numbers.split())  # noqa: E731
    return f'{head}size="{times(size)}"{middle}' + (f'pos="{times(position)}"{tail}' if position else "")


def _split(geom: str) -> tuple[str, str, str, str, str]:
    head, rest = geom.split('size="', 1)
    size, rest = rest.split('"', 1)
    if 'pos="' not in rest:
        return head, size, rest, "", ""
    middle, rest = rest.split('pos="', 1)
    position, tail = rest.split('"', 1)
    return head, size, middle, position, tail


def texture(name: str, pattern: str, generator: np.random.Generator, is_plane: bool) -> str:
    """A material of that name with a grey pattern that its colour is multiplied with."""
    if pattern == "none":
        return f'<material name="{name}"/>'
    light = [" ".join([f"{generator.uniform(0.55, 1.0):.2f}"] * 3) for _ in range(2)]
    repeat = "8 8" if is_plane else "20 20"  # per metre
    marks = f'mark="random" random="{generator.uniform(0.0, 0.3):.2f}" markrgb="{light[1]}"'
    return (
        f'<texture name="{name}" type="2d" builtin="{pattern}" rgb1="{light[0]}" rgb2="{light[1]}" width="32" height="32" '
        f'{marks}/>'
        f'<material name="{name}" texture="{name}" texrepeat="{repeat}" texuniform="true"/>'
    )


def repaint(world: World, config: BindCorpusConfig, generator: np.random.Generator) -> None:
    """New colours, gloss, lamp and clutter for one sample, in place."""
    model, stuff = world.model, world.material
    usual, free = np.array(stuff.colour), any_colour(generator)
    freedom = config.colour_freedom * generator.uniform()
    model.mat("object").rgba[:] = [*((1 - freedom) * usual + freedom * free), stuff.opacity]
    model.mat("object").specular[:] = stuff.specular * generator.uniform(0.7, 1.0)
    model.mat("object").shininess[:] = stuff.shininess * generator.uniform(0.7, 1.0)
    model.mat("table").rgba[:3] = 0.25 + 0.6 * any_colour(generator)
    model.mat("table").specular[:] = generator.uniform(0.0, 0.3)
    lamp = model.light("lamp")
    direction = np.array([*generator.uniform(-0.8, 0.8, 2), -1.0])
    lamp.dir[:], lamp.pos[:] = direction / np.linalg.norm(direction), -direction
    lamp.diffuse[:] = generator.uniform(0.35, 0.8) * generator.uniform(0.9, 1.0, 3)
    model.vis.headlight.ambient[:] = generator.uniform(0.15, 0.4)
    model.vis.headlight.diffuse[:] = generator.uniform(0.1, 0.35)
    place_clutter(world, generator)


def place_clutter(world: World, generator: np.random.Generator) -> None:
    """Between none and all of the things beside the body, at angles of their own; the others lie below the table."""
    model, count = world.model, int(generator.integers(len(world.clutter_geoms) + 1))
    angles = generator.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(max(count, 1)) / max(count, 1)
    for index, geom in enumerate(world.clutter_geoms):
        half = generator.uniform(0.008, 0.03, 3)
        half[2] = generator.uniform(0.006, CLUTTER_HEIGHT)
        reach = world.length / 2 + 0.02 + float(np.linalg.norm(half[:2])) + generator.uniform(0.0, 0.04)
        model.geom_rgba[geom, :3] = any_colour(generator)
        model.geom_size[geom] = half
        model.geom_rbound[geom] = float(np.linalg.norm(half)) * 1.5
        if index < count:
            place = (reach * np.cos(angles[index]), reach * np.sin(angles[index]))
            upright = half[1] if model.geom_type[geom] == 5 else half[2]  # mjGEOM_CYLINDER: its second size is the half height
            model.geom_pos[geom] = [*place, upright]
            model.geom_quat[geom] = [np.cos(angles[index]), 0, 0, np.sin(angles[index])]
        else:
            model.geom_pos[geom] = [0.0, 0.0, -1.0 - index]


def any_colour(generator: np.random.Generator) -> np.ndarray:
    """RGB [3] in [0, 1] of any hue, neither black nor white."""
    return np.array(colorsys.hsv_to_rgb(generator.uniform(), generator.uniform(0.1, 0.9), generator.uniform(0.35, 0.95)))
