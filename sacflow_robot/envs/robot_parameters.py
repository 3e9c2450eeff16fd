"""Parameters of a robot: its delays, sensors, controller, joints and payload, each quantity with a unit in its name.

A calibration profile keeps them with their uncertainty, a simulated robot is built from them, a draw of them is an episode's
randomization. A quantity that a model does not name is the simulator's own.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sacflow_robot.spec import Array

JOINTS = 7


@dataclass(frozen=True)
class Quantity:
    """One quantity of the table."""

    count: int  # numbers that it has
    low: float  # smallest value that is physically possible
    high: float  # largest
    what: str  # description


_LENGTH_1, _TURN = (-1.0, 1.0), (-math.pi, math.pi)

QUANTITIES: Mapping[str, Quantity] = {
    "transport.observation_delay_ms": Quantity(1, 0, 2000, "from an observation's capture to the control loop"),
    "transport.command_delay_ms": Quantity(1, 0, 2000, "from a command's sending to the robot acting on it"),
    "transport.inference_delay_ms": Quantity(1, 0, 10_000, "from asking the policy to its answer"),
    "transport.jitter_ms": Quantity(1, 0, 1000, "a message takes up to this much longer, evenly drawn"),
    "transport.observation_drop_ratio": Quantity(1, 0, 0.95, "observations that never arrive"),
    "transport.command_drop_ratio": Quantity(1, 0, 0.95, "commands that never arrive"),
    "transport.clock_offset_ms": Quantity(1, -1e12, 1e12, "the robot's clock minus the control loop's"),
    "controller.translation_stiffness_per_s2": Quantity(1, 1, 5000, "acceleration per distance from the goal"),
    "controller.rotation_stiffness_per_s2": Quantity(1, 1, 5000, "the same of rotations"),
    "controller.damping_ratio": Quantity(1, 0.05, 10, "1 is critical"),
    "controller.actuator_delay_ms": Quantity(1, 0, 20, "from a torque's computation to its effect"),
    "joints.damping_nm_s_per_rad": Quantity(JOINTS, 0, 200, "viscous friction"),
    "joints.friction_loss_nm": Quantity(JOINTS, 0, 100, "dry friction"),
    "joints.armature_kg_m2": Quantity(JOINTS, 0, 50, "inertia of the motor, seen at the joint"),
    "joints.zero_offset_rad": Quantity(JOINTS, *_TURN, "reading minus true position"),
    "payload.mass_kg": Quantity(1, 0, 20, "of what the controller does not know that the hand carries"),
    "payload.center_m": Quantity(3, *_LENGTH_1, "its center of mass in the frame of the grip site"),
    "hand_eye.camera_position_m": Quantity(3, -10, 10, "of the camera in the robot's base frame"),
    "hand_eye.camera_rotation_rad": Quantity(3, *_TURN, "rotation vector from camera to base frame"),
    "hand_eye.reprojection_error_px": Quantity(1, 0, 1000, "root mean square over the images"),
}
"""Section and name of every quantity but the sensors'."""

SENSOR_QUANTITIES: Mapping[str, Quantity] = {
    "noise_m": Quantity(1, 0, 1, "standard deviation per sample, of lengths"),
    "noise_rad": Quantity(1, 0, math.pi, "the same of angles; of quaternions per axis"),
    "bias_m": Quantity(3, *_LENGTH_1, "reading minus truth, of positions"),
    "bias_rad": Quantity(3, *_TURN, "rotation vector from truth to reading, of quaternions"),
    "resolution_m": Quantity(1, 0, 1, "step between two readings, of lengths"),
    "resolution_rad": Quantity(1, 0, math.pi, "the same of angles"),
    "drop_ratio": Quantity(1, 0, 0.95, "samples in which this key repeats its last value"),
}
"""Quantities of one observation key; in a model ``sensors.<key>.<name>``."""

_RENAMED = {"payload.centre_m": "payload.center_m"}  # as profiles and logs of version 0.1 have it

SECTIONS = (*dict.fromkeys(name.split(".")[0] for name in QUANTITIES), "sensors")


def quantity(name: str) -> Quantity:
    """The quantity of a name such as ``joints.friction_loss_nm`` or ``sensors.robot0_eef_pos.noise_m``.

    Raises:
        ValueError: There is no such quantity; the message lists those that exist, or the one that was meant.
    """
    section, _, rest = name.partition(".")
    key, _, own = rest.rpartition(".")
    if section not in SECTIONS:
        raise ValueError(f"unknown section {section!r}; known are {', '.join(SECTIONS)}")
    known = {n.split(".")[1]: q for n, q in QUANTITIES.items() if n.startswith(f"{section}.")} or SENSOR_QUANTITIES
    if own in known and bool(key) == (section == "sensors") and "." not in key:
        return known[own]
    bare = re.sub(r"_(ms|s|m|mm|rad|deg|nm|kg|ratio|px)$", "", own)
    meant = [q for q in known if q == own or q.startswith((f"{own}_", f"{bare}_"))]
    if meant:
        raise ValueError(f"{name} lacks its unit, or has another; write {' or '.join(meant)}")
    raise ValueError(f"unknown key {name}; known are {', '.join(known)}")


