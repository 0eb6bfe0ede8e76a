"""Camera pose: fixed cameras orbit about the scene and turn; the camera on the hand, which is bolted on, stays."""

import numpy as np

from sim.environment import Environment
from sim.perturbations.effect import Effect, ModelChanges, arm_of, unit_vector
from sim.perturbations.views import refresh_views
from sim.suites import CAMERA_NAMES
from vla.rotations import rotation_about

TURN_SHARE = 0.3  # of the orbit's angle, by which the camera also turns about an axis of its own


class CameraPose(Effect):
    """Magnitude: degrees of the orbit about the middle of the scene's things."""

    def __init__(self, magnitude: float) -> None:
        super().__init__(magnitude)
        self._changes = ModelChanges()

    def undo(self) -> None:
        self._changes.undo()

    def begin(self, environment: Environment, generator: np.random.Generator) -> None:
        import mujoco

        arm, angle = arm_of(environment, "camera"), np.radians(self.magnitude)
        model = arm.model
        pivot = np.mean([body.position_w for body in environment.world().bodies.values()], axis=0)
        for camera in environment.spec.cameras:
            index = model.camera(CAMERA_NAMES.get(camera, camera)).id
            orbit = rotation_about(unit_vector(generator), angle)
            turn = rotation_about(unit_vector(generator), TURN_SHARE * angle)
            if model.cam_bodyid[index] != 0:
                continue
            position, quat_wxyz = self._changes.keep(model.cam_pos[index]), self._changes.keep(model.cam_quat[index])
            changed = np.zeros(4)
            mujoco.mju_mat2Quat(changed, (orbit @ matrix_of(quat_wxyz) @ turn).ravel())
            model.cam_pos[index] = position + (orbit - np.eye(3)) @ (position - pivot)
            model.cam_quat[index] = changed if angle else quat_wxyz  # a matrix and back would round
        refresh_views(arm)


def matrix_of(quat_wxyz: np.ndarray) -> np.ndarray:
    """[3, 3]"""
    import mujoco

    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quat_wxyz)
    return matrix.reshape(3, 3)
