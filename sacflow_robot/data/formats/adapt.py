"""Episodes of another controller or control rate, converted to those of a task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import (
    AgreementOptions,
    Claims,
    action_scale,
    controller_of,
    same_rate,
    same_scale,
)
from sacflow_robot.data.formats.demonstrations import Losses
from sacflow_robot.data.formats.resample import resample
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.rotations import from_rotation_vector, multiply, rotation_between

Array = npt.NDArray[np.float64]

EEF_POS, EEF_QUAT = "robot0_eef_pos", "robot0_eef_quat"

_POSE_DIMS = 6
_NEAR_M = 0.15  # an absolute goal lies this near the pose that it moves from, in the median
_NEAR_RAD = 0.6
_TURNED_RAD = 1.8  # of an orientation from the identity, far enough to tell it from a delta's
_ACTIONS = ("action", "policy_action", "measured", "intervention_action")


def robot_of_file(claims: Claims, robot: RobotSpec) -> RobotSpec:
    """The task's robot with the rate and the action range of a file that is to be converted to it."""
    if claims.rate_hz is not None and not same_rate(claims.rate_hz, robot.control_rate_hz):
        robot = replace(robot, control_rate_hz=claims.rate_hz)
    controller = claims.controller
    if controller is None:
        return robot
    bounds = controller.inputs
    if controller.delta is False and controller_of(robot).delta:
        bounds = -math.inf, math.inf
    if bounds is not None:
        low, high = ((bound,) * min(_POSE_DIMS, robot.action_dim) for bound in bounds)
        robot = replace(
            robot, action_low=low + robot.action_low[_POSE_DIMS:], action_high=high + robot.action_high[_POSE_DIMS:]
        )
    return robot


def adapt(episode: Episode, claims: Claims, robot: RobotSpec, options: AgreementOptions, losses: Losses) -> Episode:
    """The episode as the task's controller and rate would have it; the same one where the file agrees.

    Args:
        episode: One that :func:`robot_of_file` describes.
        claims: What its file says; ``check_agreement`` has let it pass.
        robot: The task's.
        options: What may be converted.
        losses: Takes the remarks.

    Raises:
        DataError: It cannot be converted.
    """
    if options.controller_map and claims.controller is not None:
        if claims.controller.delta is False and controller_of(robot).delta:
            episode = _to_deltas(episode, robot, losses)
        elif not same_scale(claims.controller, robot):
            episode = _rescaled(episode, claims, robot, losses)
    if options.resample and claims.rate_hz is not None and not same_rate(claims.rate_hz, robot.control_rate_hz):
        episode = resample(episode, claims.rate_hz, robot, losses)
    return episode


def follows_poses(actions: FloatArray, observations: dict[str, FloatArray]) -> bool:
    """Return True if actions (T, A) are absolute end-effector poses: their orientations follow the robot's (T + 1 rows).

    A gripper that points down is half a turn from the identity, and a delta is near it, so that the two cannot be
    confused; positions need not be in the observations' frame.
    """
    if EEF_QUAT not in observations or actions.shape[1] < _POSE_DIMS:
        return False
    quats = observations[EEF_QUAT][:-1].astype(np.float64)
    if not (np.abs(np.linalg.norm(quats, axis=1) - 1) < 0.1).all():
        return False
    away = 2 * np.arccos(np.clip(np.abs(quats[:, 3]), 0, 1))
    _, turns = _nearest_turns(actions, quats)
    return bool(np.median(away) > _TURNED_RAD and np.median(np.linalg.norm(turns, axis=1)) < _NEAR_RAD)


def _nearest_turns(actions: FloatArray, quats: npt.NDArray[np.floating[Any]]) -> tuple[int, Array]:
    """Rotation vectors (T, 3) from the poses' orientations x y z w (T, 4) to the goals' (``actions[:, 3:6]``).

    robosuite's goals are of the gripper's grip site, the observed orientation is of the hand that carries it: a quarter
    turn about the tool's axis apart. So all quarter turns are tried, and the nearest is taken.
    """
    goals = from_rotation_vector(actions[:, 3:_POSE_DIMS].astype(np.float64))
    turns = []
    for quarter in range(4):
        about_tool = from_rotation_vector(np.array([[0, 0, quarter * np.pi / 2]]))
        site = multiply(quats.astype(np.float64), np.repeat(about_tool, len(quats), axis=0))
        turns.append(rotation_between(site, goals))
    nearest = int(np.argmin([np.median(np.linalg.norm(each, axis=1)) for each in turns]))
    return nearest, turns[nearest]


def _to_deltas(episode: Episode, robot: RobotSpec, losses: Losses) -> Episode:
    """Absolute goals as deltas from the pose that the robot had; robosuite's controller takes either to the same goal."""
    scale = np.array(action_scale(robot) or (), np.float64)[:_POSE_DIMS]
    for key in (EEF_POS, EEF_QUAT):
        if key not in episode.observations:
            raise DataError(
                f"absolute actions become deltas by the poses of the robot, and no observation {key!r} is there"
            )
    if len(scale) < _POSE_DIMS:
        raise DataError(
            f"the actions' units are not known ({', '.join(robot.action_units)}), so poses cannot become deltas"
        )
    position, quat = (episode.observations[key][:-1] for key in (EEF_POS, EEF_QUAT))
    converted: dict[str, Any] = {}
    for name in _ACTIONS:
        actions = getattr(episode, name)
        if actions is None or np.isnan(actions).all():
            continue
        moves = actions[:, :3] - position
        turns = _nearest_turns(actions, quat)[1]
        away = float(np.median(np.linalg.norm(moves, axis=1)))
        turned = float(np.median(np.linalg.norm(turns, axis=1)))
        if away > _NEAR_M or turned > _NEAR_RAD:
            raise DataError(
                f"its absolute goals lie {away:.2g} m and {turned:.2g} rad from the robot's poses in the median; they are "
                f"expected in the frame of {EEF_POS}, as a position and a rotation vector"
            )
        deltas = np.concatenate([np.concatenate([moves, turns], axis=1) / scale, actions[:, _POSE_DIMS:]], axis=1)
        converted[name] = deltas.astype(np.float32)
    losses.remark("absolute goals became deltas from the robot's poses")
    return _bounded(replace(episode, **converted), robot, losses)


def _rescaled(episode: Episode, claims: Claims, robot: RobotSpec, losses: Losses) -> Episode:
    """Actions that command the same motion with another scale."""
    assert claims.controller is not None and claims.controller.scale is not None
    expected = action_scale(robot) or ()
    size = min(len(expected), len(claims.controller.scale))
    theirs, ours = (np.array(each[:size], np.float64) for each in (claims.controller.scale, expected))
    offset = np.array((claims.controller.offset or (0.0,) * size)[:size])
    converted: dict[str, Any] = {}
    for name in _ACTIONS:
        actions = getattr(episode, name)
        if actions is not None:
            motion = (actions[:, :size] * theirs + offset) / ours
            converted[name] = np.concatenate([motion, actions[:, size:]], axis=1).astype(np.float32)
    losses.remark("actions were rescaled to the task's controller")
    return _bounded(replace(episode, **converted), robot, losses)


def _bounded(episode: Episode, robot: RobotSpec, losses: Losses) -> Episode:
    """Clip the actions to the robot's range."""
    clipped = np.clip(episode.action, *robot.action_bounds)
    beyond = float((np.abs(clipped - episode.action) > 1e-4).any(axis=1).mean())
    if beyond:
        losses.remark("some converted actions are beyond the controller's range and are clipped")
    return replace(episode, action=clipped)
