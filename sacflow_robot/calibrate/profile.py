"""Calibration profile of one arm, read from YAML with a unit in every key."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from sacflow_robot.errors import DataError, SpecMismatchError, one_line
from sacflow_robot.spec import ArmSpec, FloatArray

_LARGEST_LIMIT = 10  # metres or radians in one control period: no arm moves that far


@dataclass(frozen=True)
class Profile:
    """Limits of one arm.

    Attributes:
        robot: Arm that it is for, as in ``ArmSpec.robot``.
        version: Version of the profile.
        date: Day on which its values were set, ISO 8601.
        method: How they were found.
        max_translation_per_step_m: Largest commanded translation per control period and axis (m).
        max_rotation_per_step_rad: Largest commanded rotation per control period and axis (rad).
    """

    robot: str
    version: int
    date: str
    method: str
    max_translation_per_step_m: float
    max_rotation_per_step_rad: float

    def action_limits(self, arm: ArmSpec) -> tuple[FloatArray, FloatArray]:
        """Bounds (A,), (A,) of the action in the arm's units, within the arm's own bounds.

        Raises:
            SpecMismatchError: The profile is of another arm.
        """
        if arm.robot != self.robot:
            raise SpecMismatchError(
                f"the profile is for {self.robot!r}, the arm is {arm.robot!r}; give the arm's own profile"
            )
        largest = {"m": self.max_translation_per_step_m, "rad": self.max_rotation_per_step_rad}
        low, high = arm.action_bounds
        for i, unit in enumerate(arm.action_units):
            match = re.fullmatch(r"([\d.]+) (m|rad)", unit)
            if match:
                bound = largest[match[2]] / float(match[1])
                low[i], high[i] = max(low[i], -bound), min(high[i], bound)
        return low, high


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        DataError: The file cannot be read, lacks a key, has an unknown one, or a limit is not positive and finite.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"profile {path} cannot be read: {one_line(error)}") from None
    known = {f.name for f in fields(Profile)}
    found = set(data) if isinstance(data, dict) else set()
    if found != known:
        missing, unknown = ", ".join(sorted(known - found)), ", ".join(sorted(map(str, found - known)))
        raise DataError(f"profile {path}: missing keys: {missing or 'none'}; unknown keys: {unknown or 'none'}")
    for name in ("max_translation_per_step_m", "max_rotation_per_step_rad"):
        value = data[name]
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_LIMIT:
            raise DataError(
                f"profile {path}: {name} is {value!r}, expected a positive number of at most {_LARGEST_LIMIT}"
            )
    if type(data["version"]) is not int:
        raise DataError(f"profile {path}: version is {data['version']!r}, expected a whole number")
    return Profile(**{**data, "date": str(data["date"])})
