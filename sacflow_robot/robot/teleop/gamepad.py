"""A gamepad or a SpaceMouse in a person's hand, read from Linux's own device files; no driver library is needed.

Facts: the joystick interface's 8-byte events (kernel documentation, input/joydev/joystick-api), the buttons' and axes' numbers
of the xpad driver, and a SpaceMouse's HID reports, 1 translation, 2 rotation (or both in 1), 3 buttons, 350 at full deflection.
"""

import os
import struct
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.robot.control.announcer import announce
from sacflow_robot.robot.teleop.intervention import Label, TeleopDevice, Teleoperator, TeleopSignal
from sacflow_robot.spec import FloatArray, RobotSpec

_SPEED = 0.5  # share of the action's range at full deflection
_MOST_REPORTS = 256  # in one look; Linux keeps 64
_DEAD_ZONE = 0.08  # of full deflection; sticks do not come back to exactly zero

_JS_EVENT = struct.Struct("<IhBB")  # ms, value, type, number
_JS_BUTTON, _JS_AXIS, _JS_INITIAL = 0x01, 0x02, 0x80
_FULL_STICK = 32767
# Axis of the gamepad: axis of the action and sign. Sticks count right and down as positive.
_STICKS = {1: (0, -1.0), 0: (1, -1.0), 4: (2, -1.0), 6: (3, -1.0), 7: (4, -1.0), 3: (5, -1.0)}
_A, _B, _BACK, _START = 0, 1, 6, 7
_LABELS = {2: Label.FAILURE, 3: Label.SUCCESS, 8: Label.DISCARD}  # X, Y, guide

_FULL_SPACEMOUSE = 350
# The cap's axes are right, toward the person, down; the robot's forward, left, up. This is a rotation, so that turns map alike.
_CAP = ((1, -1.0), (0, -1.0), (2, -1.0))
_SPACEMOUSES = ("0000256F:", "0000046D:0000C6")  # vendor, and vendor with the products of its time at Logitech


class HandheldDevice(TeleopDevice):
    """A ``Teleoperator`` read from a device file without waiting; it commands at most half of the action's range.

    Raises:
        UsageError: The device cannot be opened.
    """

    report_bytes: int
    """Most bytes of one report."""

    def __init__(self, robot: RobotSpec, path: Path, say: Callable[[str], None] = announce) -> None:
        try:
            self._file: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"cannot read {path} ({error.strerror}); is it plugged in, and may you read it?") from None
        self._deflection = np.zeros(6, np.float32)  # shares of full deflection
        super().__init__(robot, say)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @abstractmethod
    def _take(self, report: bytes, commanded: FloatArray) -> None:
        """Take one report."""

    def _read(self, commanded: FloatArray) -> None:
        for _ in range(_MOST_REPORTS):
            if self._file is None:
                return
            try:
                report = os.read(self._file, self.report_bytes)
            except BlockingIOError:
                return
            except OSError:
                report = b""
            if report:
                self._take(report, commanded)
                continue
            self.close()
            self._deflection[:] = 0
            self._gone("the device")

    def _motion(self) -> FloatArray:
        beyond = np.maximum(np.abs(self._deflection) - _DEAD_ZONE, 0) / (1 - _DEAD_ZONE)
        motion: FloatArray = _SPEED * np.sign(self._deflection) * np.minimum(beyond, 1)
        return motion


