"""Plan of the compiled step for a task, read from the environment that robosuite built."""

from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.fast import step_data as kinds
from sacflow_robot.envs.fast.step_data import ARM, Plan
from sacflow_robot.spec import Array


class NotCoveredError(Exception):
    """The compiled step does not cover this; the message says why."""


def _terms_of(suite: Any, task: str) -> list[tuple[int, int, int]]:
    """Terms of the observation ``object`` of a task: kind and ids."""
    if task == "lift":
        cube = suite.cube_body_id
        return [(kinds.BODY_POSITION, cube, 0), (kinds.BODY_QUATERNION, cube, 0), (kinds.BODY_FROM_GRIP, cube, 0)]
    if task == "stack":
        a, b = suite.cubeA_body_id, suite.cubeB_body_id
        return [
            *((kind, cube, 0) for cube in (a, b) for kind in (kinds.BODY_POSITION, kinds.BODY_QUATERNION)),
            (kinds.BODY_FROM_BODY, b, a),
            (kinds.BODY_FROM_GRIP, a, 0),
            (kinds.BODY_FROM_GRIP, b, 0),
        ]
    if task in ("can", "square"):
        body = suite.obj_body_id[_used_object(suite)]
        return [(kind, body, 0) for kind in (kinds.POSE_IN_GRIP, kinds.BODY_POSITION, kinds.BODY_QUATERNION)]
    if task == "door":
        door, handle = suite.object_body_ids["door"], suite.door_handle_site_id
        return [
            (kinds.BODY_POSITION, door, 0),
            (kinds.SITE_POSITION, handle, 0),
            (kinds.JOINT, suite.hinge_qpos_addr, 0),
            (kinds.BODY_FROM_GRIP, door, 0),
            (kinds.SITE_FROM_GRIP, handle, 0),
            (kinds.JOINT, suite.handle_qpos_addr, 0),
        ]
    raise NotCoveredError(f"task {task!r} is new to it")


def _goal_of(suite: Any, task: str) -> dict[str, Any]:
    """The fields ``goal_...`` of a task's plan: robosuite's ``_check_success``."""
    low = np.full(3, -np.inf)
    high = np.full(3, np.inf)
    goal = {"goal_kind": 0, "goal_low": low, "goal_high": high, "goal_body": -1}
    goal |= {"goal_contacts": task == "stack", "goal_released": task in ("can", "square")}
    if task == "door":
        low[0] = 0.3
        return goal | {"goal_kind": 1, "goal_id": int(suite.hinge_qpos_addr)}
    if task == "lift":
        low[2] = suite.model.mujoco_arena.table_offset[2] + 0.04
        return goal | {"goal_id": int(suite.cube_body_id)}
    if task == "stack":
        low[2] = suite.table_offset[2] + 0.04
        return goal | {"goal_id": int(suite.cubeA_body_id)}
    goal["goal_id"] = int(suite.obj_body_id[_used_object(suite)])
    if task == "square":
        low[:2], high[:2], high[2] = -0.03, 0.03, suite.table_offset[2] + 0.05
        return goal | {"goal_body": int((suite.peg1_body_id, suite.peg2_body_id)[suite.nut_id])}
    number = suite.object_id
    corner = suite.bin2_pos[:2] - np.where([number in (0, 2), number < 2], suite.bin_size[:2] / 2, 0)
    low[:2], high[:2] = corner, corner + suite.bin_size[:2] / 2
    low[2], high[2] = suite.bin2_pos[2], suite.bin2_pos[2] + 0.1
    return goal


