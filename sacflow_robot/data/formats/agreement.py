"""Compare what a file of demonstrations says of itself with the robot and task that it is to serve.

A file is believed only where it agrees: a reader states what the file says (:class:`Claims`) and calls
:func:`check_agreement`, which refuses every difference by name and says which option resolves it (SpecMismatchError).
Options that contradict each other raise UsageError.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sacflow_robot.errors import SpecMismatchError, UsageError
from sacflow_robot.spec import RobotSpec

RewardKind = Literal["auto", "sparse", "-1/0", "dense"]

_SAME_RATE = 0.01  # relative; 29.97 and 30 frames per second are one rate
_SAME_SCALE = 1e-3  # relative

_ONE_ROBOT = {"franka": "panda", "frankapanda": "panda", "frankaemikapanda": "panda", "frankaemika": "panda"}
_MEANINGS = {"delta": True, "absolute": False}
_UNSAID = {"", "unknown", "none", "null"}


@dataclass(frozen=True, kw_only=True)
class AgreementOptions:
    """Options for files that differ from their task: facts that the user states, and conversions that are allowed.

    Attributes:
        resample: Bring demonstrations of another control rate to the task's.
        controller_map: Convert the actions of another controller to the task's: absolute poses to deltas, other scales.
        as_robot: Robot that recorded the demonstrations, whatever the file says.
        reward: Rewards of a file from elsewhere: sparse (1 once solved), -1/0 (0 once solved), dense, or auto, told from
            the values.
        success_above: With --reward dense: a step whose reward is above this has solved the task.
        filter_key: Take only this subset of the demonstrations (robomimic's mask/<name>).
        rate: Control rate of the demonstrations (Hz), where they do not say it themselves.
    """

    resample: bool = False
    controller_map: bool = False
    as_robot: str | None = None
    reward: RewardKind = "auto"
    success_above: float | None = None
    filter_key: str | None = None
    rate: float | None = None

    def check_options(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: They do.
        """
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UsageError(f"--rate {self.rate:g}; expected a control rate in Hz")
        if (self.success_above is None) == (self.reward == "dense"):
            if self.reward == "dense":
                raise UsageError("--reward dense does not say which reward is a success; give --success-above X too")
            raise UsageError(f"--success-above {self.success_above:g} goes with --reward dense; give both")
        if self.success_above is not None and not np.isfinite(self.success_above):
            raise UsageError(f"--success-above {self.success_above:g}; expected a reward, a finite number")


@dataclass(frozen=True)
class Controller:
    """Controller of a file's actions, as the file says; None where it does not say."""

    kind: str | None = None  # its name, as robosuite spells it: ``OSC_POSE``, ``JOINT_VELOCITY``, ...
    delta: bool | None = None  # whether an action is relative to the pose at the time (True) or absolute (False)
    # what an action of 1 commands per motion dimension (m, rad), of those that it says
    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None  # what an action of 0 commands, likewise; None for zeros
    inputs: tuple[float, float] | None = None  # range to which the controller clips an action's motion dimensions
    seen: bool = False  # whether the actions themselves show ``delta``, rather than what the file says

    def __str__(self) -> str:
        meaning = "" if self.delta is None else "delta" if self.delta else "absolute"
        return " ".join(filter(None, (self.kind or "", meaning))) or "not named"


@dataclass(frozen=True)
class Claims:
    """Robot, rate and controller, as a file says; None where it does not say."""

    robot: str | None = None
    rate_hz: float | None = None  # actions per second
    controller: Controller | None = None  # what interprets an action
    shaped_rewards: bool | None = None  # whether its rewards are shaped (dense)


def claims_of_robot(robot: RobotSpec) -> Claims:
    """Claims of a file written here, by the robot in it."""
    return Claims(robot.robot, robot.control_rate_hz, controller_of(robot))


def controller_of(robot: RobotSpec) -> Controller:
    """A robot's controller: ``OSC_POSE delta`` is a kind and a meaning, ``joint position`` a kind alone."""
    kind, _, meaning = robot.controller.rpartition(" ")
    if meaning not in _MEANINGS or not kind:
        return Controller(robot.controller, None, action_scale(robot))
    return Controller(kind, _MEANINGS[meaning], action_scale(robot))


def action_scale(robot: RobotSpec) -> tuple[float, ...] | None:
    """Motion that an action of 1 commands, per leading dimension whose unit is a number and m or rad; None if there is none."""
    scale = []
    for unit in robot.action_units:
        found = re.fullmatch(r"([0-9.eE+-]+) (m|rad)(/s)?", unit)
        if found is None:
            break
        scale.append(float(found[1]))
    return tuple(scale) or None


def same_robot(mine: str, theirs: str) -> bool:
    """Return True if two names are one robot's: ``Panda``, ``panda`` and ``franka``."""
    return _plain(mine) == _plain(theirs)


def _plain(robot: str) -> str:
    name = re.sub(r"[^a-z0-9]", "", robot.lower())
    return _ONE_ROBOT.get(name, name)


def disagreements(claims: Claims, robot: RobotSpec, options: AgreementOptions) -> list[str]:
    """Each difference that no option resolves: what the file says, what the task expects, what to do."""
    differences = (
        _robot(claims.robot, robot, options),
        _rate(claims.rate_hz, robot, options),
        _controller(claims.controller, robot, options),
    )
    return list(filter(None, differences))


def check_agreement(origin: str, claims: Claims, robot: RobotSpec, options: AgreementOptions) -> None:
    """Refuse a file that does not agree with the robot and task that it is to serve."""
    options.check_options()
    if found := disagreements(claims, robot, options):
        raise SpecMismatchError(f"{origin} does not agree with task {robot.task!r}: {'; '.join(found)}")


def check_robot(origin: str, found: RobotSpec, robot: RobotSpec, options: AgreementOptions) -> Claims:
    """Refuse a file written here, which holds the robot's whole specification, unless it agrees with the task's.

    Returns what it claims, for :func:`sacflow_robot.data.formats.adapt.adapt`.
    """
    options.check_options()
    claims = claims_of_robot(found)
    differences = disagreements(claims, robot, options)
    settled = {name: getattr(robot, name) for name in ("robot", "control_rate_hz", "controller", "action_units")}
    if controller_of(found).delta != controller_of(robot).delta:
        settled |= {"action_low": robot.action_low, "action_high": robot.action_high}
    if other := robot.differences(replace(found, **settled)):
        differences.append(f"(expected, found) {'; '.join(other)}")
    if differences:
        raise SpecMismatchError(f"{origin} does not fit task {robot.task!r}: {'; '.join(differences)}")
    return claims


def _robot(said: str | None, robot: RobotSpec, options: AgreementOptions) -> str | None:
    if options.as_robot is not None and not same_robot(options.as_robot, robot.robot):
        return f"--as-robot says {options.as_robot}, the task expects {robot.robot}"
    if options.as_robot is not None or said is None or said.strip().lower() in _UNSAID or same_robot(said, robot.robot):
        return None
    return f"the file says robot {said}, the task expects {robot.robot} (if it is one, give --as-robot {robot.robot})"


def _rate(said: float | None, robot: RobotSpec, options: AgreementOptions) -> str | None:
    expected = robot.control_rate_hz
    if said is None or same_rate(said, expected):
        return None
    if not 0 < said < float("inf"):
        return f"the file says a control rate of {said:g} Hz, the task expects {expected:g} Hz; correct the file"
    if options.resample:
        return None
    return f"the file says {said:g} Hz, the task expects {expected:g} Hz (give --resample to convert)"


def same_rate(mine: float, theirs: float) -> bool:
    """Return True if two control rates (Hz) agree within 1 %."""
    return abs(mine - theirs) <= _SAME_RATE * theirs


def _controller(said: Controller | None, robot: RobotSpec, options: AgreementOptions) -> str | None:
    if said is None:
        return None
    mine = controller_of(robot)
    found = f"the file says controller {said}, the task expects {robot.controller}"
    if said.kind is not None and mine.kind is not None and said.kind.upper() != mine.kind.upper():
        if said.seen:
            found = f"its actions are {said.kind}, the task expects {robot.controller}"
        return f"{found} (actions of {said.kind} cannot be converted; give demonstrations under {robot.controller})"
    if said.delta is not None and mine.delta is not None and said.delta != mine.delta:
        if said.delta:
            return f"{found} (deltas cannot be converted to absolute goals; give demonstrations of those)"
        if said.seen:
            found = f"its actions are absolute poses, the task expects {robot.controller}"
        return None if options.controller_map else f"{found} (give --controller-map to convert)"
    if said.delta is False or options.controller_map or same_scale(said, robot):
        return None
    ours, theirs = (", ".join(f"{value:g}" for value in scale or ()) for scale in (action_scale(robot), said.scale))
    return (
        f"the file's controller moves by {theirs} for an action of 1 (output_max), the task's by {ours} "
        f"(give --controller-map to convert)"
    )


def same_scale(said: Controller, robot: RobotSpec) -> bool:
    """Return True if an action commands the same motion under a file's controller and the task's, as far as both say."""
    expected = action_scale(robot)
    if said.scale is None or expected is None:
        return True
    length = min(len(said.scale), len(expected))
    near = np.allclose(said.scale[:length], expected[:length], rtol=_SAME_SCALE, atol=0)
    return bool(near and not np.any(said.offset or 0))
