"""What robosuite's and robomimic's descriptions of an environment say of robot, rate, controller and reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sacflow_robot.data.formats.agreement import Claims, Controller

# Types of robosuite's composite controllers (1.5) that pass an action's parts on to controllers of their own.
_PASS_ON = ("BASIC", "HYBRID_MOBILE_BASE")
_ENVS = ("right", "left")
_POSE_DIMS = 6
_BASE_AXES = ("base", "world")  # parallel to each other, as robosuite places its robots


def claims_of_env(kwargs: Mapping[str, Any]) -> Claims:
    """What ``env_kwargs`` (robomimic) or ``env_info`` (raw robosuite) say, in the forms of robosuite 1.0 to 1.5.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: They have another form.
    """
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
    delta: bool | None = None
    if "input_type" in config:
        delta = str(config["input_type"]) == "delta"
    elif "control_delta" in config:
        delta = bool(config["control_delta"])
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
