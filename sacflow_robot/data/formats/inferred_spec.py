"""The specification of a robot that is known from a data set alone: what its features say, and what they do not.

A data set names arrays and shows values; it does not say units or limits. Units are then "unknown", and an action may
take the values that were recorded, and a little more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.columns import LOG_DTYPES, OLD_NAMES
from sacflow_robot.errors import DataError
from sacflow_robot.spec import ArraySpec, RobotSpec

UNKNOWN = "unknown"
"""Unit, controller or robot of which a data set says nothing."""

_MARGIN = 0.05  # by which an action may go beyond the recorded values, as a share of their range
_GREATEST = 1e30

_RESERVED = {*LOG_DTYPES, *OLD_NAMES.values()}
"""Columns of an episode log, whose names no observation can take."""

_UNITS = {
    "eef_pos": "m",
    "eef_quat": "unit quaternion xyzw",
    "eef_vel_lin": "m/s",
    "eef_vel_ang": "rad/s",
    "eef_rot_axis_angle": "rad",
    "joint_pos": "rad",
    "joint_vel": "rad/s",
    "gripper_width": "m",
}
"""Units of keys that robomimic and UMI share, after ``robot0_``."""


def observation_key(name: str) -> str:
    """Key under which an array of that name is kept: the name, or ``observation.<name>`` where a log's column has it."""
    return f"observation.{name}" if name in _RESERVED or name.startswith("last_") else name


def infer_spec(
    *,
    robot: str,
    task: str,
    rate_hz: float,
    observations: Mapping[str, tuple[int, ...]],
    actions: Iterable[npt.NDArray[np.float64]],
    controller: str = UNKNOWN,
    action_names: Sequence[str] = (),
    action_units: Sequence[str] = (),
    bounds: tuple[float, float] | None = None,
) -> RobotSpec:
    """Specification from what a data set holds."""
    if not observations:
        raise DataError("it has no low-dimensional observations, and images alone cannot be used")
    lowest, highest = _range(actions)
    if bounds is None:
        limits = [_bounds(low, high) for low, high in zip(lowest, highest, strict=True)]
    else:
        limits = [bounds] * len(lowest)
    names = action_names if len(action_names) == len(limits) else [f"action_{i}" for i in range(len(limits))]
    return RobotSpec(
        robot=robot,
        task=task,
        controller=controller,
        control_rate_hz=float(rate_hz),
        observations=tuple(_array(key, shape) for key, shape in observations.items()),
        action_names=tuple(names),
        action_units=tuple(action_units) or (UNKNOWN,) * len(limits),
        action_low=tuple(low for low, _ in limits),
        action_high=tuple(high for _, high in limits),
    )


def describe_unit(unit: str) -> str:
    """Describe what an action of 1 is."""
    return "unit unknown" if unit == UNKNOWN else f"1 = {unit}"


def with_bounds_of(robot: RobotSpec, others: Iterable[RobotSpec]) -> RobotSpec:
    """The robot, its actions bounded so that those of others fit too, as far as they have as many."""
    alike = [robot, *(other for other in others if other.action_dim == robot.action_dim)]
    return replace(
        robot,
        action_low=tuple(map(min, zip(*(each.action_low for each in alike), strict=True))),
        action_high=tuple(map(max, zip(*(each.action_high for each in alike), strict=True))),
    )


def _array(key: str, shape: tuple[int, ...]) -> ArraySpec:
    what = key.partition("_")[2] if key.startswith("robot") else ""
    is_quaternion = what == "eef_quat" and shape == (4,)
    return ArraySpec(key, shape, _UNITS.get(what, UNKNOWN), quaternions=(0,) if is_quaternion else ())


def _range(actions: Iterable[npt.NDArray[np.float64]]) -> tuple[list[float], list[float]]:
    """Least and greatest finite value of each dimension (A,), (A,)."""
    found = [rows for rows in actions if len(rows)]
    if not found:
        raise DataError("it has no actions")
    rows = np.concatenate(found)
    low, high = np.where(np.isfinite(rows), rows, np.inf).min(0), np.where(np.isfinite(rows), rows, -np.inf).max(0)
    return low.tolist(), high.tolist()


def _bounds(low: float, high: float) -> tuple[float, float]:
    """Bounds of an action dimension of which the values from ``low`` to ``high`` were recorded.

    Values that end at -1 or 1 exactly are those of a normalized action, and are not widened.
    """
    if not low <= high:
        raise DataError("an action dimension has no finite value")
    if max(-low, high) > _GREATEST:
        raise DataError(f"an action dimension goes from {low:g} to {high:g}; expected values that float32 holds")
    if low >= -1 and high <= 1 and (low == -1 or high == 1):
        return (-1.0 if low < 0 else 0.0), (1.0 if high > 0 else 0.0)
    margin = _MARGIN * ((high - low) or abs(high) or 1)
    return low - margin, high + margin
