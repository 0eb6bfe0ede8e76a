"""Laws of the shared pipeline (what training sees is what inference sees) and of rotations."""

import numpy as np
import pytest

from vla.data import ActionWindows, WindowMixture
from vla.frame_cache import FrameCache, FrameCacheWriter
from vla.interface import Observation, RobotSpec
from vla.normalization import Statistics
from vla.rotations import (
    axis_angle_from_matrix,
    axis_angle_from_quat_xyzw,
    matrix_from_axis_angle,
    matrix_from_quat_xyzw,
    quat_wxyz_from_xyzw,
    quat_xyzw_from_axis_angle,
    quat_xyzw_from_wxyz,
)
from vla.transforms import Transforms

SPEC = RobotSpec("toy", ("base", "wrist"), 8, ("x", "y"), ("dx", "grip"), (1,), 20.0)
RANDOM = np.random.default_rng(0)
LENGTH = 6
IMAGES = {camera: RANDOM.integers(0, 256, (LENGTH, 8, 8, 3), dtype=np.uint8) for camera in SPEC.cameras}
STATE = RANDOM.normal(size=(LENGTH, 2)).astype(np.float32)
TRANSFORMS = Transforms(SPEC, Statistics.of(STATE))


def observation(step: int, **changes) -> Observation:
    values = {"images": {c: IMAGES[c][step] for c in SPEC.cameras}, "state": STATE[step], "instruction": "Lift  the CUBE"}
    return Observation(**(values | changes))


def test_training_sees_what_inference_sees(tmp_path):
    with FrameCacheWriter(tmp_path / "cache", SPEC) as writer:
        writer.add_episode(IMAGES, STATE, STATE, instruction="Lift  the CUBE", task=0)
    windows = ActionWindows(FrameCache.open(tmp_path / "cache"), 4, cameras=SPEC.cameras)
    batch = TRANSFORMS.forward_batch(WindowMixture([windows]).gather(np.arange(LENGTH)))
    for step in range(LENGTH):
        inputs = TRANSFORMS.forward(observation(step))
        np.testing.assert_array_equal(batch.images[step], inputs.images)
        np.testing.assert_array_equal(batch.state[step], inputs.state)
        assert batch.instructions[step] == inputs.instruction == "lift the cube"
    one_camera = ActionWindows(FrameCache.open(tmp_path / "cache"), 4, cameras=["base"])
    with pytest.raises(ValueError, match="cameras="):
        TRANSFORMS.forward_batch(one_camera.gather(np.arange(2)))


def test_inverse_gives_the_observation_back():
    for step in range(LENGTH):
        back = TRANSFORMS.inverse(TRANSFORMS.forward(observation(step)))
        for camera in SPEC.cameras:
            np.testing.assert_array_equal(back.images[camera], IMAGES[camera][step])
        np.testing.assert_allclose(back.state, STATE[step], atol=1e-6)


def test_cameras_are_stacked_in_the_order_of_the_spec_whatever_the_dict():
    images = {camera: IMAGES[camera][0] for camera in reversed(SPEC.cameras)} | {"spare": IMAGES["base"][1]}
    np.testing.assert_array_equal(TRANSFORMS.forward(observation(0, images=images)).images[0], IMAGES["base"][0])


def test_what_an_observation_lacks_is_named():
    with pytest.raises(ValueError, match="lacks camera 'wrist'"):
        TRANSFORMS.forward(observation(0, images={"base": IMAGES["base"][0]}))
    with pytest.raises(ValueError, match="not finite"):
        TRANSFORMS.forward(observation(0, state=np.array([np.nan, 0], dtype=np.float32)))


# ------------------------------------------------------------------------------------------------------------- rotations


def axis_angles(angle: np.ndarray) -> np.ndarray:
    axis = RANDOM.normal(size=(len(angle), 3))
    return axis / np.linalg.norm(axis, axis=1, keepdims=True) * angle[:, None]


ANGLES = np.concatenate([RANDOM.uniform(0, np.pi, 200), [0.0, 1e-9, 1e-5, 1e-3, np.pi - 1e-6]])


def test_quaternion_and_matrix_roundtrips():
    vectors = axis_angles(ANGLES)
    np.testing.assert_allclose(axis_angle_from_matrix(matrix_from_axis_angle(vectors)), vectors, atol=1e-7)
    far = np.abs(ANGLES) > 1e-2  # 2 acos(w), robosuite's formula, loses half the digits near the identity
    back = axis_angle_from_quat_xyzw(quat_xyzw_from_axis_angle(vectors))
    np.testing.assert_allclose(back[far], vectors[far], atol=1e-9)
    np.testing.assert_allclose(back, vectors, atol=5e-8)


def test_matrices_are_rotations_and_match_rodrigues():
    vectors = axis_angles(ANGLES)
    matrices = matrix_from_axis_angle(vectors)
    np.testing.assert_allclose(matrices @ np.swapaxes(matrices, 1, 2), np.tile(np.eye(3), (len(ANGLES), 1, 1)), atol=1e-12)
    for vector, matrix, angle in zip(vectors, matrices, ANGLES, strict=True):
        x, y, z = vector / max(angle, 1e-300)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        rodrigues = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        np.testing.assert_allclose(matrix, rodrigues, atol=1e-9)


def test_opposite_quaternions_are_one_rotation_but_two_vectors():
    quat = quat_xyzw_from_axis_angle(np.array([0.3, -0.2, 0.5]))
    np.testing.assert_allclose(matrix_from_quat_xyzw(-quat), matrix_from_quat_xyzw(quat), atol=1e-15)
    angle = np.linalg.norm(axis_angle_from_quat_xyzw(-quat))
    assert angle == pytest.approx(2 * np.pi - np.linalg.norm([0.3, -0.2, 0.5]))


def test_quaternion_orders_are_inverse():
    quat_wxyz = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert quat_xyzw_from_wxyz(quat_wxyz).tolist() == [[2.0, 3.0, 4.0, 1.0]]
    np.testing.assert_array_equal(quat_wxyz_from_xyzw(quat_xyzw_from_wxyz(quat_wxyz)), quat_wxyz)
