"""A robosuite arm's operational-space control: robosuite's law at a third of its MuJoCo passes.

robosuite 1.4 runs mj_forward twice before every mj_step and looks names up in Python each time. Here a substep is
mj_step1 (positions, velocities), the control law, mj_step2 (forces, integration). The law's matrix functions are
robosuite's own. With the two passes put back, trajectories equal robosuite's bit for bit; without them the constraint
solver starts from another guess, which moves joints by 1e-12 until contacts amplify it (tests/test_environments.py).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ArmReading:
    """What the control law needs of the arm at one instant; world frame, J joints."""

    position: np.ndarray  # [3] m, grip site
    rotation: np.ndarray  # [3, 3]
    velocity: np.ndarray  # [3] m/s
    angular_velocity: np.ndarray  # [3] rad/s
    jacobian_position: np.ndarray  # [3, J]
    jacobian_rotation: np.ndarray  # [3, J]
    mass: np.ndarray  # [J, J]
    joint_position: np.ndarray  # [J] rad
    joint_velocity: np.ndarray  # [J] rad/s


class OperationalSpaceControl:
    """Steps one robosuite environment that has a single arm under OSC_POSE with fixed gains and delta goals."""

    def __init__(self, environment: Any):
        """environment: a robosuite or LIBERO environment, reset at least once."""
        self._environment = environment
        self._model = environment.sim.model._model
        self._data = environment.sim.data._data
        robot = environment.robots[0]
        self._robot = robot
        self._site = robot.eef_site_id
        self._arm_actuators = np.array(robot._ref_joint_actuator_indexes)
        self._gripper_actuators = np.array(robot._ref_joint_gripper_actuator_indexes)
        control_range = self._model.actuator_ctrlrange
        self._torque_low, self._torque_high = control_range[self._arm_actuators].T
        gripper_low, gripper_high = control_range[self._gripper_actuators].T
        self._gripper_centre = 0.5 * (gripper_high + gripper_low)
        self._gripper_half = 0.5 * (gripper_high - gripper_low)
        num_dofs = self._model.nv
        self._jacobian_position, self._jacobian_rotation = np.zeros((3, num_dofs)), np.zeros((3, num_dofs))
        self._mass = np.zeros((num_dofs, num_dofs))
        self.reset()

    def reset(self) -> None:
        """Take goals and nullspace posture from the robot, which robosuite has just reset; open the gripper's memory.

        The gripper integrates its command in `current_action`, which robosuite forgets only when it rebuilds the model.
        robosuite's controller reads the arm when it is built, before the fingers and any stored state are set, and
        does not look again until it has run once; the first substep after a reset repeats that.
        """
        controller = self._robot.controller
        self._law = controller
        self._qpos, self._qvel = controller.qpos_index, controller.qvel_index
        self._goal_position, self._goal_rotation = controller.goal_pos, controller.goal_ori
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
        self._first_reading: ArmReading | None = ArmReading(
            controller.ee_pos,
            controller.ee_ori_mat,
            controller.ee_pos_vel,
            controller.ee_ori_vel,
            controller.J_pos,
            controller.J_ori,
            controller.mass_matrix,
            controller.joint_pos,
            controller.joint_vel,
        )

    def look_again(self) -> None:
        """The arm was moved after `reset`: where it is now is what the first substep reads, and what it holds."""
        self._first_reading = None
        arm = self._read()
        self._goal_position, self._goal_rotation = arm.position, arm.rotation

    def substep(self, action: np.ndarray, new_goal: bool) -> None:
        """2 ms of physics under action [7]: pose delta in [-1, 1], gripper -1 open +1 close; new_goal once per action.

        Leaves positions in `data` as MuJoCo does, one substep older than qpos, which is also what robosuite observes.
        """
        import mujoco

        mujoco.mj_step1(self._model, self._data)
        self._apply(action, new_goal)
        mujoco.mj_step2(self._model, self._data)

    def _read(self) -> ArmReading:
        import mujoco

        if self._first_reading is not None:
            reading, self._first_reading = self._first_reading, None
            return reading
        data = self._data
        mujoco.mj_jacSite(self._model, data, self._jacobian_position, self._jacobian_rotation, self._site)
        mujoco.mj_fullM(self._model, self._mass, data.qM)
        return ArmReading(
            position=data.site_xpos[self._site].copy(),
            rotation=data.site_xmat[self._site].reshape(3, 3).copy(),
            velocity=np.dot(self._jacobian_position, data.qvel),
            angular_velocity=np.dot(self._jacobian_rotation, data.qvel),
            jacobian_position=np.array(self._jacobian_position[:, self._qvel]),
            jacobian_rotation=np.array(self._jacobian_rotation[:, self._qvel]),
            mass=self._mass[self._qvel, :][:, self._qvel],
            joint_position=data.qpos[self._qpos],
            joint_velocity=data.qvel[self._qvel],
        )

    def _apply(self, action: np.ndarray, new_goal: bool) -> None:
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        data, law, arm = self._data, self._law, self._read()
        if new_goal:
            self._set_goal(action[:6], arm)
        force = (self._goal_position - arm.position) * law.kp[:3] - arm.velocity * law.kd[:3]
        rotation_error = orientation_error(self._goal_rotation, arm.rotation)
        torque = rotation_error * law.kp[3:] - arm.angular_velocity * law.kd[3:]
        jacobian = np.vstack([arm.jacobian_position, arm.jacobian_rotation])
        _, inertia_position, inertia_rotation, nullspace = opspace_matrices(
            arm.mass, jacobian, arm.jacobian_position, arm.jacobian_rotation
        )
        wrench = np.concatenate([np.dot(inertia_position, force), np.dot(inertia_rotation, torque)])
        torques = np.dot(jacobian.T, wrench) + data.qfrc_bias[self._qvel]
        torques += nullspace_torques(arm.mass, nullspace, law.initial_joint, arm.joint_position, arm.joint_velocity)
        data.ctrl[self._arm_actuators] = np.clip(torques, self._torque_low, self._torque_high)
        fingers = self._robot.gripper.format_action(action[6:7])
        data.ctrl[self._gripper_actuators] = self._gripper_centre + self._gripper_half * fingers

    def _set_goal(self, delta: np.ndarray, arm: ArmReading) -> None:
        from robosuite.utils.control_utils import set_goal_orientation

        scaled = self._law.scale_action(delta)
        if np.any(scaled[3:] != 0.0):  # without a turn the orientation goal stays where it was
            self._goal_rotation = set_goal_orientation(scaled[3:], arm.rotation)
        self._goal_position = arm.position + scaled[:3]
