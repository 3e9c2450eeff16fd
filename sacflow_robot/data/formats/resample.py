"""Episodes of another control rate, resampled to a task's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import controller_of
from sacflow_robot.data.formats.demonstrations import FIRST_SUCCESS, Losses
from sacflow_robot.episode import STEP_TIMES, Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.action_history import history_of, with_action_history

Array = npt.NDArray[np.float64]

# robosuite's OSC: stiffness in 1/s^2, critically damped. Its goal lies an action ahead of the pose that the robot has.
_STIFFNESS = 150.0


def resample(episode: Episode, from_hz: float, robot: RobotSpec, losses: Losses) -> Episode:
    """The episode at the task's control rate.

    Observations and states are interpolated at the new times. Actions are chosen so that the robot moves as it did; see
    :func:`_resampled_actions`.

    Raises:
        DataError: Nothing is known of how the robot's actions depend on the rate.
    """
    to_hz = robot.control_rate_hz
    steps = max(1, math.ceil(len(episode) * to_hz / from_hz - 1e-6))
    rows = np.minimum(np.arange(steps + 1) * from_hz / to_hz, len(episode))  # the new observations, in old rows
    near = np.minimum((np.arange(steps) + 0.5) * from_hz / to_hz, len(episode) - 0.5).astype(int)  # and the steps
    quaternions = {spec.key: spec.quaternions for spec in robot.observations}
    observations = {
        key: _interpolated(values, rows, quaternions.get(key, ())) for key, values in episode.observations.items()
    }
    columns: dict[str, Any] = {
        name: _resampled_actions(getattr(episode, name), rows, from_hz, robot)
        for name in ("action", "policy_action", "intervention_action")
        if getattr(episode, name) is not None
    }
    columns["action"] = np.clip(columns["action"], *robot.action_bounds)
    columns["measured"] = np.full_like(columns["action"], np.nan)
    unknown: dict[str, Any] = dict.fromkeys((*STEP_TIMES, "flags"))
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
        **unknown,
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
    """Rewards (K,) of what was reached within each new step; a success that lasts is one at every step.

    Args:
        rewards: Of the old steps (T,).
        rows: Ends of the new steps in old steps (K + 1,).
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
    share = (rows - before).reshape(-1, *(1,) * (values.ndim - 1))
    one, other = values[before].astype(np.float64), values[after].astype(np.float64)
    flat_one, flat_other = one.reshape(len(rows), -1), other.reshape(len(rows), -1)
    for start in quaternions:  # q and -q are one rotation
        part = slice(start, start + 4)
        flat_other[:, part] *= np.where((flat_one[:, part] * flat_other[:, part]).sum(1, keepdims=True) < 0, -1, 1)
    mixed = one + share * (flat_other.reshape(other.shape) - one)
    flat = mixed.reshape(len(rows), -1)
    for start in quaternions:
        part = slice(start, start + 4)
        flat[:, part] /= np.maximum(np.linalg.norm(flat[:, part], axis=1, keepdims=True), 1e-12)
    found: npt.NDArray[Any] = mixed.astype(values.dtype)
    return found


def _resampled_actions(actions: FloatArray, rows: Array, from_hz: float, robot: RobotSpec) -> FloatArray:
    """Actions (K, A) that move the robot as the old ones (T, A) did; ``rows`` (K + 1,) are the new steps' ends in old steps.

    An OSC_POSE delta puts the goal an action ahead of the pose that the robot has, so that it acts as a velocity command:
    half as many steps of twice the size would move it twice as fast. A new action is the mean of the old ones over
    its period, times a factor for the time that the goal stands still. Positions are interpolated, velocities averaged.
    """
    controller = controller_of(robot)
    gripper = np.array(["gripper" in name for name in robot.action_names], bool)
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
    middle = np.minimum((rows[:-1] + rows[1:]) / 2, len(actions) - 0.5).astype(int)
    new[:, gripper] = actions[middle][:, gripper]  # fingers are opened or closed, never half-way because of a mean
    return new.astype(np.float32)


def _means(actions: FloatArray, rows: Array) -> Array:
    """Means (K, A) of actions (T, A), each held for its step, between fractional rows (K + 1,)."""
    if np.isnan(actions).any():  # where nobody acted there is nothing to take a mean of
        held: Array = actions[np.minimum((rows[:-1] + rows[1:]) / 2, len(actions) - 0.5).astype(int)]
        return held.astype(np.float64)
    total = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions.astype(np.float64), axis=0)])
    at = np.stack([np.interp(rows, np.arange(len(total)), column) for column in total.T], axis=1)
    means: Array = np.diff(at, axis=0) / np.maximum(np.diff(rows), 1e-9)[:, None]
    return means


def _pace(rate_hz: float) -> float:
    """Steady speed, per unit of a constant action, of a critically damped robot whose goal is set anew at each step."""
    w, period = math.sqrt(_STIFFNESS), 1 / rate_hz
    decay = math.exp(-w * period)
    speed = w * w * period * decay / (1 - decay * (1 - w * period))
    return (1 - (1 + (w - speed) * period) * decay) / period
