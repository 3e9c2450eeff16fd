"""Demonstrations from robosuite's and robomimic's HDF5 files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode, Source
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import ArmSpec, FloatArray

ObserveState = Callable[[npt.NDArray[np.float64]], tuple[dict[str, FloatArray], bool]]
"""Observation and success flag of a full simulator state (S,)."""

# An idle step commands no motion, leaves the gripper's command alone, and no finger moves by more than this (m). The arm
# may coast: under delta control that is the tail of an earlier command, and says nothing about what to do next.
_STILL = 1e-3
_FINGERS = slice(8, 10)  # in a state: time, 7 arm joints, 2 fingers, ...
_ARM_DIMS = 6


@dataclass(frozen=True)
class Hdf5Options:
    """How to read a file.

    Attributes:
        arm: Arm and task that the demonstrations must fit.
        env_name: robosuite's name of the task, which the file must name.
        observe_state: Regenerates observations; needed for raw robosuite files.
        trim_idle: Drop idle steps of raw files, where keyboard teleoperation spends most of its time.
    """

    arm: ArmSpec
    env_name: str
    observe_state: ObserveState | None = None
    trim_idle: bool = True


def read_hdf5(path: Path, options: Hdf5Options) -> Iterator[Episode]:
    """Episodes of a raw robosuite file (states and actions) or a robomimic low-dim file (observations too).

    Raises:
        DataError: The file cannot be read, is of another task, or its arrays do not fit.
    """
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Group) or not len(file["data"]):
                raise DataError(
                    f"{path} has no group 'data' with demonstrations; expected a robosuite or robomimic file"
                )
            data = file["data"]
            _check_task(path, dict(data.attrs), options.env_name)
            for name in sorted(data, key=_demo_number):
                demo, origin = data[name], f"{path}, {name}"
                if "actions" not in demo:
                    raise DataError(f"{origin} has no actions; expected a robosuite or robomimic file")
                try:
                    episode = _robomimic(demo, options, origin) if "obs" in demo else _raw(demo, options, origin)
                except DataError as error:
                    raise error if str(error).startswith(origin) else DataError(f"{origin}: {error}") from None
                episode.check_fits(options.arm, origin)
                yield episode
    except (OSError, KeyError, RuntimeError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} cannot be read as demonstrations ({one_line(error)}); is it complete?") from None


def _check_task(path: Path, attributes: dict[str, Any], expected: str) -> None:
    """Both layouts name the task: raw files in ``env``, robomimic's in the JSON ``env_args``."""
    found = attributes.get("env")
    found = found.decode() if isinstance(found, bytes) else found
    if "env_args" in attributes:
        try:
            found = json.loads(attributes["env_args"])["env_name"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: attribute env_args is not robomimic's JSON with an env_name") from None
    if found is not None and str(found) != expected:
        raise DataError(
            f"{path} holds demonstrations of {found!r}, not of {expected!r}; give demonstrations of the task"
        )


def _raw(demo: h5py.Group, options: Hdf5Options, origin: str) -> Episode:
    """Regenerate observations from states.

    States are those *before* each action, and the one after the last action is not in the file, so the last action is
    left out. The task ends at its first success, as it does in the environment.
    """
    if options.observe_state is None:
        raise DataError(
            f"{origin} has no observations; they can be regenerated where the simulator is installed ('sim')"
        )
    if "states" not in demo:
        raise DataError(f"{origin} has neither observations nor states; expected a robosuite or robomimic file")
    states, actions = np.asarray(demo["states"], np.float64), _actions(demo, options.arm, origin)
    if states.ndim != 2 or states.shape[1] < 10 or not np.isfinite(states).all():
        raise DataError(f"{origin} has states of shape {states.shape}, or NaN among them; expected finite (T, S)")
    if len(states) != len(actions) or len(states) < 2:
        raise DataError(
            f"{origin} has {len(states)} states for {len(actions)} actions; expected as many, and at least 2"
        )
    observed = [options.observe_state(state) for state in states]
    successes = np.flatnonzero([success for _, success in observed][1:])
    steps = int(successes[0]) + 1 if len(successes) else len(states) - 1

    kept = np.arange(steps)
    if options.trim_idle:
        kept = kept[~_idle(actions[:steps], states[: steps + 1, _FINGERS])]
        if not len(kept):
            raise DataError(f"{origin} is idle throughout; leave it out")
    rows = np.append(kept, steps)
    return _episode(
        {a.key: np.stack([observed[i][0][a.key] for i in rows]) for a in options.arm.observations},
        actions[kept],
        success=bool(len(successes)),
        states=states[rows],
        arm=options.arm,
    )


def _idle(actions: FloatArray, fingers: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of T steps command nothing and move no finger; finger positions are (T + 1, 2)."""
    commands_motion = np.abs(actions[:, :_ARM_DIMS]).max(1) > 0
    gripper_changes = np.diff(actions[:, -1], prepend=actions[:1, -1]) != 0
    moves = np.abs(np.diff(fingers, axis=0)).max(1) > _STILL
    idle: npt.NDArray[np.bool_] = ~(commands_motion | gripper_changes | moves)
    return idle


def _robomimic(demo: h5py.Group, options: Hdf5Options, origin: str) -> Episode:
    actions = _actions(demo, options.arm, origin)
    observations = {}
    for spec in options.arm.observations:
        if spec.key not in demo["obs"]:
            keys = ", ".join(demo["obs"])
            raise DataError(
                f"{origin}: no observation {spec.key!r}, which task {options.arm.task!r} needs; it has {keys}"
            )
        before = np.asarray(demo["obs"][spec.key], np.float32)
        if len(before) != len(actions):
            raise DataError(f"{origin}: {len(before)} rows of {spec.key!r} for {len(actions)} actions")
        # Older files have no next_obs; the observation after the last action is then unknown and repeats the last one.
        after = np.asarray(demo["next_obs"][spec.key], np.float32) if "next_obs" in demo else before
        observations[spec.key] = np.concatenate([before, after[-1:]])
    rewards = np.asarray(demo["rewards"]) if "rewards" in demo else np.zeros(len(actions))
    if rewards.shape != (len(actions),):
        raise DataError(f"{origin}: rewards of shape {rewards.shape} for {len(actions)} actions")
    solved = np.flatnonzero(rewards > 0)
    steps = int(solved[0]) + 1 if len(solved) else len(actions)
    return _episode(
        {key: rows[: steps + 1] for key, rows in observations.items()},
        actions[:steps],
        success=bool(len(solved)),
        states=None,
        arm=options.arm,
    )


def _actions(demo: h5py.Group, arm: ArmSpec, origin: str) -> FloatArray:
    """Actions (T, A), clipped to the controller's range, which is what the controller did with them."""
    actions = np.asarray(demo["actions"], np.float32)
    if actions.ndim != 2 or actions.shape[1] != arm.action_dim or not len(actions):
        raise DataError(f"{origin} has actions of shape {actions.shape}; task {arm.task!r} takes (T, {arm.action_dim})")
    if not np.isfinite(actions).all():
        raise DataError(f"{origin} has NaN or infinity among its actions; leave it out")
    return np.clip(actions, *arm.action_bounds)


def _episode(
    observations: dict[str, FloatArray],
    actions: FloatArray,
    *,
    success: bool,
    states: npt.NDArray[np.float64] | None,
    arm: ArmSpec,
) -> Episode:
    steps = len(actions)
    last = np.arange(steps) == steps - 1
    return Episode(
        observations=observations,
        commanded=actions,
        proposed=actions,
        measured=np.full_like(actions, np.nan),
        source=np.full(steps, Source.HUMAN, np.uint8),
        rewards=(last & success).astype(np.float32),
        terminated=last & success,
        truncated=last & (not success),
        time_ns=np.round(np.arange(steps + 1) * 1e9 / arm.control_rate_hz).astype(np.int64),
        states=states,
        info={"success": success, "task": arm.task, "clock": "nominal control rate"},
    )


def _demo_number(name: str) -> tuple[int, str]:
    digits = name.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else -1, name)