def make_plan(suite: Any, task: str) -> Plan:
    """The plan of a robosuite environment.

    Raises:
        NotCoveredError: It is controlled in another way than the compiled step.
    """
    robot, model = suite.robots[0], suite.sim.model._model
    _check_control(suite)
    part, gripper = (robot.composite_controller.part_controllers[name] for name in ("right", "right_gripper"))
    fingers = robot.gripper["right"]
    robot_of_dof = np.full(model.nv, -1)
    robot_of_dof[part.qvel_index] = np.arange(ARM)
    base_site = suite.sim.model.site_name2id(f"{part.naming_prefix}{part.part_name}_center")
    if model.body_weldid[model.site_bodyid[base_site]] != 0:
        raise NotCoveredError("the robot's base moves")
    return Plan(
        joints=_indices(part.qpos_index),
        dofs=_indices(part.qvel_index),
        robot_of_dof=_indices(robot_of_dof),
        dof_parent=_indices(model.dof_parentid),
        dof_mass=_indices(model.dof_Madr),
        motors=_indices(robot._ref_actuators_indexes_dict["right"]),
        finger_motors=_indices(robot._ref_actuators_indexes_dict["right_gripper"]),
        fingers=_indices(robot._ref_gripper_joint_pos_indexes["right"]),
        ctrl_low=_reals(model.actuator_ctrlrange[:, 0]),
        ctrl_high=_reals(model.actuator_ctrlrange[:, 1]),
        finger_bias=_reals(0.5 * (gripper.actuator_max + gripper.actuator_min)),
        finger_weight=_reals(0.5 * (gripper.actuator_max - gripper.actuator_min)),
        finger_speed=float(fingers.speed),
        kp=_reals(part.kp),
        kd=_reals(part.kd),
        input_low=_reals(part.input_min),
        input_high=_reals(part.input_max),
        input_middle=_reals((part.input_max + part.input_min) / 2.0),
        input_scale=_reals(abs(part.output_max - part.output_min) / abs(part.input_max - part.input_min)),
        output_middle=_reals((part.output_max + part.output_min) / 2.0),
        grip_site=int(robot.eef_site_id["right"]),
        grip_body=int(suite.sim.model.body_name2id(robot.robot_model.eef_name["right"])),
        base_site=int(base_site),
        substeps=round(suite.control_timestep / suite.model_timestep),
        timestep=float(model.opt.timestep),
        terms=_indices(_terms_of(suite, task)),
        **_goal_of(suite, task),
        armature_error=np.zeros(ARM),
        payload_mass=0.0,
        payload_center=np.zeros(3),
        torque_delay=0.0,
    )


def _check_control(suite: Any) -> None:
    robot = suite.robots[0]
    parts = dict(robot.composite_controller.part_controllers)
    if len(suite.robots) != 1 or list(parts) != ["right", "right_gripper"]:
        raise NotCoveredError("it moves one robot with a gripper, nothing else")
    arm, gripper = parts["right"], parts["right_gripper"]
    if type(arm).__name__ != "OperationalSpaceController" or type(gripper).__name__ != "SimpleGripController":
        raise NotCoveredError(f"controller {arm.name} with {type(gripper).__name__}")
    wanted = {
        "impedance_mode": "fixed", "input_type": "delta", "input_ref_frame": "base", "use_ori": True, "uncoupling": True,
        "interpolator_pos": None, "interpolator_ori": None, "position_limits": None, "orientation_limits": None,
        "lite_physics": True, "_goal_update_mode": "achieved", "joint_dim": ARM,
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(arm, name) != value:
            raise NotCoveredError(f"OSC_POSE with {name} {getattr(arm, name)}")
    unscaled = all((getattr(gripper, f"{side}_{end}") == sign).all()
                   for side in ("input", "output") for end, sign in (("min", -1), ("max", 1)))  # fmt: skip
    if not (unscaled and gripper.use_action_scaling and gripper.interpolator is None):
        raise NotCoveredError("a gripper controller with settings of its own")
    if type(robot.gripper["right"]).__name__ != "PandaGripper":
        raise NotCoveredError(f"gripper {type(robot.gripper['right']).__name__}")


def stacked_check(suite: Any, model: mujoco.MjModel) -> Callable[[mujoco.MjData], bool]:
    """Check for a model that cube A stands on cube B with the gripper open."""
    gripper = suite.robots[0].gripper["right"]

    def members(names: list[str]) -> npt.NDArray[np.bool_]:
        return np.isin(np.arange(model.ngeom), [model.geom(name).id for name in names])

    cube, other = members(suite.cubeA.contact_geoms), members(suite.cubeB.contact_geoms)
    left, right = (members(gripper.important_geoms[f"{side}_fingerpad"]) for side in ("left", "right"))

    def check(data: mujoco.MjData) -> bool:
        one, two = data.contact.geom.reshape(-1, 2).T

        def touch(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> bool:
            return bool(((a[one] & b[two]) | (b[one] & a[two])).any())

        return touch(cube, other) and not (touch(left, cube) and touch(right, cube))

    return check


def _used_object(suite: Any) -> str:
    """Name of the object that a task with several kinds uses."""
    if suite.single_object_mode != 2:
        raise NotCoveredError("several objects at once")
    return str(suite.obj_to_use)


def _indices(values: Any) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(values, np.int64)


def _reals(values: Any) -> Array:
    return np.ascontiguousarray(values, np.float64)
