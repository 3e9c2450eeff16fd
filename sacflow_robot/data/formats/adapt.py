"""Episodes of another controller or control rate, converted or resampled to those of a task.

What cannot be converted raises DataError.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
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
from sacflow_robot.data.formats.demonstrations import FIRST_SUCCESS, Losses, gripper_dimensions
from sacflow_robot.data.log.columns import STEP_COLUMNS
from sacflow_robot.episode import STEP_TIMES, Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.action_history import history_of, with_action_history
from sacflow_robot.utils.rotations import from_rotation_vector, multiply, rotation_between

Array = npt.NDArray[np.float64]

EEF_POS, EEF_QUAT = "robot0_eef_pos", "robot0_eef_quat"

_POSE_DIMS = 6
_NEAR_M = 0.15  # an absolute goal lies this near the pose that it moves from, in the median
_NEAR_RAD = 0.6
_TURNED_RAD = 1.8  # of an orientation from the identity, far enough to tell it from a delta's

# robosuite's OSC: stiffness in 1/s^2, critically damped. Its goal lies an action ahead of the pose that the robot has.
_STIFFNESS = 150.0


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
    """The episode as the task's controller and rate would have it; the same one where the file agrees."""
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
    turns = _nearest_turns(actions, quats)
    return bool(np.median(away) > _TURNED_RAD and np.median(np.linalg.norm(turns, axis=1)) < _NEAR_RAD)


def _nearest_turns(actions: FloatArray, quats: npt.NDArray[np.floating[Any]]) -> Array:
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
    return min(turns, key=lambda each: float(np.median(np.linalg.norm(each, axis=1))))


def _to_deltas(episode: Episode, robot: RobotSpec, losses: Losses) -> Episode:
    """Absolute goals as deltas from the pose that the robot had; robosuite's controller takes either to the same goal."""
    scale = np.array(action_scale(robot) or (), np.float64)[:_POSE_DIMS]
    if absent := [key for key in (EEF_POS, EEF_QUAT) if key not in episode.observations]:
        raise DataError(
            f"absolute actions become deltas by the poses of the robot, and no observation {absent[0]!r} is there"
        )
    if len(scale) < _POSE_DIMS:
        raise DataError(
            f"the actions' units are not known ({', '.join(robot.action_units)}), so poses cannot become deltas"
        )
    position, quat = (episode.observations[key][:-1] for key in (EEF_POS, EEF_QUAT))

    def convert(actions: FloatArray) -> Array:
        moves, turns = actions[:, :3] - position, _nearest_turns(actions, quat)
        away, turned = (float(np.median(np.linalg.norm(each, axis=1))) for each in (moves, turns))
        if away > _NEAR_M or turned > _NEAR_RAD:
            raise DataError(
                f"its absolute goals lie {away:.2g} m and {turned:.2g} rad from the robot's poses in the median; they are "
                f"expected in the frame of {EEF_POS}, as a position and a rotation vector"
            )
        return np.concatenate([np.concatenate([moves, turns], axis=1) / scale, actions[:, _POSE_DIMS:]], axis=1)

    return _converted(episode, convert, robot, losses, "absolute goals became deltas from the robot's poses")


def _rescaled(episode: Episode, claims: Claims, robot: RobotSpec, losses: Losses) -> Episode:
    """Actions that command the same motion with another scale."""
    assert claims.controller is not None and claims.controller.scale is not None
    expected = action_scale(robot) or ()
    size = min(len(expected), len(claims.controller.scale))
    theirs, ours = (np.array(each[:size], np.float64) for each in (claims.controller.scale, expected))
    offset = np.array((claims.controller.offset or (0.0,) * size)[:size])

    def convert(actions: FloatArray) -> Array:
        return np.concatenate([(actions[:, :size] * theirs + offset) / ours, actions[:, size:]], axis=1)

    return _converted(episode, convert, robot, losses, "actions were rescaled to the task's controller")


