"""One sample of the bound corpus: the same drop and poke, by seven sensors."""

import numpy as np

from multimodal.bind.sensors import ACCELERATION_RANGE, FORCE_RANGE, SENSORS
from sim.bound.plan import BindCorpusConfig
from sim.bound.poke import STEPS_PER_SAMPLE, Recording, play
from sim.bound.scene import World, repaint
from sim.bound.sound import synthesise
from sim.bound.thermal import picture
from sim.bound.view import Camera, Gallery, View, back_project

MIN_PIXELS = 10  # of the body in the picture, or the scene is drawn again
MAX_ATTEMPTS = 20
ORBIT = 12.0  # degrees that the video's camera moves


def take_sample(
    world: World, gallery: Gallery, config: BindCorpusConfig, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Codes of every sensor. Raises RuntimeError if the body is hidden in every attempt."""
    for _ in range(MAX_ATTEMPTS):
        repaint(world, config, generator)
        recording = play(world, generator, tilt=config.tilt, moments=config.video_frames)
        pose(world, recording.rest, None)
        camera = choose_camera(recording.rest[:3], generator)
        view = gallery.look(camera, config.image_size)
        if np.isin(view.geoms, world.object_geoms).sum() >= MIN_PIXELS:
            break
    else:
        raise RuntimeError(f"{world.body.name} was hidden or out of sight {MAX_ATTEMPTS} times; lower --clutter.")
    other = gallery.look(turned(camera, 130.0), config.image_size, ("depth",))
    values = {
        "image": photograph(view.colour, config, generator),
        "depth": noisy_depth(view.depth, config, generator),
        "thermal": picture(
            view.geoms, world.object_geoms, world.clutter_geoms, world.material, world.length, generator, config.noise
        )[None],
        "point": cloud((view, other), world, config, generator),
        "video": film(world, gallery, camera, recording, config, generator),
        "audio": synthesise(recording.contact, world.body.shape, world.material, world.length, generator, config.noise),
        "trace": trace(recording, config, generator),
    }
    return {name: SENSORS[name].encode(value) for name, value in values.items()}


def pose(world: World, qpos: np.ndarray, finger: np.ndarray | None) -> None:
    """Put the body (and the finger, or hide it) where they were."""
    import mujoco

    world.data.qpos[:7] = qpos
    world.data.mocap_pos[0] = (0.0, 0.0, -1.0) if finger is None else finger
    mujoco.mj_kinematics(world.model, world.data)
    mujoco.mj_camlight(world.model, world.data)


def choose_camera(position: np.ndarray, generator: np.random.Generator) -> Camera:
    target = (*(position[:2] + generator.uniform(-0.012, 0.012, 2)), 0.03)
    return Camera(target, generator.uniform(0.36, 0.46), generator.uniform(0, 360), generator.uniform(-55, -28))


def turned(camera: Camera, degrees: float) -> Camera:
    return Camera(camera.target, camera.distance, camera.azimuth + degrees, camera.elevation)


def photograph(colour: np.ndarray, config: BindCorpusConfig, generator: np.random.Generator) -> np.ndarray:
    """uint8 [S, S, 3] -> intensity [3, S, S]: less contrast about mid grey, sensor noise."""
    values = 0.5 + config.contrast * (colour / 255.0 - 0.5)
    return (values + generator.normal(0.0, 0.015 * config.noise + 1e-9, values.shape)).transpose(2, 0, 1)


def noisy_depth(depth: np.ndarray, config: BindCorpusConfig, generator: np.random.Generator) -> np.ndarray:
    """m [S, S] -> m [1, S, S]; a stereo camera's error grows with the square of the distance, 2 mm at half a metre."""
    return (depth + generator.normal(0.0, 1.0, depth.shape) * 0.008 * config.noise * depth**2)[None]


def cloud(views: tuple[View, ...], world: World, config: BindCorpusConfig, generator: np.random.Generator) -> np.ndarray:
    """m [points, 3] about their mean: the body's surface as two cameras see it, with depth noise and a few strays."""
    found = [back_project(view, *np.nonzero(np.isin(view.geoms, world.object_geoms))) for view in views]
    surface = np.concatenate(found)
    chosen = surface[generator.choice(len(surface), config.points, replace=len(surface) < config.points)]
    chosen = chosen + generator.normal(0.0, 0.001 * config.noise + 1e-9, chosen.shape)
    strays = generator.random(config.points) < 0.02 * config.noise
    centre = chosen.mean(0)
    chosen[strays] = centre + generator.uniform(-0.06, 0.06, (int(strays.sum()), 3))
    return chosen - centre


def film(
    world: World, gallery: Gallery, camera: Camera, recording: Recording, config: BindCorpusConfig,
    generator: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Intensity [3, T, S, S] of the poke from a camera that circles a little."""
    start, sweep = generator.uniform(-20.0, 20.0), generator.choice([-1, 1]) * ORBIT
    frames = []
    for index, (qpos, finger) in enumerate(recording.moments):
        pose(world, qpos, finger)
        moving = turned(camera, start + sweep * index / max(1, len(recording.moments) - 1))
        frames.append(photograph(gallery.look(moving, config.video_size, ("colour",)).colour, config, generator))
    return np.stack(frames, axis=1)


def trace(recording: Recording, config: BindCorpusConfig, generator: np.random.Generator) -> np.ndarray:
    """Share of full scale [6, samples]: force on the finger and acceleration of the body, averaged to TRACE_RATE."""
    force, acceleration = recording.force / FORCE_RANGE, recording.acceleration / ACCELERATION_RANGE
    both = np.concatenate([force, acceleration], axis=1).reshape(-1, STEPS_PER_SAMPLE, 6).mean(1).T
    return both + generator.normal(0.0, 0.004 * config.noise + 1e-9, both.shape)