def check_value(name: str, value: Any) -> tuple[float, ...]:
    """The numbers of a quantity; one number stands for all where there are several.

    Raises:
        ValueError: No such quantity, or values that are not numbers, not finite, too few or many, or out of range.
    """
    return _numbers(name, value, quantity(name))


def _numbers(name: str, value: Any, known: Quantity) -> tuple[float, ...]:
    given = value if isinstance(value, (list, tuple)) else [value] * known.count
    if len(given) != known.count:
        raise ValueError(f"{name} has {len(given)} numbers, expected {known.count}")
    for i, number in enumerate(given):
        at = name if known.count == 1 else f"{name}[{i}]"
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{at} is {number!r}, expected a finite number")
        if known.low <= number <= known.high:
            continue
        if (known.low, known.high) == _TURN:
            raise ValueError(f"{at} is {number:g} rad, which wraps around; give the same angle between -pi and pi")
        raise ValueError(f"{at} is {number:g}, expected a number from {known.low:g} to {known.high:g}")
    return tuple(map(float, given))


@dataclass(frozen=True)
class RobotParameters:
    """Values by name, in the names' units; immutable, and checked when made.

    Raises:
        ValueError: See :func:`check_value`.
    """

    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = {_RENAMED.get(name, name): v for name, v in self.values.items()}
        object.__setattr__(self, "values", {name: check_value(name, v) for name, v in values.items()})

    def __bool__(self) -> bool:
        return bool(self.values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def array(self, name: str) -> Array | None:
        """The numbers (count,) of a quantity, or None where the simulator's own holds."""
        found = self.values.get(name)
        return None if found is None else np.array(found)

    def number(self, name: str, default: float = 0.0) -> float:
        """A quantity of one number."""
        found = self.values.get(name)
        return default if found is None else found[0]

    def having(self, values: Mapping[str, float | Sequence[float]]) -> "RobotParameters":
        """This model with some values in the place of its own."""
        given = {n: v if isinstance(v, (int, float)) else tuple(map(float, v)) for n, v in values.items()}
        return RobotParameters({**self.values, **given})  # type: ignore[dict-item]

    def part(self, *sections: str) -> "RobotParameters":
        """Only what belongs to those sections."""
        return RobotParameters({n: v for n, v in self.values.items() if n.split(".")[0] in sections})

    def sensor(self, key: str) -> dict[str, Array]:
        """Values of one observation key, by the quantity's name."""
        start = f"sensors.{key}."
        return {n[len(start) :]: np.array(v) for n, v in self.values.items() if n.startswith(start)}

    def to_json(self) -> str:
        """Canonical JSON, for logs and command lines."""
        return json.dumps({n: list(v) for n, v in self.values.items()}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "RobotParameters":
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: It is not that.
        """
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("expected an object of names and numbers")
        return RobotParameters(found)


@dataclass(frozen=True)
class Measured:
    """A measured value."""

    value: tuple[float, ...]  # the numbers, in the unit of the quantity's name
    uncertainty: tuple[float, ...]  # one standard deviation of each, in the same unit
    date: str  # day of the measurement, ISO 8601
    method: str  # how it was found


def read_measured(name: str, data: Any) -> Measured:
    """One quantity from a profile's entry ``{value, uncertainty, date, method}``.

    Raises:
        ValueError: A key is missing or unknown, or a value is not what its unit allows.
    """
    known, wanted = quantity(name), {"value", "uncertainty", "date", "method"}
    if not isinstance(data, Mapping) or set(data) != wanted:
        raise ValueError(f"{name} is {data!r}, expected a map of {', '.join(sorted(wanted))}")
    value = _numbers(name, data["value"], known)
    spread = _numbers(f"{name}: uncertainty", data["uncertainty"], replace(known, low=0, high=math.inf))
    date = str(data["date"])
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise ValueError(f"{name}: date is {date!r}, expected a day such as 2026-11-23")
    if not isinstance(data["method"], str) or not data["method"].strip():
        raise ValueError(f"{name}: method is {data['method']!r}, expected how it was found")
    return Measured(value, spread, date, data["method"])


def read_sections(data: Mapping[str, Any]) -> dict[str, Measured]:
    """Every quantity of a profile's sections, by name.

    Raises:
        ValueError: See :func:`read_measured`.
    """
    named: dict[str, Any] = {}
    for section, entries in data.items():
        for key, entry in _map(section, entries).items():
            name = f"{section}.{key}"
            inner = {"": entry} if section != "sensors" else _map(name, entry)
            named |= {f"{_RENAMED.get(name, name)}.{own}".rstrip("."): value for own, value in inner.items()}
    return {name: read_measured(name, entry) for name, entry in named.items()}


def _map(name: str, data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} is {data!r}, expected keys and values")
    return data


def model_of(measured: Mapping[str, Measured]) -> RobotParameters:
    """The values alone."""
    return RobotParameters({name: m.value for name, m in measured.items()})