class Gamepad(HandheldDevice):
    """A gamepad, as Linux's joystick interface reports it."""

    help = """\
B      EMERGENCY STOP                        back   enable again after a hold or a stop
start  take the robot over; hand it back       A      close or open the gripper
left stick x and y; right stick z and yaw; cross roll and pitch
Y success, X failure, guide discard"""
    report_bytes = _JS_EVENT.size
    _b_held = False

    def _take(self, report: bytes, commanded: FloatArray) -> None:
        if len(report) != _JS_EVENT.size:
            return
        _, value, kind, number = _JS_EVENT.unpack(report)
        if kind & ~_JS_INITIAL == _JS_AXIS and number in _STICKS:
            axis, sign = _STICKS[number]
            self._deflection[axis] = sign * value / _FULL_STICK
        if kind & ~_JS_INITIAL == _JS_BUTTON and number == _B:
            self._b_held = bool(value)
        if kind != _JS_BUTTON or not value:
            return
        if number == _B:
            self._emergency("EMERGENCY STOP; back enables the robot again")
        elif number == _BACK and self._b_held:
            self._say("let go of B first")
        elif number == _BACK:
            self._said = replace(self._said, enable=True)
        elif number == _START:
            self._take_over(commanded)
        elif number == _A:
            self._grip()
        elif number in _LABELS:
            self._label_episode(_LABELS[number])


class SpaceMouse(HandheldDevice):
    """A 3Dconnexion SpaceMouse by its HID reports."""

    help = """\
left button   take the robot over; hand it back    right button   close or open the gripper
both          EMERGENCY STOP                     labels and enabling again: --keyboard"""
    report_bytes = 64
    _pressed = 0

    def _take(self, report: bytes, commanded: FloatArray) -> None:
        kind, values = report[0], report[1:]
        if kind in (1, 2) and len(values) >= 6:
            count = 6 if kind == 1 and len(values) >= 12 else 3
            raw = np.array(struct.unpack_from(f"<{count}h", values)) / _FULL_SPACEMOUSE
            for part in range(count // 3):
                first = 3 if kind == 2 else 3 * part
                self._deflection[first : first + 3] = [sign * raw[3 * part + axis] for axis, sign in _CAP]
        elif kind == 3 and values:
            fresh = values[0] & ~self._pressed
            self._pressed = values[0]
            if self._pressed & 3 == 3:
                self._emergency("EMERGENCY STOP; the keyboard's enter enables the robot again")
            elif fresh & 1:
                self._take_over(commanded)
            elif fresh & 2:
                self._grip()


class Both:
    """Several ``Teleoperator`` s: each may stop, label and enable; the first that has the robot moves it.

    A device that goes away is a stop while a person has the robot by the other, too.
    """

    def __init__(self, *inputs: Teleoperator) -> None:
        self._inputs = inputs

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        """The person's wishes by any of them; a stop by one takes precedence over the others'."""
        signals = [one.poll(commanded) for one in self._inputs]
        action = next((s.action for s in signals if s.action is not None), None)
        label = next((s.label for s in signals if s.label is not None), None)
        hold = any(s.hold for s in signals)
        if any(s.stop for s in signals) or (hold and action is not None):
            return TeleopSignal(label=label, stop=True)
        return TeleopSignal(action, label, enable=any(s.enable for s in signals) and not hold, hold=hold)

    def close(self) -> None:
        for one in self._inputs:
            one.close()


def open_handheld(name: str, robot: RobotSpec, say: Callable[[str], None]) -> HandheldDevice:
    """The device called ``gamepad``, ``spacemouse``, or either with ``:`` and its device file.

    Raises:
        UnknownNameError: The name is neither of these.
        UsageError: There is no such device, or it cannot be read.
    """
    kind, _, path = name.partition(":")
    if kind == "gamepad":
        return Gamepad(robot, Path(path or "/dev/input/js0"), say)
    if kind == "spacemouse":
        return SpaceMouse(robot, Path(path) if path else _find_spacemouse(), say)
    raise UnknownNameError(
        "handheld", name, ["gamepad", "gamepad:/dev/input/jsN", "spacemouse", "spacemouse:/dev/hidrawN"]
    )


def _find_spacemouse(devices: Path = Path("/sys/class/hidraw")) -> Path:
    for device in sorted(devices.glob("hidraw*")):
        about = device / "device" / "uevent"
        if about.is_file() and any(name in about.read_text().upper() for name in _SPACEMOUSES):
            return Path("/dev") / device.name
    raise UsageError("no SpaceMouse is plugged in; give its device file: spacemouse:/dev/hidrawN")
