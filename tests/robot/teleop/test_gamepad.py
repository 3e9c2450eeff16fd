"""Gamepad and SpaceMouse, fed the bytes that Linux's device files give."""

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.envs.registry import get_robot
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.robot.teleop import gamepad as handheld
from sacflow_robot.robot.teleop.gamepad import Both, Gamepad, SpaceMouse, open_handheld
from sacflow_robot.robot.teleop.intervention import HANDS_OFF, Label, TeleopSignal

ROBOT = get_robot("lift")
HOLDING = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


class Device:
    """A named pipe in a device file's place."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path, self._file = path, os.open(path, os.O_RDWR)

    def write(self, *reports: bytes) -> None:
        for report in reports:
            os.write(self._file, report)

    def unplug(self) -> None:
        os.close(self._file)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    yield Device(tmp_path / "device")


def button(number: int, value: int = 1) -> bytes:
    return struct.pack("<IhBB", 7, value, 0x01, number)


def stick(number: int, share: float, initial: bool = False) -> bytes:
    return struct.pack("<IhBB", 7, round(32767 * share), 0x82 if initial else 0x02, number)


def test_a_gamepad_takes_over_without_a_jump_moves_and_hands_back(device: Device) -> None:
    said: list[str] = []
    pad = Gamepad(ROBOT, device.path, said.append)
    device.write(stick(1, -1.0, initial=True), stick(1, 0.0), button(0))
    assert pad.poll(HOLDING) == HANDS_OFF, "hands off: neither sticks nor the gripper's button count"
    device.write(button(7), button(7, 0))
    signal = pad.poll(HOLDING)
    assert signal.action is not None and signal.action.tolist() == HOLDING.tolist(), "what is held stays held"
    device.write(stick(1, -1.0), stick(0, 0.05), stick(4, 1.0), stick(3, 0.54))
    action = pad.poll(HOLDING).action
    assert action is not None and action.dtype == np.float32
    assert action[:3].tolist() == [0.5, 0.0, -0.5], "forward, nothing within the dead zone, down"
    assert action[5] == pytest.approx(-0.25, abs=0.001) and action[3] == action[4] == 0
    device.write(button(0), stick(1, 0.0), stick(4, 0.0), stick(3, 0.0))
    opened = pad.poll(HOLDING).action
    assert opened is not None and opened.tolist() == [0, 0, 0, 0, 0, 0, -1]
    device.write(button(7))
    assert pad.poll(HOLDING) == HANDS_OFF
    pad.close()
    assert said[1:] == ["you have the robot", "gripper opens", "the policy has the robot"]


def test_a_gamepad_labels_stops_and_arms_once_each(device: Device) -> None:
    pad = Gamepad(ROBOT, device.path, lambda _: None)
    for number, label in ((3, Label.SUCCESS), (2, Label.FAILURE), (8, Label.DISCARD)):
        device.write(button(number), button(number, 0))
        assert pad.poll(HOLDING) == TeleopSignal(label=label)
        assert pad.poll(HOLDING) == HANDS_OFF
    device.write(button(7), button(1))
    assert pad.poll(HOLDING) == TeleopSignal(stop=True), "a stop takes the robot from the person too"
    device.write(button(1, 0), button(6))
    assert pad.poll(HOLDING) == TeleopSignal(enable=True)
    pad.close()


@pytest.mark.parametrize("order", [(1, 6), (6, 1), (7, 1, 7, 6), (1, 7)])
def test_a_stop_outdoes_the_buttons_pressed_with_it(device: Device, order: tuple[int, ...]) -> None:
    said: list[str] = []
    pad = Gamepad(ROBOT, device.path, said.append)
    device.write(*(button(number) for number in order))
    assert pad.poll(HOLDING) == TeleopSignal(stop=True)
    device.write(button(6, 0), button(6))
    assert pad.poll(HOLDING) == HANDS_OFF and said[-1] == "let go of B first"
    device.write(button(1, 0), button(6, 0), button(6))
    assert pad.poll(HOLDING) == TeleopSignal(enable=True)
    pad.close()


def test_a_robot_that_sticks_cannot_move_has_the_same_stop(device: Device) -> None:
    said: list[str] = []
    joints = replace(ROBOT, controller="joint position", action_units=("-90 to 90 deg",) * 7)
    pad = Gamepad(joints, device.path, said.append)
    device.write(button(7), stick(1, -1.0))
    assert pad.poll(HOLDING) == HANDS_OFF and "cannot be taken over" in said[-1]
    device.write(button(1))
    assert pad.poll(HOLDING) == TeleopSignal(stop=True)
    pad.close()


def test_a_device_that_never_stops_talking_is_not_listened_to_for_ever(device: Device) -> None:
    pad = Gamepad(ROBOT, device.path, lambda _: None)
    device.write(*[stick(1, 0.5)] * 600, button(1))
    assert [pad.poll(HOLDING).stop for _ in range(3)] == [False, False, True]
    pad.close()


@pytest.mark.parametrize("has_control", [True, False])
def test_a_device_that_goes_away_stops_the_arm_of_a_person_and_else_holds_it(device: Device, has_control: bool) -> None:
    pad = Gamepad(ROBOT, device.path, lambda _: None)
    if has_control:
        device.write(button(7), stick(1, -1.0))
        assert pad.poll(HOLDING).action is not None
    device.unplug()
    assert pad.poll(HOLDING) == TeleopSignal(stop=has_control, hold=not has_control)
    assert pad.poll(HOLDING) == HANDS_OFF
    pad.close()


def cap(kind: int, *values: int) -> bytes:
    return bytes([kind]) + struct.pack(f"<{len(values)}h", *values)


def test_a_spacemouse_moves_and_turns_about_the_same_axes(device: Device) -> None:
    mouse = SpaceMouse(ROBOT, device.path, lambda _: None)

    def action(report: bytes) -> list[float]:
        device.write(report)
        found = mouse.poll(HOLDING).action
        assert found is not None
        return [round(float(x), 3) for x in found]

    assert action(bytes([3, 1])) == HOLDING.tolist()
    assert action(cap(1, 350, 0, 0))[:3] == [0, -0.5, 0], "to the right"
    assert action(cap(1, 0, -350, 0))[:3] == [0.5, 0, 0], "away from the person"
    assert action(cap(1, 0, 0, -350))[:3] == [0, 0, 0.5], "up"
    assert action(cap(2, 0, 0, -500))[2:6] == [0.5, 0, 0, 0.5], "turned about up, while still pulled up"
    assert action(cap(1, 0, 0, 0, 350, 0, 0))[:6] == [0, 0, 0, 0, -0.5, 0], "six axes in one report"
    assert action(bytes([3, 0])) == action(bytes([9, 9, 9])), "releasing, and reports of other kinds"
    assert action(bytes([3, 2]))[6] == -1.0
    device.write(bytes([3, 3]))
    assert mouse.poll(HOLDING) == TeleopSignal(stop=True)
    mouse.close()


def test_two_devices_go_together(tmp_path: Path) -> None:
    one, two = Device(tmp_path / "one"), Device(tmp_path / "two")
    both = Both(SpaceMouse(ROBOT, one.path, lambda _: None), Gamepad(ROBOT, two.path, lambda _: None))
    assert both.poll(HOLDING) == HANDS_OFF
    one.write(bytes([3, 1]))
    two.write(button(3), button(6))
    signal = both.poll(HOLDING)
    assert signal.action is not None and (signal.label, signal.stop, signal.enable) == (Label.SUCCESS, False, True)
    two.write(button(1), button(1, 0))
    one.write(bytes([3, 0]))
    assert both.poll(HOLDING) == TeleopSignal(stop=True), "also while a person has the robot by the other"
    two.write(button(6), button(6, 0))
    signal = both.poll(HOLDING)
    assert signal.enable and signal.action is not None
    two.unplug()
    assert both.poll(HOLDING) == TeleopSignal(stop=True)
    one.write(bytes([3, 1]))
    assert both.poll(HOLDING) == HANDS_OFF
    one.unplug()
    assert both.poll(HOLDING) == TeleopSignal(hold=True)
    both.close()


def test_what_is_not_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="plugged in"):
        open_handheld(f"gamepad:{tmp_path / 'js9'}", ROBOT, print)
    with pytest.raises(UnknownNameError, match="gamepad"):
        open_handheld("joystick", ROBOT, print)
    with pytest.raises(UsageError, match="no SpaceMouse"):
        handheld._find_spacemouse(tmp_path)
    for name, about in (("hidraw0", "HID_ID=0003:000004D9:0000A0CD"), ("hidraw1", "HID_ID=0003:0000256F:0000C62E")):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device" / "uevent").write_text(about)
    assert handheld._find_spacemouse(tmp_path) == Path("/dev/hidraw1")
