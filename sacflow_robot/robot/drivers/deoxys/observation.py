"""From states of the arm, its gripper and the objects to an observation in the policy's world."""

from __future__ import annotations

import numpy as np

from sacflow_robot.errors import RobotError
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, split_part
from sacflow_robot.robot.drivers.deoxys.objects import Sighting
from sacflow_robot.robot.drivers.deoxys.states import ArmState, GripperState
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.rotations import Array, from_matrix, matrix_to_vector


class ObservationBuilder:
    """Makes observations, in which quaternions do not jump within an episode.

    Args:
        config: Where the arm stands in the policy's world, and what is observed.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        self.config = config
        self.begin()

    def begin(self) -> None:
        """Start an episode."""
        self._quaternion: Array | None = None
        self._before: tuple[ArmState, float] | None = None

    def commanded(self, arm: ArmState, closing: float) -> None:
        """Keep where the arm was when it was commanded, and the gripper's entry of the action."""
        self._before = arm, closing

    def measured(self, arm: ArmState) -> FloatArray | None:
        """Motion of the arm since the last command, as the action (7,) that would command it; None before the first."""
        if self._before is None:
            return None
        before, closing = self._before
        turned = matrix_to_vector(arm.rotation @ before.rotation.T)
        moved = np.concatenate([arm.position - before.position, turned]) / self.config.action_scale
        return np.append(moved, closing).astype(np.float32)

    def __call__(self, arm: ArmState, gripper: GripperState, sighting: Sighting | None) -> dict[str, FloatArray]:
        """The observation by its keys, float32.

        Raises:
            RobotError: A part of it is not to be had.
        """
        world = np.array(self.config.base_pos_in_world)
        eef = arm.position + arm.rotation @ np.array(self.config.eef_pos_in_ee) + world
        quaternion = from_matrix(arm.rotation)
        # q and -q are one rotation; without jumps within an episode.
        largest = quaternion[np.abs(quaternion).argmax()]
        if (largest if self._quaternion is None else quaternion @ self._quaternion) < 0:
            quaternion = -quaternion
        self._quaternion = quaternion
        arrays = {
            "robot0_eef_pos": eef,
            "robot0_eef_quat": quaternion,
            "robot0_gripper_qpos": np.array([gripper.width / 2, -gripper.width / 2]),
        }
        if self.config.joints:
            if arm.joints is None:
                raise RobotError("the arm's states have no joint positions (field q); drive it without joints=1")
            arrays["robot0_joint_pos"] = arm.joints
        if sighting is not None and self.config.object:
            arrays["object"] = np.concatenate([self._part(part, sighting, eef) for part in self.config.object])
        return {key: array.astype(np.float32) for key, array in arrays.items()}

    def _part(self, part: str, sighting: Sighting, eef: Array) -> Array:
        relative, name, what = split_part(part)
        if name not in sighting.poses:
            raise RobotError(f"the object {name!r} is not seen; seen are: {', '.join(sighting.poses) or 'none'}")
        pose = sighting.poses[name]
        if what == "quat":
            return pose[3:]
        position: Array = pose[:3] + np.array(self.config.base_pos_in_world)
        return position - eef if relative else position
