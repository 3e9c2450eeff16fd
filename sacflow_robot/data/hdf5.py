"""Demonstrations from HDF5 files: raw robosuite, robomimic low-dim, and robomimic's layout as written here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from sacflow_robot.data.demos import (
    OBSERVATION_COLUMNS,
    OPTIONAL,
    STEP_COLUMNS,
    DemoOptions,
    DemoSet,
    Losses,
    human_episode,
)
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError, one_line
from sacflow_robot.spec import ArmSpec, FloatArray

OURS = "sacflow_robot"
"""Attribute of ``data`` in files written here: JSON with the arm. Such files hold whole episodes."""

# An idle step commands no motion, leaves the gripper's command alone, and no finger moves by more than this (m). The arm
# may coast: under delta control that is the tail of an earlier command, and says nothing about what to do next.
_STILL = 1e-3
_FINGERS = slice(8, 10)  # in a state: time, 7 arm joints, 2 fingers, ...
_ARM_DIMS = 6

_SAME_PLACE = 0.03  # m; observations may lag behind each other by a physics step

# What h5py and numpy raise on a file that is damaged or something else.
_UNREADABLE = (OSError, KeyError, RuntimeError, AttributeError, TypeError, ValueError, IndexError)


class Header(NamedTuple):
    """What a file says about its task.

    Attributes:
        env_name: robosuite's name of the task, if the file names one.
        arm: The arm, if the file was written here.
    """

    env_name: str | None
    arm: ArmSpec | None


def read_header(path: Path) -> Header:
    """Which task the file holds demonstrations of.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with h5py.File(path, "r") as file:
            data = _demonstrations(file, path)
            return Header(_env_name(path, data), _arm(data))
    except _UNREADABLE as error:
        raise _incomplete(path, error) from None


def read_hdf5(path: Path, options: DemoOptions) -> DemoSet:
    """Every demonstration of a raw robosuite file (states and actions) or a robomimic low-dim file (observations too).

    Raises:
        DataError: The file cannot be read, is of another task, or its arrays do not fit.
        SpecMismatchError: The file was written here, of another arm.
    """
    try:
        with h5py.File(path, "r") as file:
            data = _demonstrations(file, path)
            arm = _arm(data)
            if arm is None:
                _check_task(path, _env_name(path, data), options.env_name)
            elif different := options.arm.differences(arm):
                raise SpecMismatchError(f"{path} does not fit (expected, found): {'; '.join(different)}")
            losses, episodes, names = Losses(), [], sorted(data, key=_demo_number)
            for name in names:
                demo, origin = data[name], f"{path}, {name}"
                if "actions" not in demo:
                    raise DataError(f"{origin} has no actions; expected a robosuite or robomimic file")
                read = _ours if arm is not None else _robomimic if "obs" in demo else _raw
                try:
                    episode = read(demo, options, origin, losses)
                except DataError as error:
                    raise error if str(error).startswith(origin) else DataError(f"{origin}: {error}") from None
                episode.check_fits(options.arm, origin)
                episodes.append(episode)
            model_files = [_text(data[name].attrs.get("model_file")) for name in names]
            return DemoSet(
                arm=options.arm,
                episodes=episodes,
                env_args=json.loads(data.attrs["env_args"]) if "env_args" in data.attrs else None,
                attributes=_attributes(data),
                masks=_masks(file, names),
                model_files=model_files if any(model_files) else [],
                losses=losses,
            )
    except _UNREADABLE as error:
        raise _incomplete(path, error) from None


