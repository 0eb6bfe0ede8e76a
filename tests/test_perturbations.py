"""Laws of perturbations: seeds reproduce, severity 0 is the clean world, looks leave the simulation alone, tables refuse."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sim.perturbations.instruction import NOUNS, PLACES, VERBS, exchanged, paraphrase
from sim.perturbations.kinds import KINDS, SEVERITIES, PerturbConfig
from sim.perturbations.perturbed_environment import PerturbedEnvironment, perturbed
from sim.perturbations.picture import LABEL_HEIGHT, LABEL_WIDTH, PictureConfig, draw
from sim.perturbations.sensors import blurred
from sim.seeds import start
from sim.suites import build_environment
from tests.point_world import PointWorld

IMAGE_SIZE = 64
BEGIN = start("validation", 3)
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (4, 7))
WITHOUT_SIMULATOR = ("instruction", "noise", "state_noise", "blur")
NEED_SIMULATOR = tuple(kind for kind in KINDS if kind not in WITHOUT_SIMULATOR)


@pytest.fixture(scope="module")
def lift():
    pytest.importorskip("robosuite")
    environment = build_environment("robosuite_lift", image_size=IMAGE_SIZE)
    yield environment
    environment.close()


def episode(environment, begin=BEGIN, task: int = 0):
    """All that an episode shows: the simulation's states, and observations at its beginning and end."""
    environment.reset(task, begin)
    first, states = environment.observe(), []
    for action in ACTIONS:
        environment.step(action)
        data = environment.arm.data if hasattr(environment, "arm") else None
        states.append(environment.state() if data is None else np.concatenate([data.qpos, data.qvel, data.qacc_warmstart]))
    return np.array(states), (first, environment.observe())


