"""Demonstrations from HDF5 files: raw robosuite, robomimic low-dim, and robomimic's layout as written here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sacflow_robot.data.formats.adapt import EEF_QUAT, adapt, follows_poses, robot_of_file
from sacflow_robot.data.formats.agreement import (
    AgreementOptions,
    Claims,
    Controller,
    check_agreement,
    check_robot,
    controller_of,
    same_rate,
    same_robot,
)
from sacflow_robot.data.formats.checks import check_times
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, Losses
from sacflow_robot.data.formats.foreign_episodes import Outcome, judge_outcomes
from sacflow_robot.data.formats.hdf5_episodes import (
    check_rows,
    own_episode,
    raw_episode,
    read_rows,
    recorded_outcome,
    robomimic_episode,
)
from sacflow_robot.data.formats.hdf5_header import (
    OURS,
    describe,
    env_name,
    infer_robot,
    open_demonstrations,
    own_robot,
    said_claims,
    text_of,
)
from sacflow_robot.data.log.columns import OBSERVATION_COLUMNS, STEP_COLUMNS
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, one_line
from sacflow_robot.spec import RobotSpec

__all__ = ["describe", "infer_robot", "read", "write"]

_JOINT_COUNT = 7
_JOINTS = slice(1, 1 + _JOINT_COUNT)
_NEAR_JOINTS_RAD = 0.3  # a joint goal lies this near the joints that it moves from, in the median
_BENT_RAD = 1.5

_LOOKED_AT = 5  # demonstrations whose actions are looked at for what they mean
_BLOCK_BYTES = 16 << 20


def read(path: Path, options: DemoOptions) -> DemoSet:
    """Every demonstration of a raw robosuite file (states and actions) or a robomimic low-dim file (observations too)."""
    with open_demonstrations(path) as data:
        names = sorted(data, key=_demo_number)
        for name in names:
            if "actions" not in data[name]:
                raise DataError(f"{path}, {name} has no actions; expected a robosuite or robomimic file")
        found, losses, outcomes = own_robot(data), Losses(), {}
        if found is None:
            task = env_name(path, data)
            if task is not None and task != options.env_name:
                raise DataError(
                    f"{path} holds demonstrations of {task!r}, not of {options.env_name!r}; give demonstrations of the task"
                )
            claims = _claims(path, data, names, options, losses)
            check_agreement(str(path), claims, options.robot, options.agreement)
            outcomes = _outcomes(path, data, names, claims, options, losses)
        else:
            check_agreement(f"{path}: env_args", said_claims(path, data), found, AgreementOptions())
            claims = check_robot(str(path), found, options.robot, options.agreement)
        robot = found or robot_of_file(claims, options.robot)
        recorded = []
        for name in names:
            demo, origin = data[name], f"{path}, {name}"
            try:
                if found is not None:
                    recorded.append(own_episode(demo, robot, origin, losses))
                elif name in outcomes:
                    recorded.append(robomimic_episode(demo, robot, options, outcomes[name], origin, losses))
                else:
                    recorded.append(raw_episode(demo, robot, options, origin, losses))
            except DataError as error:
                raise error if str(error).startswith(origin) else DataError(f"{origin}: {error}") from None
        low, high = robot.action_bounds
        beyond = np.mean([((e.policy_action < low) | (e.policy_action > high)).any(axis=1).mean() for e in recorded])
        if found is None and beyond:
            losses.remark(f"{beyond:.1%} of the steps command beyond the controller's range, which clips them")
        episodes = [adapt(each, claims, options.robot, options.agreement, losses) for each in recorded]
        for name, episode in zip(names, episodes, strict=True):
            episode.check_fits(options.robot, f"{path}, {name}")
        attributes = _attributes(data)
        env_args = json.loads(data.attrs["env_args"]) if "env_args" in data.attrs else None
        as_robot = options.agreement.as_robot
        vouched_for = as_robot is not None and claims.robot is not None and not same_robot(claims.robot, as_robot)
        if vouched_for or any(one is not other for one, other in zip(recorded, episodes, strict=True)):
            # Without what describes the robot, rate and controller that the episodes no longer have.
            losses.leave_out(*(["env_info"] if attributes.pop("env_info", None) is not None else ()))
            losses.leave_out(*(["env_args"] if env_args is not None else ()))
            env_args = None
        models = [text_of(data[name].attrs.get("model_file")) for name in names]
        return DemoSet(
            robot=options.robot,
            episodes=episodes,
            env_args=env_args,
            attributes=attributes,
            masks=_masks(data.file, names, losses),
            model_files=models if any(models) else [],
            losses=losses,
        )


def _outcomes(
    path: Path, data: h5py.Group, names: Sequence[str], claims: Claims, options: DemoOptions, losses: Losses
) -> dict[str, Outcome]:
    """Outcomes of the demonstrations that have observations; those of the others follow from their states."""
    steps = {name: check_rows(data[name], f"{path}, {name}") for name in names}
    told = [name for name in names if "obs" in data[name]]
    recorded = [recorded_outcome(data[name], options, f"{path}, {name}") for name in told]
    judged = judge_outcomes(recorded, [steps[name] for name in told], options, str(path), losses, claims.shaped_rewards)
    return dict(zip(told, judged, strict=True))


def _claims(path: Path, data: h5py.Group, names: Sequence[str], options: DemoOptions, losses: Losses) -> Claims:
    """Robot, rate and controller of a file from elsewhere, as it says or its times and actions show."""
    claims = said_claims(path, data)
    said, shown, most_rows = claims.rate_hz, None, 0
    agrees = said is not None and same_rate(said, options.robot.control_rate_hz)
    for name in names:
        if "states" in data[name] and len(data[name]["states"]):
            origin = f"{path}, {name}"
            seconds = read_rows(data[name], origin)[:, 0]
            most_rows = max(most_rows, len(seconds))
            if np.ptp(seconds) > 0:
                shown = check_times(seconds, said if agrees else None, f"{origin}, states", repeats=True) or shown
    if shown is None and most_rows > 1:
        losses.remark("the times of its states stand still, so that nothing shows its rate")
    if said is None:
        claims = replace(claims, rate_hz=shown)
    elif shown is not None and not agrees and abs(shown - said) > 0.1 * said:
        losses.remark(f"the file says {said:g} Hz, which is believed, though its states are {shown:.4g} Hz apart")
    controller = claims.controller or Controller()
    if controller.delta is not False and any(_has_absolute_actions(data[n], options.robot) for n in names[:_LOOKED_AT]):
        claims = replace(claims, controller=replace(controller, delta=False, seen=True))
    elif controller_of(options.robot).delta and any(_has_joint_actions(data[n]) for n in names[:_LOOKED_AT]):
        claims = replace(claims, controller=Controller(kind="joint positions", seen=True))
    return claims


def _has_joint_actions(demo: h5py.Group) -> bool:
    """Return True if a demonstration's actions are joint positions, whatever its file says: they follow the robot's joints.

    Some joints of a robot are more than a radian from zero, where no delta of the tool is.
    """
    actions, joints = demo["actions"], demo.get("obs/robot0_joint_pos")
    if joints is None and "states" in demo and demo["states"].ndim == 2:
        joints = demo["states"][:, _JOINTS]
    if joints is None or actions.ndim != 2 or joints.ndim != 2 or joints.shape[1] != _JOINT_COUNT:
        return False
    if actions.shape[1] < _JOINT_COUNT or len(actions) != len(joints):
        return False
    rows = np.asarray(joints, np.float64)
    apart = np.abs(actions[:, :_JOINT_COUNT] - rows).max(axis=1)
    return bool(np.median(apart) < _NEAR_JOINTS_RAD and np.median(np.abs(rows).max(axis=1)) > _BENT_RAD)


def _has_absolute_actions(demo: h5py.Group, robot: RobotSpec) -> bool:
    """Return True if a demonstration's actions are absolute poses, whatever its file says."""
    actions, quats = demo["actions"], demo.get(f"obs/{EEF_QUAT}")
    if quats is None or actions.ndim != 2 or actions.shape[1] != robot.action_dim or quats.shape != (len(actions), 4):
        return False
    return follows_poses(actions[()], {EEF_QUAT: np.concatenate([quats[()], quats[-1:]])})


