"""robosuite's Panda, one physics step at a time: the plant of the simulated robot computer."""

from typing import Any

import mujoco
import numpy as np

from sacflow_robot.envs.fast.compilation import compiling
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.robosuite_import import robosuite
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import Array

# libfranka's end effector in the Franka Hand's frame (m), as the robot is configured with that hand; axes agree.
EE_IN_HAND = np.array([0.0, 0.0, 0.1034])


class PandaPlant:
    """A Panda before its task, driven by torques of robosuite's operational space controller at the physics' rate.

    Poses are of libfranka's end-effector frame in the frame of the robot's base: position (3,) in meters, rotation (3, 3).

    Args:
        task: A task with one Panda whose base axes are the world's.

    Raises:
        UnknownNameError: No such task.
    """

    def __init__(self, task: str) -> None:
        self._env = RobosuiteEnv(task, engine="stock")
        model = self._env.model
        self.step_s = float(model.opt.timestep)
        self._data = self._env.data
        self._robot = self._env._robot
        side = self._robot.arms[0]
        body = self._env._suite.sim.model.body_name2id
        self._hand = body(self._robot.robot_model.eef_name[side])
        self._grip_site = self._robot.eef_site_id[side]
        self._joints = np.array(self._robot._ref_joint_pos_indexes)
        self._velocities = np.array(self._robot._ref_joint_vel_indexes)
        self._fingers = np.array(self._robot._ref_gripper_joint_pos_indexes[side])
        self._motors = np.array(self._robot._ref_actuators_indexes_dict[side])
        self._finger_motors = np.array(self._robot._ref_actuators_indexes_dict[f"{side}_gripper"])
        self._low, self._high = model.actuator_ctrlrange.T
        self._side = side
        self._objects = {
            name.removesuffix("_main"): i
            for i in range(model.nbody)
            if (name := mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, i) or "").endswith("_main")
            and model.body_jntnum[i]
        }
        self.begin(0)
        # Numba compiles the controller at its first run, which takes seconds; a running robot must not pause for that.
        with compiling(robosuite.utils.control_utils.nullspace_torques):
            self.step()
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start the episode of this seed; the controller holds the robot where it is."""
        self._env.begin(seed)
        controller = self._robot.composite_controller
        controller.update_state()
        self._osc: Any = controller.part_controllers[self._side]
        self._osc.update(force=True)
        if not np.allclose(self._osc.origin_ori, np.eye(3)):
            raise UsageError("the twin needs a task in which the robot's base has the world's axes")
        hand = self._data.xmat[self._hand].reshape(3, 3)
        site = self._data.site_xmat[self._grip_site].reshape(3, 3)
        self._site_in_hand = hand.T @ site
        offset = self._data.site_xpos[self._grip_site] - self._data.xpos[self._hand]
        self._grip_in_ee = hand.T @ offset - EE_IN_HAND
        self.set_goal(*self.ee_pose())
        self.set_finger_width(float(self.finger_width()))

    @property
    def base_pos_in_world(self) -> Array:
        """Position of the robot's base (3,), m."""
        return np.array(self._osc.origin_pos)

    def set_stiffness(self, translational: Array, rotational: Array) -> None:
        """Set the controller's gains (3,), (3,) in 1/s^2, with critical damping."""
        self._osc.kp = np.concatenate([translational, rotational])
        self._osc.kd = 2 * np.sqrt(self._osc.kp)

    def set_goal(self, position: Array, rotation: Array) -> None:
        """Set the pose to which the controller pulls the end effector."""
        self._osc.goal_pos = position + rotation @ self._grip_in_ee
        self._osc.goal_ori = rotation @ self._site_in_hand

    def set_finger_width(self, width: float) -> None:
        """Set the distance between the fingers to which their motors pull (m)."""
        half = np.clip(width / 2, 0.0, 0.04)
        self._data.ctrl[self._finger_motors] = (half, -half)

    def step(self) -> None:
        """One step of the physics (2 ms)."""
        sim, data = self._env._suite.sim, self._data
        sim.step1()
        self._robot.composite_controller.update_state()
        torques = self._osc.run_controller()
        data.ctrl[self._motors] = np.clip(torques, self._low[self._motors], self._high[self._motors])
        sim.step2()

    def refresh(self) -> None:
        """Compute poses and contacts of the present state; changes nothing that the next step reads."""
        mujoco.mj_kinematics(self._env.model, self._data)
        mujoco.mj_collision(self._env.model, self._data)

    def ee_pose(self) -> tuple[Array, Array]:
        """Pose of the end effector in base."""
        rotation = self._data.xmat[self._hand].reshape(3, 3).copy()
        position = self._data.xpos[self._hand] + rotation @ EE_IN_HAND - self.base_pos_in_world
        return position, rotation

    def joints(self) -> tuple[Array, Array, Array]:
        """Joint positions (7,) rad, velocities (7,) rad/s, torques (7,) N m."""
        data = self._data
        return data.qpos[self._joints].copy(), data.qvel[self._velocities].copy(), data.ctrl[self._motors].copy()

    def finger_width(self) -> float:
        """Distance between the fingers (m)."""
        left, right = self._data.qpos[self._fingers]
        return float(left - right)

    def object_poses(self) -> dict[str, Array]:
        """Per movable object (7,): position in base (m), unit quaternion x y z w."""
        base, data = self.base_pos_in_world, self._data
        return {
            name: np.concatenate([data.xpos[i] - base, data.xquat[i][[1, 2, 3, 0]]])
            for name, i in self._objects.items()
        }

    def solved(self) -> bool:
        """True if the task is done."""
        return bool(self._env._suite._check_success())

    def close(self) -> None:
        self._env.close()
