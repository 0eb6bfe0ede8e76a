"""Laws of `vla corpus --bind`: same settings, same samples; splits share nothing; sound, force, depth and heat obey physics."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("robosuite")

from multimodal.bind.corpus_file import (
    LABEL,
    SPLITS,
    START,
    TRAIN,
    UNSEEN,
    read_manifest,
    read_rows,
    read_split,
    write_rows,
)
from multimodal.bind.sensors import GRAVITY, SENSORS, get_sensor
from sim.bound.corpus import make_bound_corpus
from sim.bound.materials import MATERIALS
from sim.bound.objects import BODIES, MODES, object_classes
from sim.bound.plan import BindCorpusConfig, Job, bodies_of, jobs_of
from sim.bound.poke import POKE_STEP, play
from sim.bound.sample import cloud, pose
from sim.bound.scene import World, build_world
from sim.bound.sound import impulses, modes, ring, ring_reference
from sim.bound.thermal import apparent, blur
from sim.bound.view import Camera, Gallery
from sim.bound.worker import file_rows
from sim.corpus import main


def config_of(root: Path, **changes: object) -> BindCorpusConfig:
    settings = dict(samples=1, validation_samples=1, test_samples=1, unseen_samples=1, samples_per_shape=1, workers=1)
    sizes = dict(image_size=24, video_size=16, video_frames=2, points=64)
    return BindCorpusConfig(root, **{**settings, **sizes, **changes})


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery(24)


def ball_world(config: BindCorpusConfig) -> World:
    body = next(body for body in BODIES if body.name == "ball")
    return build_world(body, config, np.random.default_rng(0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, gallery: Gallery) -> BindCorpusConfig:
    """A corpus of which one file was there before the command ran, and one was torn, as an interrupted one leaves it."""
    config = config_of(tmp_path_factory.mktemp("bound"))
    first = jobs_of(config)[0]
    write_rows(config.root / first.file, file_rows(first, config, gallery))
    (config.root / ".train-00001.npz.99.partial").write_text("torn")
    flags = [f"--{name}={value}" for name, value in config.identity.items()]
    assert main(["--bind", f"--output_dir={config.root}", "--workers=1", *flags]) == 0
    return config


def test_samples_are_a_function_of_settings_and_number(finished: BindCorpusConfig, gallery: Gallery) -> None:
    job = Job(UNSEEN, 0)
    again, stored = file_rows(job, finished, gallery), read_rows(finished.root / job.file)
    assert all(np.array_equal(again[name], stored[name]) for name in stored)
    assert not list(finished.root.glob(".*.partial"))


def test_splits_share_no_start_and_unseen_classes_stand_alone(finished: BindCorpusConfig) -> None:
    manifest = read_manifest(finished.root)
    rows = {split: read_split(finished.root, split) for split in SPLITS}
    assert {split: len(part[LABEL]) for split, part in rows.items()} == manifest.rows
    seen = set(range(manifest.num_seen))
    assert all(set(rows[split][LABEL].tolist()) == seen for split in SPLITS if split != UNSEEN)
    assert set(rows[UNSEEN][LABEL].tolist()) == set(range(manifest.num_seen, len(manifest.classes)))
    assert len(seen) >= 10 and len(manifest.classes) - len(seen) == 2
    assert not set(rows["test"][START].tolist()) & set(rows[UNSEEN][START].tolist())  # both of the official range
    for name in SENSORS:
        assert rows[TRAIN][name].shape[1:] == manifest.shapes[name]
        assert not np.array_equal(rows[TRAIN][name], rows["test"][name])


def test_words_of_unseen_classes_occur_in_seen_ones() -> None:
    classes = object_classes()
    seen = [kind for kind in classes if kind.is_seen]
    for kind in classes:
        assert kind.shape in MODES and kind.material in MATERIALS and len(set(kind.prompts)) == len(kind.prompts) > 3
        if not kind.is_seen:
            assert kind.shape in {other.shape for other in seen} and kind.material in {other.material for other in seen}
            assert (kind.shape, kind.material) not in {(other.shape, other.material) for other in seen}


@pytest.mark.parametrize("name", list(SENSORS))
def test_codes_come_back_within_half_a_level_and_in_the_box(name: str) -> None:
    sensor = get_sensor(name)
    values = np.random.default_rng(0).uniform(sensor.low, sensor.high, 500)
    back = sensor.decode(sensor.encode(values))
    assert np.abs(back - values).max() <= 0.5001 * (sensor.high - sensor.low) / (sensor.levels - 1) + 1e-6
    ends = sensor.decode(sensor.encode(np.array([-1e9, 1e9])))
    assert ends.tolist() == [np.float32(sensor.low), np.float32(sensor.high)]


def test_every_sample_is_in_its_box_and_no_sensor_is_silent(finished: BindCorpusConfig) -> None:
    rows = read_split(finished.root, TRAIN)
    for name, sensor in SENSORS.items():
        values = sensor.decode(rows[name])
        assert values.min() >= sensor.low and values.max() <= sensor.high
        spread = values.reshape(len(values), -1).std(1)
        assert spread.min() > sensor.step / 10, name


def test_a_resting_body_weighs_its_weight_and_pushes_back(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    body = next(body for body in BODIES if body.name == "block")
    world = build_world(body, config, np.random.default_rng(1))
    recording = play(world, np.random.default_rng(2), tilt=0.0, moments=2)
    resting = recording.acceleration[POKE_STEP - 10 : POKE_STEP]
    assert np.allclose(np.linalg.norm(resting, axis=1), GRAVITY, rtol=0.05)
    assert np.allclose(recording.contact[POKE_STEP - 10 : POKE_STEP], world.mass * GRAVITY, rtol=0.05)
    assert not recording.force[:POKE_STEP].any()
    assert recording.force[POKE_STEP:, 0].min() < -0.1 * world.mass * GRAVITY  # against the finger's heading
    assert len(recording.moments) == 2 and not np.allclose(recording.moments[-1][0][:3], recording.rest[:3], atol=0.01)


def test_depth_of_the_bare_table_is_that_of_a_plane(gallery: Gallery, tmp_path: Path) -> None:
    world = ball_world(config_of(tmp_path, clutter=0))
    gallery.hang(world)
    pose(world, np.array([0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0]), None)  # the body below the table
    view = gallery.look(Camera((0.0, 0.0, 0.0), 0.4, 30.0, -50.0), 24)
    rows, columns = np.nonzero(view.depth > 0)
    focal = 12 / np.tan(np.radians(13.0))
    rays = np.stack([(columns + 0.5 - 12) / focal, (rows + 0.5 - 12) / focal, np.ones(len(rows))], 1) @ view.axes
    expected = -view.position[2] / rays[:, 2]  # where the ray of depth 1 meets z = 0
    assert np.allclose(view.depth[rows, columns], expected, atol=5e-4)
    assert np.isclose(np.linalg.norm(view.position), 0.4, atol=1e-3)


def test_points_of_a_ball_lie_on_its_surface(gallery: Gallery, tmp_path: Path) -> None:
    config = config_of(tmp_path, clutter=0, noise=0.0)
    world = ball_world(config)
    gallery.hang(world)
    radius = float(world.model.geom_size[world.object_geoms[0], 0])
    pose(world, np.array([0.0, 0.0, radius, 1.0, 0.0, 0.0, 0.0]), None)
    views = tuple(gallery.look(Camera((0.0, 0.0, radius), 0.4, azimuth, -30.0), 24, ("depth",)) for azimuth in (0.0, 130.0))
    points = cloud(views, world, config, np.random.default_rng(0))
    centre = np.linalg.lstsq(np.c_[2 * points, np.ones(len(points))], (points**2).sum(1), rcond=None)[0][:3]
    assert np.allclose(np.linalg.norm(points - centre, axis=1), radius, atol=0.1 * radius)
    assert np.allclose(points.mean(0), 0.0, atol=1e-9)


def test_ringing_is_the_sum_of_each_impulses_sines() -> None:
    contact = np.zeros(60)
    contact[[5, 6, 30]] = (2.0, 5.0, 1.0)
    train = impulses(contact)
    assert np.flatnonzero(train).tolist() == [80, 96, 480] and train[[80, 96, 480]].tolist() == [2.0, 3.0, 1.0]
    played = modes("box", MATERIALS["metal"], 0.1, np.random.default_rng(0))
    assert np.allclose(ring(train, *played), ring_reference(train, *played), atol=1e-9)


def test_metal_rings_longer_than_wood_and_small_things_higher() -> None:
    generator = np.random.default_rng(0)
    metal, wood = (modes("box", MATERIALS[name], 0.1, generator) for name in ("metal", "wood"))
    assert metal[1][0] > 2 * wood[1][0]
    assert modes("box", MATERIALS["wood"], 0.05, generator)[0][0] > 1.5 * wood[0][0]


def test_heat_is_kept_by_large_things_and_hidden_by_polish() -> None:
    wood = MATERIALS["wood"]
    assert apparent(wood, 0.1, 50.0, 20.0, 120.0) > apparent(wood, 0.04, 50.0, 20.0, 120.0) > 20.0
    assert apparent(MATERIALS["metal"], 0.1, 50.0, 20.0, 60.0) < apparent(MATERIALS["ceramic"], 0.1, 50.0, 20.0, 60.0) - 5.0
    values = np.random.default_rng(0).random((9, 7))
    assert blur(values, 2).std() < values.std() and np.allclose(blur(np.ones((5, 5)), 3), 1.0)


def test_a_finished_or_another_corpus_is_not_overwritten(finished: BindCorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finished corpus"):
        make_bound_corpus(finished)
    other = config_of(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({**other.identity, "clutter": 9}))
    with pytest.raises(ValueError, match="clutter was 9, is 3"):
        make_bound_corpus(other)


def test_another_sensors_range_is_refused(finished: BindCorpusConfig, tmp_path: Path) -> None:
    values = json.loads((finished.root / "manifest.json").read_text())
    values["sensors"]["depth"]["high"] = 9.0
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="differs in.*depth"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match="vla corpus --bind"):
        read_manifest(tmp_path / "none")


WRONG_SETTINGS = [({"image_size": 30}, "multiple of 8"), ({"contrast": 2.0}, "from 0 to 1"), ({"samples": 0}, "at least 1")]


@pytest.mark.parametrize(("changes", "message"), WRONG_SETTINGS)
def test_wrong_settings_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **changes)


def test_every_class_is_in_one_kind_of_split() -> None:
    assert sorted(label for split in (TRAIN, UNSEEN) for label, _ in bodies_of(split)) == list(range(len(BODIES)))
    assert [body.is_seen for body in BODIES] == sorted((body.is_seen for body in BODIES), reverse=True)  # unseen ones last