def _attributes(data: h5py.Group) -> dict[str, Any]:
    """Other attributes of the file, such as a raw file's ``env_info``."""
    values = {key: value.decode() if isinstance(value, bytes) else value for key, value in data.attrs.items()}
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    return {k: v for k, v in plain.items() if isinstance(v, str | int | float) and k not in ("total", "env_args", OURS)}


def _masks(file: h5py.File, names: Sequence[str], losses: Losses) -> Mapping[str, list[int]]:
    """robomimic's named subsets, as indices of demonstrations."""
    index = {name: i for i, name in enumerate(names)}
    found: dict[str, list[int]] = {}
    for key, rows in file.get("mask", {}).items():
        members = [text_of(name) or "" for name in rows[()].ravel()]
        if missing := [name for name in members if name not in index]:
            losses.remark(f"mask {key!r} names {', '.join(missing[:3])}, which the file does not hold")
        found[key] = [index[name] for name in members if name in index]
    return found


def _demo_number(name: str) -> tuple[int, str]:
    digits = name.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else -1, name)


def write(path: Path, demos: DemoSet) -> None:
    """Write the file; ``demos.env_args`` and ``demos.model_files`` go into it as they are.

    The file is made in memory: libhdf5 crashes when it cannot flush to a full disk.
    """
    try:
        with h5py.File(path, "w", driver="core", backing_store=False, block_size=_BLOCK_BYTES) as file:
            data = file.create_group("data")
            data.attrs.update(demos.attributes)
            data.attrs["total"] = sum(map(len, demos.episodes))
            data.attrs[OURS] = json.dumps({"arm": asdict(demos.robot)})
            if demos.env_args is not None:
                data.attrs["env_args"] = json.dumps(demos.env_args)
            for i, episode in enumerate(demos.episodes):
                group = data.create_group(f"demo_{i}")
                _write_episode(group, episode)
                model = demos.model_files[i] if demos.model_files else None
                if model is not None:
                    group.attrs["model_file"] = model
            for name, indices in demos.masks.items():
                file[f"mask/{name}"] = np.array([f"demo_{i}".encode() for i in indices], "S")
            file.flush()
            path.write_bytes(file.id.get_file_image())
    except OSError as error:
        raise LogWriteError(f"cannot write {path}: {one_line(error)}") from None


def _write_episode(group: h5py.Group, episode: Episode) -> None:
    group.attrs["num_samples"] = len(episode)
    group.attrs["info"] = json.dumps(dict(episode.info))
    for column in STEP_COLUMNS:
        values = getattr(episode, column.attribute)
        if values is not None:
            group[column.hdf5] = values.astype(np.int64) if values.dtype == np.bool_ else values
    for column in OBSERVATION_COLUMNS:
        values = getattr(episode, column.attribute)
        if values is not None:
            group[column.hdf5], group[f"last/{column.hdf5}"] = values[:-1], values[-1:]
    for key, rows in episode.observations.items():
        group[f"obs/{key}"], group[f"next_obs/{key}"] = rows[:-1], rows[1:]
