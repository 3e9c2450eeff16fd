"""Calibration profile of one robot, in YAML with a unit in every key.

New values are written into a profile with the file's own words about limits kept and the measured sections written anew.
"""

import datetime
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sacflow_robot.calibrate.recording import Values
from sacflow_robot.envs.robot_parameters import (
    SECTIONS,
    Measured,
    RobotParameters,
    check_value,
    model_of,
    quantity,
    read_sections,
)
from sacflow_robot.errors import DataError, SpecMismatchError, one_line
from sacflow_robot.robot.safety.safety_limits import Box, Cone, SafetyLimits
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.atomic_files import replacing

_LARGEST_LIMIT = 10  # meters or radians in one control period: no robot moves that far
_KNOWN = "robot", "version", "date", "method", "max_translation_per_step_m", "max_rotation_per_step_rad"


@dataclass(frozen=True)
class Profile:
    """Limits of one robot, which are chosen, and its model, which is measured."""

    robot: str  # robot that it is for, as in ``RobotSpec.robot``
    version: int  # version of the profile
    date: str  # day on which its values were set, ISO 8601
    method: str  # how they were found
    max_translation_per_step_m: float  # largest commanded translation per control period and axis (m)
    max_rotation_per_step_rad: float  # largest commanded rotation per control period and axis (rad)
    # what the safety filter enforces beside them; None where the profile says nothing of it
    safety: SafetyLimits | None = None
    sha256: str = field(default="", compare=False)  # digest of the file
    # what has been measured, by name (see ``sacflow_robot.envs.robot_parameters``), each with its story
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def model(self) -> RobotParameters:
        """The measured values."""
        return model_of(self.measured)

    def action_limits(self, robot: RobotSpec) -> tuple[FloatArray, FloatArray]:
        """Bounds (A,), (A,) of the action in the robot's units, within the robot's own bounds.

        Raises:
            SpecMismatchError: The profile is of another robot.
        """
        self.check_fits(robot)
        largest = {"m": self.max_translation_per_step_m, "rad": self.max_rotation_per_step_rad}
        low, high = robot.action_bounds
        for i, unit in enumerate(robot.action_units):
            match = re.fullmatch(r"([\d.]+) (m|rad)", unit)
            if match:
                bound = largest[match[2]] / float(match[1])
                low[i], high[i] = max(low[i], -bound), min(high[i], bound)
        return low, high

    def safety_limits(self, robot: RobotSpec) -> SafetyLimits:
        """Limits of that robot's safety filter: those per step and those of ``safety``.

        Raises:
            SpecMismatchError: The profile is of another robot.
        """
        self.check_fits(robot)
        steps = self.max_translation_per_step_m, self.max_rotation_per_step_rad
        return (self.safety or SafetyLimits()).within(*steps, 1 / robot.control_rate_hz)

    def check_fits(self, robot: RobotSpec) -> None:
        """Raises SpecMismatchError where the profile is of another robot."""
        if robot.robot != self.robot:
            raise SpecMismatchError(
                f"the profile is for {self.robot!r}, the robot is {robot.robot!r}; give the robot's own profile"
            )


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        DataError: The file cannot be read, lacks a key, has an unknown one, or a value is out of its physical range.
    """
    try:
        text = path.read_bytes()
        data = yaml.load(text, _Strict)
    except FileNotFoundError:
        raise DataError(f"no calibration profile {path}; name the robot's own with --profile FILE") from None
    except DataError as error:
        raise DataError(f"profile {path}: {error}") from None
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"profile {path} cannot be read: {one_line(error)}") from None
    try:
        return Profile(**_read(data), sha256=hashlib.sha256(text).hexdigest())
    except ValueError as error:
        raise DataError(f"profile {path}: {error}") from None


def _read(data: Any) -> dict[str, Any]:
    """Fields of a profile; raises ValueError, as all that it calls."""
    found = set(data) if isinstance(data, dict) else set()
    missing, unknown = set(_KNOWN) - found, found - {*_KNOWN, "safety", *SECTIONS}
    if missing or unknown:
        lists = (", ".join(sorted(map(str, keys))) or "none" for keys in (missing, unknown))
        raise ValueError("missing keys: {}; unknown keys: {}".format(*lists))
    for name in ("max_translation_per_step_m", "max_rotation_per_step_rad"):
        value = data[name]
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_LIMIT:
            raise ValueError(f"{name} is {value!r}, expected a positive number of at most {_LARGEST_LIMIT}")
    if type(data["version"]) is not int:
        raise ValueError(f"version is {data['version']!r}, expected a whole number")
    fields = {name: data[name] for name in _KNOWN} | {"date": str(data["date"])}
    if "safety" in data:
        fields["safety"] = _read_safety(data["safety"])
    return fields | {"measured": read_sections({name: data[name] for name in SECTIONS if name in data})}


class _Strict(yaml.SafeLoader):
    """YAML lets a key that is given twice overwrite itself; in a profile that hides a value."""


def _once(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [loader.construct_object(key) for key, _ in node.value]
    twice = {str(name) for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{', '.join(sorted(twice))} given twice")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _once)


# ---- the section `safety`; every reader takes a key's name and value, and raises ValueError


def _number(most: float, least: float = 0.0) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}, expected a number from {least:g} to {most:g}")
        return float(value)

    return read


def _axes(most: float, count: int | None = 3) -> Callable[[str, Any], tuple[float, ...]]:
    one = _number(most)

    def read(name: str, value: Any) -> tuple[float, ...]:
        values = value if isinstance(value, list) else [value] * (count or 1)
        if not values or (count is not None and len(values) != count):
            raise ValueError(f"{name} is {value!r}, expected one positive number, or {count or 'one for each joint'}")
        read_ = tuple(one(name, v) for v in values)
        if min(read_) <= 0:
            raise ValueError(f"{name} is {value!r}, expected positive numbers")
        return read_

    return read


def _range(least: float, most: float) -> Callable[[str, Any], tuple[float, float]]:
    def read(name: str, value: Any) -> tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{name} is {value!r}, expected [lowest, highest]")
        low, high = (_number(most, least)(name, v) for v in value)
        if low >= high:
            raise ValueError(f"{name} is {value!r}, whose lowest is not below its highest")
        return low, high

    return read


def _box(name: str, value: Any) -> Box:
    named = value if isinstance(value, dict) else {}
    if set(named) - {"name"} != {"x", "y", "z"}:
        raise ValueError(f"{name} is {value!r}, expected x, y and z, each [lowest, highest]")
    ranges = [_range(-10, 10)(f"{name}.{axis}", named[axis]) for axis in "xyz"]
    (x, y, z), (a, b, c) = zip(*ranges, strict=True)
    return Box((x, y, z), (a, b, c), str(named.get("name", "")))


def _cone(name: str, value: Any) -> Cone:
    if not isinstance(value, dict) or set(value) != {"axis", "angle_rad"}:
        raise ValueError(f"{name} is {value!r}, expected axis and angle_rad")
    axis = value["axis"]
    if not isinstance(axis, list) or len(axis) != 3:
        raise ValueError(f"{name}.axis is {axis!r}, expected three numbers")
    x, y, z = (_number(1, -1)(f"{name}.axis", v) for v in axis)
    if abs(math.hypot(x, y, z) - 1) > 1e-3:
        raise ValueError(f"{name}.axis is {axis!r}, which is not of length 1")
    return Cone((x, y, z), _number(math.pi)(f"{name}.angle_rad", value["angle_rad"]))


def _list(read: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    def read_all(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r}, expected a list")
        return tuple(read(f"{name}[{i}]", v) for i, v in enumerate(value))

    return read_all


# key in the file: (field of SafetyLimits, how to read it); the largest values are beyond what any robot does
_SAFETY: Mapping[str, tuple[str, Callable[[str, Any], Any]]] = {
    "max_speed_m_per_s": ("speed_m_per_s", _axes(10)),
    "max_acceleration_m_per_s2": ("acceleration_m_per_s2", _axes(1e3)),
    "max_jerk_m_per_s3": ("jerk_m_per_s3", _axes(1e5)),
    "max_turn_rad_per_s": ("turn_rad_per_s", _axes(100, None)),
    "max_turn_acceleration_rad_per_s2": ("turn_acceleration_rad_per_s2", _axes(1e4, None)),
    "max_turn_jerk_rad_per_s3": ("turn_jerk_rad_per_s3", _axes(1e6, None)),
    "workspace_m": ("workspace", _box),
    "keep_out_m": ("keep_out", _list(_box)),
    "tool_cone": ("cone", _cone),
    "joint_rad": ("joint_rad", _list(_range(-4 * math.pi, 4 * math.pi))),
    "tracking_margin_m": ("tracking_margin_m", _number(1)),
    "tracking_margin_rad": ("tracking_margin_rad", _number(math.pi)),
    "gripper_width_m": ("gripper_width_m", _range(0, 1)),
    "max_gripper_force_n": ("gripper_force_n", _number(1e3)),
    "max_observation_age_s": ("max_observation_age_s", _number(10)),
    "max_action_age_s": ("max_action_age_s", _number(10)),
    "max_command_delay_s": ("max_command_delay_s", _number(1)),
    "patience_s": ("patience_s", _number(10)),
    "hold_to_stop_s": ("hold_to_stop_s", _number(3600)),
}


def _read_safety(data: Any) -> SafetyLimits:
    if not isinstance(data, dict):
        raise ValueError(f"safety: expected keys and values, not {data!r}")
    unknown = ", ".join(sorted(map(str, set(data) - set(_SAFETY))))
    if unknown:
        raise ValueError(f"safety: unknown keys: {unknown}; known are {', '.join(_SAFETY)}")
    return SafetyLimits(**{_SAFETY[key][0]: _SAFETY[key][1](f"safety: {key}", value) for key, value in data.items()})


def with_story(values: Values, method: str) -> dict[str, Measured]:
    """Values and standard deviations as measured today, rounded to what they tell.

    Raises:
        DataError: A value is not physically possible.
    """
    today, found = datetime.date.today().isoformat(), {}
    for name, (value, spread) in values.items():
        count = quantity(name).count
        numbers = [float(f"{v:.4g}") for v in np.broadcast_to(value, count)]
        spreads = [float(f"{s:.2g}") for s in np.broadcast_to(spread, count)]
        try:
            found[name] = Measured(check_value(name, numbers), tuple(spreads), today, method)
        except ValueError as error:
            raise DataError(f"what was measured is not possible: {error}") from None
    return found


def write_profile(path: Path, old: Path, new: Mapping[str, Measured]) -> Profile:
    """Write the profile ``old`` with some values in the place of its own, complete or not at all.

    Raises:
        DataError: ``old`` is not a profile, or ``path`` cannot be written.
    """
    before = load_profile(old)
    head = _without_sections(old.read_text())
    head = re.sub(r"(?m)^version: .*$", f"version: {before.version + 1}", head)
    head = re.sub(r"(?m)^date: .*$", f"date: {datetime.date.today().isoformat()}", head)
    text = head.rstrip() + "\n" + _dump({**before.measured, **new})
    try:
        with replacing(path) as partial:
            partial.write_text(text)
            made = load_profile(partial)
    except OSError as error:
        raise DataError(f"profile {path} cannot be written: {error.strerror}") from None
    return made


def _without_sections(text: str) -> str:
    kept, skipping = [], False
    for line in text.splitlines():
        if re.match(r"[^\s#]", line):
            skipping = line.split(":")[0] in SECTIONS
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def _dump(measured: Mapping[str, Measured]) -> str:
    tree: dict[str, Any] = {}
    for name, m in sorted(measured.items(), key=lambda item: SECTIONS.index(item[0].split(".")[0])):
        section, *rest = name.split(".")
        place = tree.setdefault(section, {})
        if len(rest) == 2:
            place = place.setdefault(rest[0], {})
        value, spread = (list(v) if len(v) > 1 else v[0] for v in (m.value, m.uncertainty))
        place[rest[-1]] = {"value": value, "uncertainty": spread, "date": m.date, "method": m.method}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=116) if tree else ""
