"""Observation, success and state of the present ``mjData``."""

import math

import numpy as np

from sacflow_robot.envs.fast import step_data as kinds
from sacflow_robot.envs.fast.jit import compiled, kernel
from sacflow_robot.envs.fast.step_data import Floats, Memory, Plan, Reals, Views
from sacflow_robot.envs.robosuite_import import robosuite

_quat2mat = compiled(robosuite.utils.transform_utils.quat2mat)
_mat2quat = compiled(robosuite.utils.transform_utils.mat2quat)


@kernel
def _pose(position: Reals, quaternion: Reals) -> Floats:
    """robosuite's ``pose2mat``, upper three rows (3, 4), in its single precision; quaternion w x y z."""
    matrix = _quat2mat(np.array((quaternion[1], quaternion[2], quaternion[3], quaternion[0])))
    pose = np.empty((3, 4), np.float32)
    for i in range(3):
        for j in range(3):
            pose[i, j] = matrix[i, j]
        pose[i, 3] = position[i]
    return pose


@kernel
def _pose_in_grip(grip: Floats, pose: Floats, out: Floats) -> None:
    """Position and quaternion x y z w (7,) of one pose seen from another."""
    matrix = np.zeros((3, 3))
    for i in range(3):
        away = np.zeros(2)
        for k in range(3):
            across = np.float64(grip[k, i])
            for j in range(3):
                matrix[i, j] += across * np.float64(pose[k, j])
            away[0] += across * np.float64(pose[k, 3])
            away[1] += across * np.float64(grip[k, 3])
        out[i] = away[0] - away[1]
    quaternion = _mat2quat(matrix)
    for i in range(4):
        out[3 + i] = quaternion[i]


@kernel
def observe(views: Views, plan: Plan, out: Floats) -> None:
    """The flattened observation (D,) of the present state."""
    grip = views.site_position[plan.grip_site]
    turned = views.body_quaternion[plan.grip_body]
    for i in range(3):
        out[i] = grip[i]
    for i in range(4):
        out[3 + i] = turned[(i + 1) % 4]
    for i in range(2):
        out[7 + i] = views.qpos[plan.fingers[i]]
    at = 9
    for row in range(len(plan.terms)):
        kind, a, b = plan.terms[row, 0], plan.terms[row, 1], plan.terms[row, 2]
        size = 3
        if kind == kinds.BODY_QUATERNION:
            size = 4
            for i in range(4):
                out[at + i] = views.body_quaternion[a, (i + 1) % 4]
        elif kind == kinds.JOINT:
            size = 1
            out[at] = views.qpos[a]
        elif kind == kinds.POSE_IN_GRIP:
            size = 7
            pose = _pose(views.body_position[a], views.body_quaternion[a])
            _pose_in_grip(_pose(grip, turned), pose, out[at : at + 7])
        else:
            for i in range(3):
                if kind == kinds.BODY_POSITION:
                    out[at + i] = views.body_position[a, i]
                elif kind == kinds.BODY_FROM_GRIP:
                    out[at + i] = views.body_position[a, i] - grip[i]
                elif kind == kinds.BODY_FROM_BODY:
                    out[at + i] = views.body_position[a, i] - views.body_position[b, i]
                elif kind == kinds.SITE_POSITION:
                    out[at + i] = views.site_position[a, i]
                else:
                    out[at + i] = views.site_position[a, i] - grip[i]
        at += size


@kernel
def at_goal(views: Views, plan: Plan) -> bool:
    """True if the object is where the task wants it; contacts are not checked."""
    if plan.goal_kind == 1:
        return bool(plan.goal_low[0] < views.qpos[plan.goal_id] < plan.goal_high[0])
    position = views.body_position[plan.goal_id]
    distance = 0.0
    for i in range(3):
        origin = views.body_position[plan.goal_body, i] if plan.goal_body >= 0 and i < 2 else 0.0
        if not plan.goal_low[i] < position[i] - origin < plan.goal_high[i]:
            return False
        away = views.site_position[plan.grip_site, i] - position[i]
        distance += away * away
    # robosuite's reaching reward, by which it tells whether the gripper has let go
    return not plan.goal_released or 1 - math.tanh(10.0 * math.sqrt(distance)) < 0.6


@kernel
def note(views: Views, plan: Plan, memory: Memory, observation: Floats, state: Reals) -> None:
    """The present observation (D,), and the present state (S,) except for the poses of placed bodies at its end."""
    observe(views, plan, observation)
    nq = len(views.qpos)
    state[0] = memory.time[0]
    for i in range(nq):
        state[1 + i] = views.qpos[i]
    for i in range(len(views.qvel)):
        state[1 + nq + i] = views.qvel[i]
