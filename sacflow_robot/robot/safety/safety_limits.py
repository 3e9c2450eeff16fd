"""Limits that a safety filter enforces; a calibration profile makes them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.spec import RobotSpec

Array = npt.NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in the frame of the robot's end-effector position.

    Attributes:
        low: Lowest corner x, y, z (m).
        high: Highest corner (m).
        name: What messages call it; empty for none.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    name: str = ""


@dataclass(frozen=True)
class Cone:
    """Directions in which the tool may point.

    Attributes:
        axis: Unit vector at the cone's middle, in the frame of the end effector's orientation.
        angle_rad: Largest angle between it and the tool's z axis (rad).
    """

    axis: tuple[float, float, float]
    angle_rad: float


@dataclass(frozen=True)
class SafetyLimits:
    """Limits of one robot in physical units. Nothing in it can be changed; None and infinity mean no limit.

    Attributes:
        speed_m_per_s, acceleration_m_per_s2, jerk_m_per_s3: Of the commanded translation, per axis x, y, z.
        turn_rad_per_s, turn_acceleration_rad_per_s2, turn_jerk_rad_per_s3: Of the commanded rotation per axis; of every
            joint, where joints are what is commanded.
        workspace: Where the end effector may be.
        keep_out: Where it may not.
        cone: Where the tool may point.
        joint_rad: Lowest and highest position of each joint.
        tracking_margin_m: How far the robot may be from where its commands should have brought it; the workspace is smaller,
            and what is to be kept out of is larger, by this.
        tracking_margin_rad: The same of the tool's direction.
        gripper_width_m: Least and greatest width that may be commanded.
        gripper_force_n: Largest grasping force that may be commanded.
        max_observation_age_s: Older observations are acted on no more.
        max_action_age_s: Later than this after the moment that it is for, an action is dropped.
        max_command_delay_s: Longest that a command takes to the robot.
        patience_s: How long actions may be missing, the robot slowing down meanwhile, until it holds and has to be enabled anew.
        hold_to_stop_s: How long it holds until it is stopped.
    """

    speed_m_per_s: tuple[float, ...] = (np.inf,) * 3
    acceleration_m_per_s2: tuple[float, ...] = (np.inf,) * 3
    jerk_m_per_s3: tuple[float, ...] = (np.inf,) * 3
    turn_rad_per_s: tuple[float, ...] = (np.inf,) * 3
    turn_acceleration_rad_per_s2: tuple[float, ...] = (np.inf,) * 3
    turn_jerk_rad_per_s3: tuple[float, ...] = (np.inf,) * 3
    workspace: Box | None = None
    keep_out: tuple[Box, ...] = ()
    cone: Cone | None = None
    joint_rad: tuple[Range, ...] = ()
    tracking_margin_m: float = 0.0
    tracking_margin_rad: float = 0.0
    gripper_width_m: Range | None = None
    gripper_force_n: float | None = None
    max_observation_age_s: float = 0.25
    max_action_age_s: float = 0.25
    max_command_delay_s: float = 0.0
    patience_s: float = 0.1
    hold_to_stop_s: float = 5.0

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def within(self, per_step_m: float, per_step_rad: float, period_s: float) -> SafetyLimits:
        """These limits, no faster than that much translation (m) and rotation (rad) in one control period and axis."""
        speed = tuple(min(v, per_step_m / period_s) for v in self.speed_m_per_s)
        turn = tuple(min(v, per_step_rad / period_s) for v in self.turn_rad_per_s)
        return replace(self, speed_m_per_s=speed, turn_rad_per_s=turn)


@dataclass(frozen=True)
class Axes:
    """The axes that a robot's actions move: one for each action entry whose unit is a length or an angle.

    Attributes:
        index: Which entries of the action they are (N,).
        scale: What 1.0 means there, in meters or radians (N,).
        offset: What 0.0 means there (N,); zeros unless the axes are absolute.
        length: Which are lengths (N,), bool.
        absolute: Whether the action says where to be rather than how far to go in one period.
        speed, acceleration, jerk: Limits (N,) per second, second squared and cubed; speed within the robot's own bounds.
        low, high: Positions (N,) between which an absolute axis stays.
        gripper: Entries (M,) that are none of these, and pass within their bounds.
        gripper_low, gripper_high: Those bounds (M,).
        names: Names (N,) of the axes.
        assumed: What limits were assumed because none were given; empty for none.
    """

    index: npt.NDArray[np.intp]
    scale: Array
    offset: Array
    length: npt.NDArray[np.bool_]
    absolute: bool
    speed: Array
    acceleration: Array
    jerk: Array
    low: Array
    high: Array
    gripper: npt.NDArray[np.intp]
    gripper_low: Array
    gripper_high: Array
    names: tuple[str, ...]
    assumed: str

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)


POSITION_SPEED_M_PER_S, POSITION_SPEED_RAD_PER_S = 0.1, 0.5
POSITION_ACCELERATION_M_PER_S2, POSITION_ACCELERATION_RAD_PER_S2 = 0.5, 2.0
"""Limits of axes that are commanded in positions, where none are given: the first target may be anywhere in their range."""

_UNIT = re.compile(r"(?:([\d.eE+-]+) )?(m|rad|deg)")
_RANGE = re.compile(r"([\d.eE+-]+) to ([\d.eE+-]+) (m|rad|deg)")
_FACTOR = {"m": 1.0, "rad": 1.0, "deg": np.pi / 180}


def action_axes(robot: RobotSpec, limits: SafetyLimits) -> Axes:
    """Work out what a robot's actions mean, and how fast its axes may move.

    An action is a motion for one period (delta) unless the robot's controller is named a position controller (``"joint
    position"``). A position's unit may be a range, e.g. ``"-90 to 90 deg"``: what the lowest and the highest action
    stand for.

    Raises:
        InvalidValueError: The limits do not have the robot's number of axes, or a position has no unit of length or
            angle.
    """
    absolute = _is_absolute(robot)
    grip = [i for i, name in enumerate(robot.action_names) if "gripper" in name.lower()]
    units = {i: m for i in range(robot.action_dim) if i not in grip and (m := _meaning(robot, i, absolute)) is not None}
    if absolute and len(units) + len(grip) < robot.action_dim:
        # Such an entry would pass as it is, and be held at a place of nobody's choosing.
        other = next(i for i in range(robot.action_dim) if i not in units and i not in grip)
        raise InvalidValueError(
            f"{robot.action_names[other]!r} is commanded in {robot.action_units[other]!r}; positions can only be limited in m, "
            "rad or deg, so have the robot take those (a LeRobot robot: use_degrees in its settings, and unit: deg)"
        )
    index = np.array(list(units), np.intp)
    scale, offset = np.array([m[:2] for m in units.values()]).reshape(-1, 2).T.copy()
    length = np.array([m[2] for m in units.values()], bool)
    period_s = 1 / robot.control_rate_hz
    low, high = (
        np.asarray(bound, np.float64)[index] * scale + offset for bound in (robot.action_low, robot.action_high)
    )
    speed = _spread(limits.speed_m_per_s, limits.turn_rad_per_s, length)
    acceleration = _spread(limits.acceleration_m_per_s2, limits.turn_acceleration_rad_per_s2, length)
    assumed = ""
    if absolute:
        speed, acceleration, assumed = _assume_limits(speed, acceleration, length)
        # From one end to the other in a single period is what the robot itself would accept.
        speed = np.minimum(speed, (high - low) / period_s)
        joints = np.array(limits.joint_rad, np.float64).reshape(-1, 2)
        turns = np.flatnonzero(~length)
        if len(joints) and len(joints) != len(turns):
            raise InvalidValueError(f"the profile limits {len(joints)} joints, the robot is commanded in {len(turns)}")
        for axis, (least, most) in zip(turns, joints, strict=False):
            low[axis], high[axis] = max(low[axis], least), min(high[axis], most)
    else:
        speed = np.minimum(speed, np.minimum(-low, high) / period_s)
    jerk = _spread(limits.jerk_m_per_s3, limits.turn_jerk_rad_per_s3, length)
    for name, values in (("speed", speed), ("acceleration", acceleration), ("jerk", jerk)):
        if not (values > 0).all():
            raise InvalidValueError(f"{name} limits are {values.tolist()}, expected positive numbers")
    others = np.array([i for i in range(robot.action_dim) if i not in units], np.intp)
    grip_low, grip_high = (np.asarray(bound, np.float64)[others] for bound in (robot.action_low, robot.action_high))
    for place, entry in enumerate(others):
        _limit_gripper(robot.action_units[entry], limits, grip_low, grip_high, place)
    names = tuple(robot.action_names[i] for i in index)
    return Axes(
        *(index, scale, offset, length, absolute, speed, acceleration, jerk, low, high, others, grip_low, grip_high),
        *(names, assumed),
    )


def moves_tool(robot: RobotSpec) -> bool:
    """True if an action (7,) moves the tool in one period: three lengths, three angles, and the gripper."""
    if robot.action_dim != 7 or _is_absolute(robot):
        return False
    meanings = [_meaning(robot, entry, absolute=False) for entry in range(6)]
    return [None if m is None else m[2] for m in meanings] == [True] * 3 + [False] * 3


def _is_absolute(robot: RobotSpec) -> bool:
    return "position" in robot.controller.lower() and "delta" not in robot.controller.lower()


def _assume_limits(speed: Array, acceleration: Array, length: npt.NDArray[np.bool_]) -> tuple[Array, Array, str]:
    """Speeds and accelerations (N,), with cautious ones for axes without a speed limit, and a line that says so."""
    without = ~np.isfinite(speed)
    if not without.any():
        return speed, acceleration, ""
    cautious = np.where(length, POSITION_SPEED_M_PER_S, POSITION_SPEED_RAD_PER_S)
    gentle = np.where(length, POSITION_ACCELERATION_M_PER_S2, POSITION_ACCELERATION_RAD_PER_S2)
    values = [f"{POSITION_SPEED_RAD_PER_S:g} rad/s and {POSITION_ACCELERATION_RAD_PER_S2:g} rad/s^2"]
    if (without & length).any():
        values.append(f"{POSITION_SPEED_M_PER_S:g} m/s and {POSITION_ACCELERATION_M_PER_S2:g} m/s^2")
    line = f"commanded in positions without a speed limit: limited to {', '.join(values)}; a profile sets other limits"
    return np.where(without, cautious, speed), np.where(without, np.minimum(acceleration, gentle), acceleration), line


def _meaning(robot: RobotSpec, entry: int, absolute: bool) -> tuple[float, float, bool] | None:
    """Scale and offset (m or rad) of an action's entry, and whether it is a length; None if it is neither length nor angle."""
    unit = robot.action_units[entry]
    if plain := _UNIT.fullmatch(unit):
        return float(plain[1] or 1) * _FACTOR[plain[2]], 0.0, plain[2] == "m"
    between = _RANGE.fullmatch(unit) if absolute else None
    if between is None:
        return None
    least, most = float(between[1]), float(between[2])
    low, high = robot.action_low[entry], robot.action_high[entry]
    scale = (most - least) / (high - low)
    factor = _FACTOR[between[3]]
    return scale * factor, (least - low * scale) * factor, between[3] == "m"


def _spread(lengths: tuple[float, ...], angles: tuple[float, ...], is_length: npt.NDArray[np.bool_]) -> Array:
    """Values for the axes in their order: lengths by turns x, y, z, angles likewise; the last one given is for all after."""
    out = np.empty(len(is_length))
    for kind, values in ((True, lengths), (False, angles)):
        places = np.flatnonzero(is_length == kind)
        out[places] = [values[min(i, len(values) - 1)] for i in range(len(places))]
    return out


def _limit_gripper(unit: str, limits: SafetyLimits, low: Array, high: Array, place: int) -> None:
    match = re.fullmatch(r"(?:([\d.eE+-]+) )?(m|N)", unit)
    if match is None:
        return
    scale = float(match[1] or 1)
    if match[2] == "m" and limits.gripper_width_m is not None:
        low[place] = max(low[place], limits.gripper_width_m[0] / scale)
        high[place] = min(high[place], limits.gripper_width_m[1] / scale)
    if match[2] == "N" and limits.gripper_force_n is not None:
        low[place] = max(low[place], -limits.gripper_force_n / scale)
        high[place] = min(high[place], limits.gripper_force_n / scale)