def _incomplete(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as demonstrations ({one_line(error)}); is it complete?")


def _demonstrations(file: h5py.File, path: Path) -> h5py.Group:
    if not isinstance(file.get("data"), h5py.Group) or not len(file["data"]):
        raise DataError(f"{path} has no group 'data' with demonstrations; expected a robosuite or robomimic file")
    return file["data"]


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else None if value is None else str(value)


def _arm(data: h5py.Group) -> ArmSpec | None:
    return ArmSpec.from_dict(json.loads(data.attrs[OURS])["arm"]) if OURS in data.attrs else None


def _env_name(path: Path, data: h5py.Group) -> str | None:
    """Both layouts name the task: raw files in ``env``, robomimic's in the JSON ``env_args``."""
    if "env_args" not in data.attrs:
        return _text(data.attrs.get("env"))
    try:
        return str(json.loads(data.attrs["env_args"])["env_name"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: attribute env_args is not robomimic's JSON with an env_name") from None


def _attributes(data: h5py.Group) -> dict[str, Any]:
    """What else the file says about all of its demonstrations, such as a raw file's ``env_info``."""
    values = {key: value.decode() if isinstance(value, bytes) else value for key, value in data.attrs.items()}
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    return {k: v for k, v in plain.items() if isinstance(v, str | int | float) and k not in ("total", "env_args", OURS)}


def _check_task(path: Path, found: str | None, expected: str) -> None:
    if found is not None and found != expected:
        raise DataError(
            f"{path} holds demonstrations of {found!r}, not of {expected!r}; give demonstrations of the task"
        )


def _masks(file: h5py.File, names: list[str]) -> Mapping[str, list[int]]:
    """robomimic's named subsets, as indices of demonstrations."""
    index = {name: i for i, name in enumerate(names)}
    masks = file.get("mask", {})
    return {key: [index[name.decode()] for name in masks[key][()] if name.decode() in index] for key in masks}


def _raw(demo: h5py.Group, options: DemoOptions, origin: str, losses: Losses) -> Episode:
    """Regenerate observations from states.

    States are those *before* each action, and the one after the last action is not in the file, so the last action is
    left out.
    """
    if options.observe_state is None:
        raise DataError(
            f"{origin} has no observations; they can be regenerated where the simulator is installed ('sim')"
        )
    if "states" not in demo:
        raise DataError(f"{origin} has neither observations nor states; expected a robosuite or robomimic file")
    states, actions = np.asarray(demo["states"], np.float64), _actions(demo, options.arm, origin, losses)
    if states.ndim != 2 or states.shape[1] < 10 or not np.isfinite(states).all():
        raise DataError(f"{origin} has states of shape {states.shape}, or NaN among them; expected finite (T, S)")
    if len(states) != len(actions) or len(states) < 2:
        raise DataError(
            f"{origin} has {len(states)} states for {len(actions)} actions; expected as many, and at least 2"
        )
    losses.remark("each episode's last action is left out, for the state after it is not in the file")
    observed = [options.observe_state(state) for state in states]
    success = np.array([solved for _, solved in observed])
    rows = np.arange(len(states))
    if options.trim_idle:
        idle = np.append(_idle(actions[:-1], states[:, _FINGERS]), False)  # the last state is kept
        if solved := np.flatnonzero(success[1:])[:1].tolist():
            idle[solved[0] : solved[0] + 2] = False  # nor does the first success, or the step to it, get lost
        if idle[:-1].all():
            raise DataError(f"{origin} is idle throughout; leave it out")
        rows = rows[~idle]
    episode = human_episode(
        {a.key: np.stack([observed[i][0][a.key] for i in rows]) for a in options.arm.observations},
        actions[rows[:-1]],
        options.arm,
        rewards=success[rows[1:]].astype(np.float32),
        states=states[rows],
    )
    if success[0] and not episode.success:
        losses.remark("an episode begins solved")
    return episode


def _idle(actions: FloatArray, fingers: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which of T steps command nothing and move no finger; finger positions are (T + 1, 2)."""
    commands_motion = np.abs(actions[:, :_ARM_DIMS]).max(1) > 0
    gripper_changes = np.diff(actions[:, -1], prepend=actions[:1, -1]) != 0
    moves = np.abs(np.diff(fingers, axis=0)).max(1) > _STILL
    idle: npt.NDArray[np.bool_] = ~(commands_motion | gripper_changes | moves)
    return idle


def _robomimic(demo: h5py.Group, options: DemoOptions, origin: str, losses: Losses) -> Episode:
    actions = _actions(demo, options.arm, origin, losses)
    states = None
    if "states" in demo:
        before = demo["states"][()].astype(np.float64, copy=False)
        if before.ndim != 2 or len(before) != len(actions):
            raise DataError(f"{origin} has states of shape {before.shape} for {len(actions)} actions")
        states = np.concatenate([before, before[-1:]])
        losses.remark("the state after the last action is not in the file and repeats the one before it")
    if "dones" in demo and np.asarray(demo["dones"])[:-1].any():
        losses.leave_out("dones before the last step")
    known = {"actions", "states", "rewards", "dones", "obs", "next_obs"}
    losses.leave_out(*sorted(set(demo) - known))
    rewards = demo["rewards"][()] if "rewards" in demo else np.zeros(len(actions))
    if rewards.shape != (len(actions),):
        raise DataError(f"{origin}: rewards of shape {rewards.shape} for {len(actions)} actions")
    observations = _observations(demo, options.arm, origin, losses, len(actions))
    _turn_around(observations, losses)
    return human_episode(
        observations,
        actions,
        options.arm,
        rewards=losses.to_float32(rewards, "rewards"),
        states=states,
    )


def _turn_around(observations: dict[str, FloatArray], losses: Losses) -> None:
    """The cube's position relative to the gripper, where the file has the gripper's relative to the cube.

    robosuite turned it around with version 1.5 (Lift's gripper_to_cube_pos); a policy that learned from the one is blind
    with the other, and no shape tells. So the numbers themselves are asked.
    """
    cube, eef = observations.get("object"), observations.get("robot0_eef_pos")
    if cube is None or eef is None or cube.shape[1:] != (10,) or eef.shape[1:] != (3,):
        return
    offset, recorded = cube[:, :3] - eef, cube[:, 7:]
    if np.abs(recorded + offset).max() < _SAME_PLACE < np.abs(recorded - offset).max():
        cube[:, 7:] *= -1
        losses.remark("the gripper's position relative to the cube is turned around, as robosuite 1.5 has it")


def _ours(demo: h5py.Group, options: DemoOptions, origin: str, losses: Losses) -> Episode:
    """A whole episode, every column of it."""
    actions = _actions(demo, options.arm, origin, losses)
    columns: dict[str, Any] = {}
    for column in STEP_COLUMNS:
        if column.hdf5 in demo or column.attribute not in OPTIONAL:
            columns[column.attribute] = column.typed(demo[column.hdf5][()])
    for column in OBSERVATION_COLUMNS:
        if column.hdf5 in demo or column.attribute not in OPTIONAL:
            whole = np.concatenate([demo[column.hdf5][()], demo[f"last/{column.hdf5}"][()]])
            columns[column.attribute] = column.typed(whole)
    info = json.loads(demo.attrs["info"])
    observations = _observations(demo, options.arm, origin, losses, len(actions))
    return human_episode(observations, actions, options.arm, **columns, commanded=actions, info=info)


def _observations(demo: h5py.Group, arm: ArmSpec, origin: str, losses: Losses, steps: int) -> dict[str, FloatArray]:
    """The arm's observations (T + 1, ...) of a demonstration with groups ``obs`` and ``next_obs``."""
    observations = {}
    for spec in arm.observations:
        if spec.key not in demo["obs"]:
            keys = ", ".join(demo["obs"])
            raise DataError(f"{origin}: no observation {spec.key!r}, which task {arm.task!r} needs; it has {keys}")
        before = losses.to_float32(demo["obs"][spec.key], f"obs/{spec.key}")
        if len(before) != steps:
            raise DataError(f"{origin}: {len(before)} rows of {spec.key!r} for {steps} actions")
        after = before
        if "next_obs" in demo:
            after = losses.to_float32(demo["next_obs"][spec.key], f"obs/{spec.key}")
        else:
            losses.remark("the observation after the last action is not in the file and repeats the one before it")
        rows = np.concatenate([before, after[-1:]])
        observations[spec.key] = rows[:, None] if rows.ndim == 1 and spec.shape == (1,) else rows
    losses.leave_out(*(f"obs/{key}" for key in demo["obs"] if key not in observations))
    return observations


def _actions(demo: h5py.Group, arm: ArmSpec, origin: str, losses: Losses) -> FloatArray:
    """Actions (T, A) as recorded, beyond the controller's range if they were."""
    actions = losses.to_float32(demo["actions"], "actions")
    if actions.ndim != 2 or actions.shape[1] != arm.action_dim or not len(actions):
        raise DataError(f"{origin} has actions of shape {actions.shape}; task {arm.task!r} takes (T, {arm.action_dim})")
    if not np.isfinite(actions).all():
        raise DataError(f"{origin} has NaN or infinity among its actions; leave it out")
    return actions


def _demo_number(name: str) -> tuple[int, str]:
    digits = name.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else -1, name)