def _converted(
    episode: Episode, convert: Callable[[FloatArray], Array], robot: RobotSpec, losses: Losses, remark: str
) -> Episode:
    """The episode with all its actions (T, A) converted, and those sent clipped to the robot's range."""
    known = {column.attribute: getattr(episode, column.attribute) for column in STEP_COLUMNS if column.vector}
    found: dict[str, Any] = {
        name: convert(actions).astype(np.float32)
        for name, actions in known.items()
        if actions is not None and not np.isnan(actions).all()
    }
    losses.remark(remark)
    clipped = np.clip(found["action"], *robot.action_bounds)
    if (np.abs(clipped - found["action"]) > 1e-4).any():
        losses.remark("some converted actions are beyond the controller's range and are clipped")
    return replace(episode, **{**found, "action": clipped})


def resample(episode: Episode, from_hz: float, robot: RobotSpec, losses: Losses) -> Episode:
    """The episode at the task's control rate: observations and states are interpolated, and the robot moves as it did."""
    to_hz = robot.control_rate_hz
    steps = max(1, math.ceil(len(episode) * to_hz / from_hz - 1e-6))
    rows = np.minimum(np.arange(steps + 1) * from_hz / to_hz, len(episode))  # the new observations, in old rows
    near = np.minimum((np.arange(steps) + 0.5) * from_hz / to_hz, len(episode) - 0.5).astype(int)  # and the steps
    quaternions = {spec.key: spec.quaternions for spec in robot.observations}
    observations = {
        key: _interpolated(values, rows, quaternions.get(key, ())) for key, values in episode.observations.items()
    }
    columns: dict[str, Any] = dict.fromkeys((*STEP_TIMES, "flags"))
    for name in ("action", "policy_action", "intervention_action"):
        if (actions := getattr(episode, name)) is not None:
            columns[name] = _resampled_actions(actions, rows, from_hz, robot)
    columns["action"] = np.clip(columns["action"], *robot.action_bounds)
    columns["measured"] = np.full_like(columns["action"], np.nan)
    last = np.arange(steps) == steps - 1
    info = {key: value for key, value in episode.info.items() if key != FIRST_SUCCESS}
    if FIRST_SUCCESS in episode.info:
        solved = int(np.searchsorted(rows[1:] + 1e-6, episode.info[FIRST_SUCCESS] + 1))
        info |= {FIRST_SUCCESS: solved} if solved < steps - 1 else {}
    losses.remark(f"resampled from {from_hz:g} to {to_hz:g} Hz")
    losses.leave_out(*(name for name in (*STEP_TIMES, "flags") if getattr(episode, name) is not None))
    if not np.isnan(episode.measured).all():
        losses.leave_out("measured")
    resampled = replace(
        episode,
        observations=observations,
        **columns,
        source=episode.source[near],
        rewards=_resampled_rewards(episode.rewards, rows),
        terminated=last & episode.terminated[-1],
        truncated=last & episode.truncated[-1],
        time_ns=np.round(np.interp(rows, np.arange(len(episode) + 1), episode.time_ns)).astype(np.int64),
        states=None if episode.states is None else _interpolated(episode.states, rows, ()),
        info=info,
    )
    return with_action_history(resampled, history_of(robot))


def _resampled_rewards(rewards: FloatArray, rows: Array) -> FloatArray:
    """Rewards (K,) of what was reached within each new step, of those of the old ones (T,); a success lasts.

    ``rows`` (K + 1,) are the ends of the new steps, in old steps.
    """
    ended = np.floor(rows + 1e-6).astype(int)  # old steps that are over at each of the new observations
    sparse = bool(np.isin(rewards, (0, 1)).all())
    new = np.zeros(len(rows) - 1, np.float32)
    for k, (first, stop) in enumerate(pairwise(ended)):
        if first < stop:
            new[k] = rewards[first:stop].max() if sparse else rewards[first:stop].sum()
        elif sparse and stop:
            new[k] = rewards[stop - 1]
    return new