def same(one, other) -> bool:
    return all(
        a.instruction == b.instruction
        and np.array_equal(a.state, b.state)
        and all(np.array_equal(a.images[camera], b.images[camera]) for camera in a.images)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def clean(lift):
    return episode(lift)


@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_is_the_clean_episode(lift, clean, kind: str):
    states, seen = episode(PerturbedEnvironment(lift, PerturbConfig(kind, 0)))
    assert np.array_equal(states, clean[0]) and same(seen, clean[1])


def test_a_drawn_posture_is_where_the_arm_stays_until_it_is_told_to_move(lift):
    environment = PerturbedEnvironment(lift, PerturbConfig("robot", 5))
    environment.reset(0, BEGIN)
    drawn = environment.state()[:3]
    lift.reset(0, BEGIN)
    assert np.linalg.norm(lift.state()[:3] - drawn) > 0.03
    environment.reset(0, BEGIN)
    for _ in range(3):
        environment.step(np.zeros(7))
    assert np.linalg.norm(environment.state()[:3] - drawn) < 0.005


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_and_looks_leave_the_simulation_alone(lift, clean, kind: str):
    environment = PerturbedEnvironment(lift, PerturbConfig(kind, 4))
    states, seen = episode(environment)
    assert not same(seen, clean[1]), "severity 4 shows something else"
    assert np.array_equal(states, clean[0]) != KINDS[kind].changes_simulation
    environment.reset(0, start("validation", 7))
    environment.reset(0, BEGIN)
    assert same([environment.observe()], seen[:1]), "whatever ran before"
    environment.restore()
    lift.reset(0, BEGIN)
    assert same([lift.observe()], clean[1][:1]), "the clean world is back"


@pytest.mark.parametrize("kind", ["camera", "light", "background", "blur"])
def test_pictures_change_more_with_severity(lift, clean, kind: str):
    changes = []
    for severity in (1, 5):
        environment = PerturbedEnvironment(lift, PerturbConfig(kind, severity))
        environment.reset(0, BEGIN)
        before, after = clean[1][0].images, environment.observe().images
        changes.append(np.mean([np.abs(after[name].astype(float) - before[name]) for name in after]))
        environment.restore()
    assert 0 < changes[0] < changes[1]


def test_different_starts_are_perturbed_differently(lift):
    environment = PerturbedEnvironment(lift, PerturbConfig("camera", 3))
    poses = []
    for index in (0, 1):
        environment.reset(0, start("validation", index))
        poses.append(lift.arm.camera_pose("base")[0])
    environment.restore()
    assert np.linalg.norm(poses[0] - poses[1]) > 0.005


def test_the_camera_on_the_hand_stays(lift):
    lift.reset(0, BEGIN)
    before = lift.arm.camera_pose("wrist")
    environment = PerturbedEnvironment(lift, PerturbConfig("camera", 5))
    environment.reset(0, BEGIN)
    after = lift.arm.camera_pose("wrist")
    environment.restore()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_late_observations_are_those_of_so_many_periods_ago(lift):
    periods = int(KINDS["latency"].magnitudes[2])
    lift.reset(0, BEGIN)
    seen = [lift.observe()]
    for action in ACTIONS:
        lift.step(action)
        seen.append(lift.observe())
    environment = PerturbedEnvironment(lift, PerturbConfig("latency", 2))
    environment.reset(0, BEGIN)
    late = [environment.observe()]
    for action in ACTIONS:
        environment.step(action)
        late.append(environment.observe())
    assert same(late, [seen[max(0, index - periods)] for index in range(len(seen))])


def test_a_moved_cube_stands_so_far_from_where_it_stood(lift):
    lift.reset(0, BEGIN)
    before = lift.world().bodies["cube"].position_w
    PerturbedEnvironment(lift, PerturbConfig("layout", 5)).reset(0, BEGIN)
    moved = lift.world().bodies["cube"].position_w - before
    assert np.hypot(*moved[:2]) == pytest.approx(KINDS["layout"].magnitudes[5], abs=0.002), moved
    assert -0.012 < moved[2] < 0.004, "it stands on the table, above which the start holds it by a centimetre"


@pytest.mark.parametrize("kind", WITHOUT_SIMULATOR)
@pytest.mark.parametrize("severity", [0, 5])
def test_kinds_without_a_simulator_work_on_any_world(kind: str, severity: int):
    world = PointWorld(image_size=64)
    states, seen = episode(world, task=1)
    perturbed_states, perturbed_seen = episode(perturbed(world, PerturbConfig(kind, severity)), task=1)
    assert np.array_equal(states, perturbed_states)
    assert same(seen, perturbed_seen) == (severity == 0)


@pytest.mark.parametrize("kind", NEED_SIMULATOR)
def test_kinds_that_need_a_simulator_say_so(kind: str):
    with pytest.raises(ValueError, match=f"'{kind}' changes the simulator's model; PointWorld has none"):
        perturbed(PointWorld(), PerturbConfig(kind, 1)).reset(0, BEGIN)


def test_unknown_kinds_and_severities_are_refused_with_the_list():
    with pytest.raises(ValueError, match="perturb.kind is 'fog'; allowed: none, camera, light, .*latency"):
        PerturbConfig("fog")
    with pytest.raises(ValueError, match="perturb.severity is 6; allowed: 0 to 5"):
        PerturbConfig("camera", 6)


def test_every_kind_has_a_magnitude_for_each_severity_and_they_grow():
    for kind, row in KINDS.items():
        assert len(row.magnitudes) == len(SEVERITIES) and row.magnitudes[0] == 0, kind
        assert list(row.magnitudes) == sorted(set(row.magnitudes)), kind


def test_the_documentation_lists_every_kind_and_magnitude():
    text = (Path(__file__).resolve().parents[1] / "docs" / "perturbations.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:6] for line in text.splitlines() if line.startswith("| ")}
    scale = {"layout": 100, "state_noise": 1000, "blur": 100}  # told in cm, mm, %
    for kind, row in KINDS.items():
        assert [float(cell) for cell in rows[kind]] == pytest.approx([scale.get(kind, 1) * m for m in row.magnitudes[1:]]), kind


INSTRUCTIONS = (
    "lift the red cube",
    "stack the red cube on the green cube",
    "pick up the milk and place it in the basket",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "open the top drawer and put the bowl inside",
    "turn on the stove and put the moka pot on it",
    "push the plate to the front of the stove",
    "put both the alphabet soup and the tomato sauce in the basket",
)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_a_paraphrase_differs_repeats_and_stays_short(level: int):
    for seed in range(20):
        said = [paraphrase(text, level, np.random.default_rng(seed)) for text in INSTRUCTIONS]
        assert said == [paraphrase(text, level, np.random.default_rng(seed)) for text in INSTRUCTIONS]
        assert all(new != old and len(new.split()) <= len(old.split()) + 4 for new, old in zip(said, INSTRUCTIONS))
        assert all("  " not in text and text == text.strip() for text in said)


def test_paraphrases_tell_all_tasks_of_libero_apart():
    pytest.importorskip("libero")
    from sim.libero import instruction_of, task_names

    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"):
        texts = {instruction_of(name) for name in task_names(suite)}
        for seed in range(5):
            for level in (1, 3, 5):
                assert len({paraphrase(text, level, np.random.default_rng(seed)) for text in texts}) == len(texts)


def test_a_place_is_not_looked_for_in_the_words_of_a_verb():
    """Else "switch on the stove" becomes "switch upon the stove"."""
    for word in (word for words in VERBS.values() for word in words):
        for seed, object_ in product(range(20), ("the stove", "it")):
            said = exchanged(f"{word} {object_}", PLACES, np.random.default_rng(seed))
            assert said == f"{word} {object_}"


def test_no_synonym_is_another_thing_of_the_table():
    synonyms = [word for words in NOUNS.values() for word in words]
    assert len(synonyms) == len(set(synonyms)) and not set(synonyms) & set(NOUNS)


def test_blur_keeps_a_flat_picture_and_spreads_a_point():
    flat = np.full((16, 16, 3), 77, np.uint8)
    assert np.array_equal(blurred(flat, 2.0), flat)
    point = np.zeros((33, 33, 3), np.uint8)
    point[16, 16] = 255
    for sigma, peak in ((1.0, 255 / (2 * np.pi)), (1.5, 255 / (2 * np.pi * 2.25))):
        assert blurred(point, sigma)[16, 16, 0] == pytest.approx(peak, abs=1.0), "a Gaussian's height"


def test_the_picture_has_a_tile_for_every_kind_and_severity():
    page = draw(PictureConfig(moves=2), PointWorld(IMAGE_SIZE), ("instruction", "noise", "blur"))
    assert page.shape == (LABEL_HEIGHT + 3 * 96, LABEL_WIDTH + 96 * len(SEVERITIES), 3)
    for strip in np.split(page[LABEL_HEIGHT:, LABEL_WIDTH:], 3):
        tiles = np.split(strip, len(SEVERITIES), axis=1)
        assert not np.array_equal(tiles[0], tiles[-1])
