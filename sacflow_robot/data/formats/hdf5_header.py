"""Read the task, robot, rate and controller from the header of an HDF5 file of demonstrations.

What cannot be read, or has another form, raises DataError.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sacflow_robot.data.formats.agreement import Claims, Controller
from sacflow_robot.data.formats.demonstrations import Description
from sacflow_robot.data.formats.inferred_spec import UNKNOWN, infer_spec
from sacflow_robot.data.log.columns import UNREADABLE
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import RobotSpec

OURS = "sacflow_robot"
"""Attribute of ``data`` in files written here: JSON with the robot. Such files hold whole episodes."""

# Types of robosuite's composite controllers (1.5) that pass an action's parts on to controllers of their own.
_PASS_ON = ("BASIC", "HYBRID_MOBILE_BASE")
_ENVS = ("right", "left")
_POSE_DIMS = 6
_BASE_AXES = ("base", "world")  # parallel to each other, as robosuite places its robots


@contextmanager
def open_demonstrations(path: Path) -> Iterator[h5py.Group]:
    """Open a file for reading; yields the group of its demonstrations."""
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Group) or not len(file["data"]):
                raise DataError(
                    f"{path} has no group 'data' with demonstrations; expected a robosuite or robomimic file"
                )
            yield file["data"]
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as demonstrations ({one_line(error)}); is it complete?") from None


def describe(path: Path) -> Description:
    """The robot, if the file was written here; the task, and the control rate."""
    with open_demonstrations(path) as data:
        task, rate_hz = env_name(path, data), said_claims(path, data).rate_hz
        return Description(own_robot(data), task, rate_hz, any("obs" in data[name] for name in data))


def infer_robot(path: Path, rate_hz: float) -> RobotSpec:
    """Specification of the robot of a file of no task known here: observations are the arrays under ``obs`` that are not images."""
    with open_demonstrations(path) as data:
        claims = said_claims(path, data)
        demos = [data[name] for name in sorted(data)]
        controller = claims.controller or Controller()
        arrays = {key: array for key, array in demos[0].get("obs", {}).items() if isinstance(array, h5py.Dataset)}
        return infer_spec(
            robot=claims.robot or UNKNOWN,
            task=env_name(path, data) or UNKNOWN,
            rate_hz=rate_hz,
            controller=str(controller) if controller.kind else UNKNOWN,
            observations={
                key: array.shape[1:] or (1,)
                for key, array in arrays.items()
                if array.dtype.kind in "biuf" and array.ndim < 4
            },
            actions=(np.asarray(demo["actions"], np.float64) for demo in demos),
            bounds=None if controller.delta is False else controller.inputs,  # absolute goals go beyond them
        )


def said_claims(path: Path, data: h5py.Group) -> Claims:
    """Claims of a file's ``env_args`` (robomimic) or ``env_info`` (raw robosuite); empty where there are none."""
    name = "env_args" if "env_args" in data.attrs else "env_info"
    if name not in data.attrs:
        return Claims()
    try:
        said = json.loads(data.attrs[name])
        return claims_of_env(said.get("env_kwargs", {}) if name == "env_args" else said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: attribute {name} does not describe a robosuite environment ({one_line(error)})"
        ) from None


def env_name(path: Path, data: h5py.Group) -> str | None:
    """Both layouts name the task: raw files in ``env``, robomimic's in the JSON ``env_args``."""
    if "env_args" not in data.attrs:
        return text_of(data.attrs.get("env"))
    try:
        return str(json.loads(data.attrs["env_args"])["env_name"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: attribute env_args is not robomimic's JSON with an env_name") from None


def own_robot(data: h5py.Group) -> RobotSpec | None:
    return RobotSpec.from_dict(json.loads(data.attrs[OURS])["arm"]) if OURS in data.attrs else None


def text_of(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else None if value is None else str(value)


def claims_of_env(kwargs: Mapping[str, Any]) -> Claims:
    """Claims of ``env_kwargs`` (robomimic) or ``env_info`` (raw robosuite), in the forms of robosuite 1.0 to 1.5."""
    robots, rate, shaped = kwargs.get("robots"), kwargs.get("control_freq"), kwargs.get("reward_shaping")
    names = [robots] if isinstance(robots, str) else list(robots or ())
    return Claims(
        robot=" + ".join(map(str, names)) or None,
        rate_hz=None if rate is None else float(rate),
        controller=_controller(kwargs.get("controller_configs")),
        shaped_rewards=None if shaped is None else bool(shaped),
    )


def _controller(config: Any) -> Controller | None:
    """The robot's controller: one entry, one per robot, or the parts of a composite controller."""
    if config is None:
        return None
    if isinstance(config, str):
        return Controller(kind=config)
    if isinstance(config, Sequence):
        return _all_alike([_controller(each) for each in config])
    if "body_parts" not in config:
        return _robot(config)
    kind, parts = str(config.get("type", _PASS_ON[0])), config["body_parts"]
    if kind not in _PASS_ON:
        return Controller(kind=kind)
    parts = parts.get("envs", parts)
    return _all_alike([_robot(parts[name]) for name in _ENVS if name in parts])


def _all_alike(controllers: Sequence[Controller | None]) -> Controller | None:
    """The controller that all of them are; of different ones, a kind that fits no task."""
    known = [each for each in controllers if each is not None]
    if not known or all(each == known[0] for each in known):
        return known[0] if known else None
    return Controller(kind=" + ".join(str(each) for each in known))


def _robot(config: Mapping[str, Any]) -> Controller:
    delta = bool(config["control_delta"]) if "control_delta" in config else None
    delta = str(config["input_type"]) == "delta" if "input_type" in config else delta
    kind, frame = config.get("type"), config.get("input_ref_frame")
    if frame not in (None, *_BASE_AXES):
        kind = f"{kind} in {frame} axes"
    scale = offset = inputs = None
    if config.get("output_max") is not None:
        high, low = (np.atleast_1d(np.asarray(config[f"output_{end}"], float)) for end in ("max", "min"))
        most, least = (np.asarray(config.get(f"input_{end}", sign), float) for end, sign in (("max", 1), ("min", -1)))
        per_input = (high - low) / (most - least)
        middle = (high + low) / 2 - (most + least) / 2 * per_input
        if per_input.size == 1:  # one number for all dimensions
            per_input, middle = np.repeat(per_input, _POSE_DIMS), np.repeat(middle, _POSE_DIMS)
        scale = tuple(float(x) for x in per_input)
        offset = tuple(float(x) for x in middle) if np.abs(middle).max() > 1e-9 else None
        inputs = float(least.min()), float(most.max())
    return Controller(None if kind is None else str(kind), delta, scale, offset, inputs)