def _interpolated(values: npt.NDArray[Any], rows: Array, quaternions: tuple[int, ...]) -> npt.NDArray[Any]:
    """Values (T + 1, ...) at fractional rows (K,); counts and pixels are those of the nearest row."""
    if values.dtype.kind != "f":
        nearest: npt.NDArray[Any] = values[np.round(rows).astype(int)]
        return nearest
    before = np.minimum(rows.astype(int), len(values) - 1)
    after = np.minimum(before + 1, len(values) - 1)
    flat = values.reshape(len(values), -1).astype(np.float64)
    one, other = flat[before], flat[after]
    parts = [slice(start, start + 4) for start in quaternions]
    for part in parts:  # q and -q are one rotation
        other[:, part] *= np.where((one[:, part] * other[:, part]).sum(1, keepdims=True) < 0, -1, 1)
    mixed = one + (rows - before)[:, None] * (other - one)
    for part in parts:
        mixed[:, part] /= np.maximum(np.linalg.norm(mixed[:, part], axis=1, keepdims=True), 1e-12)
    found: npt.NDArray[Any] = mixed.reshape(len(rows), *values.shape[1:]).astype(values.dtype)
    return found


def _resampled_actions(actions: FloatArray, rows: Array, from_hz: float, robot: RobotSpec) -> FloatArray:
    """Actions (K, A) that move the robot as the old ones (T, A) did; ``rows`` (K + 1,) are the new steps' ends in old steps.

    An OSC_POSE delta puts the goal an action ahead of the pose that the robot has, so that it acts as a velocity command:
    half as many steps of twice the size would move it twice as fast. A new action is the mean of the old ones over
    its period, times a factor for the time that the goal stands still. Positions are interpolated, velocities averaged.
    """
    controller = controller_of(robot)
    gripper = gripper_dimensions(robot)
    if controller.kind == "OSC_POSE" and controller.delta:
        low, high = robot.action_bounds
        held = np.clip(actions, low, high)  # the controller clips before it acts
        new = _means(held, rows) * (_pace(from_hz) / _pace(robot.control_rate_hz))
    elif controller.kind is not None and controller.kind.endswith("velocity"):
        new = _means(actions, rows)
    elif controller.delta is False or (
        controller.kind is not None and controller.kind.endswith(("position", "positions"))
    ):
        ends = np.clip(rows[1:] - 1, 0, len(actions) - 1)  # a goal is due at the end of its step
        new = _interpolated(actions, ends, ())
    else:
        raise DataError(
            f"actions of controller {robot.controller!r} cannot be resampled, for nothing tells what they mean at another "
            f"rate; give demonstrations at {robot.control_rate_hz:g} Hz"
        )
    new[:, gripper] = actions[_middles(actions, rows)][
        :, gripper
    ]  # fingers are opened or closed, never half-way because of a mean
    return new.astype(np.float32)


def _means(actions: FloatArray, rows: Array) -> Array:
    """Means (K, A) of actions (T, A), each held for its step, between fractional rows (K + 1,)."""
    if np.isnan(actions).any():  # where nobody acted there is nothing to take a mean of
        return actions[_middles(actions, rows)].astype(np.float64)
    total = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions.astype(np.float64), axis=0)])
    means: Array = np.diff(_interpolated(total, rows, ()), axis=0) / np.maximum(np.diff(rows), 1e-9)[:, None]
    return means


def _middles(actions: FloatArray, rows: Array) -> npt.NDArray[np.int_]:
    """Number (K,) of the action that holds in the middle of each new step."""
    return np.minimum((rows[:-1] + rows[1:]) / 2, len(actions) - 0.5).astype(int)


def _pace(rate_hz: float) -> float:
    """Steady speed, per unit of a constant action, of a critically damped robot whose goal is set anew at each step."""
    w, period = math.sqrt(_STIFFNESS), 1 / rate_hz
    decay = math.exp(-w * period)
    speed = w * w * period * decay / (1 - decay * (1 - w * period))
    return (1 - (1 + (w - speed) * period) * decay) / period
