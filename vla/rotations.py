"""Rotations: quaternions (every name says wxyz or xyzw), axis-angle vectors, matrices. Batched over leading axes, numpy.

Axis-angle is the rotation axis times the angle in radians. Matrices rotate column vectors.
"""

import numpy as np


def quat_xyzw_from_wxyz(quat_wxyz: np.ndarray) -> np.ndarray:
    """MuJoCo's order [..., 4] to robosuite's and scipy's."""
    return np.roll(quat_wxyz, -1, axis=-1)


def quat_wxyz_from_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    return np.roll(quat_xyzw, 1, axis=-1)


def axis_angle_from_quat_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3] with angle 2 acos(w) in [0, 2 pi], of unit quaternions [..., 4].

    q and -q give different vectors (angles a and 2 pi - a about opposite axes): robosuite does not flip the sign either,
    and LIBERO's published states were recorded so.
    """
    quat_xyzw = np.asarray(quat_xyzw, dtype=np.float64)
    w = np.clip(quat_xyzw[..., 3:], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)  # of half the angle
    is_identity = sine < 1e-8
    return np.where(is_identity, 0.0, quat_xyzw[..., :3] * 2.0 * np.arccos(w) / np.where(is_identity, 1.0, sine))


def quat_xyzw_from_axis_angle(axis_angle: np.ndarray) -> np.ndarray:
    """Unit quaternion [..., 4] of an axis-angle vector [..., 3]."""
    axis_angle = np.asarray(axis_angle, dtype=np.float64)
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    # sin(angle / 2) / angle, by numpy's sinc(x) = sin(pi x) / (pi x), is smooth at zero
    return np.concatenate([axis_angle * np.sinc(angle / (2 * np.pi)) / 2, np.cos(angle / 2)], axis=-1)


def matrix_from_quat_xyzw(quat_xyzw: np.ndarray) -> np.ndarray:
    """Rotation matrix [..., 3, 3] of a unit quaternion [..., 4]."""
    x, y, z, w = np.moveaxis(np.asarray(quat_xyzw, dtype=np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_from_axis_angle(axis_angle: np.ndarray) -> np.ndarray:
    """Rotation matrix [..., 3, 3] of an axis-angle vector [..., 3]."""
    return matrix_from_quat_xyzw(quat_xyzw_from_axis_angle(axis_angle))


def axis_angle_from_matrix(matrix: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3] with angle in [0, pi] of rotation matrices [..., 3, 3].

    Through the quaternion as the eigenvector of a symmetric 4 x 4 matrix (Bar-Itzhack 2000), which is accurate at every
    angle, pi included, and tolerates a matrix that is only nearly a rotation.
    """
    m = np.asarray(matrix, dtype=np.float64)
    k = np.empty((*m.shape[:-2], 4, 4))
    k[..., :3, :3] = m + np.swapaxes(m, -1, -2)
    trace = np.trace(m, axis1=-2, axis2=-1)
    for axis in range(3):
        k[..., axis, axis] -= trace
    skew = np.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], axis=-1)
    k[..., :3, 3] = k[..., 3, :3] = skew
    k[..., 3, 3] = trace
    quat_xyzw = np.linalg.eigh(k)[1][..., -1]  # eigenvalues ascend
    return axis_angle_from_quat_xyzw(np.where(quat_xyzw[..., 3:] < 0, -quat_xyzw, quat_xyzw))


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Matrix [3, 3] of a turn by `angle` rad about one unit axis [3], by Rodrigues' formula; exactly the identity at angle 0."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
