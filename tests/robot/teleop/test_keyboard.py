"""The keyboard through a pseudo-terminal."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.errors import UsageError
from sacflow_robot.robot.teleop.intervention import HANDS_OFF, Label, TeleopSignal
from sacflow_robot.robot.teleop.keyboard import Keyboard
from sacflow_robot.spec import RobotSpec

OPEN, CLOSED = np.array([0] * 6 + [-1.0], np.float32), np.array([0] * 6 + [1.0], np.float32)


class Person:
    """Types on one end of a pseudo-terminal while a ``Keyboard`` reads the other."""

    def __init__(self, robot: RobotSpec) -> None:
        self.hands, self.terminal = pty.openpty()
        self.before = termios.tcgetattr(self.terminal)
        self.now, self.said = 100.0, list[str]()
        self.keyboard = Keyboard(robot, file=self.terminal, say=self.said.append, clock_s=lambda: self.now)

    def types(self, keys: str, commanded: np.ndarray = OPEN) -> TeleopSignal:  # type: ignore[type-arg]
        os.write(self.hands, keys.encode())
        return self.keyboard.poll(commanded)


@pytest.fixture
def person(robot: RobotSpec) -> Iterator[Person]:
    made = Person(robot)
    yield made
    made.keyboard.close()
    assert termios.tcgetattr(made.terminal) == made.before, "the terminal got its settings back"
    os.close(made.hands)
    os.close(made.terminal)


def action_of(signal: TeleopSignal) -> np.ndarray:  # type: ignore[type-arg]
    assert signal.action is not None and signal.action.dtype == np.float32
    return signal.action


def test_nobody_types(person: Person) -> None:
    assert person.types("") is HANDS_OFF


def test_nothing_moves_before_the_arm_is_taken_over(person: Person) -> None:
    assert person.types("wg").action is None


def test_taking_over_moves_nothing_and_drops_nothing(person: Person) -> None:
    assert action_of(person.types("t", CLOSED)).tolist() == CLOSED.tolist()
    assert action_of(person.types("", OPEN)).tolist() == CLOSED.tolist()
    assert person.types("t").action is None


@pytest.mark.parametrize(
    ("key", "axis", "sign"),
    [
        *[("w", 0, 1), ("s", 0, -1), ("a", 1, 1), ("d", 1, -1), ("q", 2, 1), ("e", 2, -1)],
        *[("j", 3, 1), ("l", 3, -1), ("i", 4, 1), ("k", 4, -1), ("u", 5, 1), ("o", 5, -1), ("W", 0, 1)],
    ],
)
def test_a_key_moves_its_axis_and_then_stops(person: Person, key: str, axis: int, sign: int) -> None:
    expected = OPEN.copy()
    expected[axis] = sign * 0.2
    assert np.allclose(action_of(person.types("t" + key)), expected)
    person.now += 0.11
    assert np.allclose(action_of(person.types("")), OPEN)


def test_a_held_key_does_not_stutter(person: Person) -> None:
    person.types("tw")
    person.now += 0.5
    for _ in range(30):
        assert action_of(person.types("w"))[0] > 0
        person.now += 0.033
        assert action_of(person.types(""))[0] > 0
    person.now += 0.2
    assert action_of(person.types(""))[0] == 0


def test_two_axes_at_once_and_the_latest_direction(person: Person) -> None:
    moved = action_of(person.types("twqs"))
    assert np.allclose(moved[:3], (-0.2, 0, 0.2))


def test_gripper_and_speed(person: Person) -> None:
    assert action_of(person.types("tg"))[6] == 1.0
    assert action_of(person.types("g"))[6] == -1.0
    assert action_of(person.types("+++++++w"))[0] == 1.0
    assert np.isclose(action_of(person.types("----------s"))[0], -0.05)


@pytest.mark.parametrize(("key", "label"), [("y", Label.SUCCESS), ("n", Label.FAILURE), ("x", Label.DISCARD)])
def test_labels_are_given_once(person: Person, key: str, label: Label) -> None:
    assert person.types(key).label is label
    assert person.types("").label is None


def test_the_stop_wins_whatever_else_is_typed(person: Person) -> None:
    person.types("tw")
    stopped = person.types("\r wg\r")
    assert (stopped.stop, stopped.enable, stopped.action) == (True, False, None)
    assert person.types("") is HANDS_OFF
    enabled = person.types("\r")
    assert (enabled.enable, enabled.stop) == (True, False)


@pytest.mark.parametrize(
    "keys", ["\x1b ", "\r \r", " t\r", "t\u00a0", "\x1b[200~ \x1b[201~\r", "w" * 3000 + " " + "\r" * 500]
)
def test_a_space_among_any_keys_stops_and_enables_nothing(person: Person, keys: str) -> None:
    person.types("t")
    assert person.types(keys) == TeleopSignal(stop=True)
    assert person.types("") is HANDS_OFF


def test_a_stop_keeps_the_label_that_was_typed_with_it(person: Person) -> None:
    assert person.types("n ") == TeleopSignal(label=Label.FAILURE, stop=True)


def test_neither_ctrl_s_nor_ctrl_z_blocks_the_program(person: Person) -> None:
    person.types("t\x13")
    os.set_blocking(person.terminal, False)
    try:
        assert os.write(person.terminal, b"not blocked") > 0
    finally:
        os.set_blocking(person.terminal, True)
    assert person.types("\x1a").action is not None
    assert person.types(" ").stop


@pytest.mark.parametrize("has_control", [True, False])
def test_a_terminal_that_vanishes_stops_the_arm_of_a_person_and_else_holds_it(
    robot: RobotSpec, has_control: bool
) -> None:
    person = Person(robot)
    person.types("t" if has_control else "?")
    os.close(person.hands)
    assert person.keyboard.poll(OPEN) == TeleopSignal(stop=has_control, hold=not has_control)
    for _ in range(3):
        assert person.keyboard.poll(OPEN) is HANDS_OFF
    assert person.said[-1] == f"the terminal is gone: {'EMERGENCY STOP' if has_control else 'hold'}"
    person.keyboard.close()
    os.close(person.terminal)


def test_arrow_keys_are_no_letters(person: Person) -> None:
    assert np.allclose(action_of(person.types("t\x1b[A\x1b[D\x1bOA\x1b[1;5D\x1b[15~")), OPEN)
    assert action_of(person.types("\x1b[Dw"))[0] > 0


@pytest.mark.parametrize(
    "other",
    [
        {"controller": "joint position", "action_units": ("-90 to 90 deg",) * 6 + ("0 to 100 %",)},
        {"action_units": ("N m",) * 7},
        {"action_names": ("x", "y", "z"), "action_units": ("0.05 m",) * 3},
    ],
)
def test_a_robot_that_keys_cannot_move_has_the_same_stop(robot: RobotSpec, other: dict[str, tuple[str, ...]]) -> None:
    person = Person(replace(robot, **other))  # type: ignore[arg-type]
    assert person.types("twg") == HANDS_OFF and "cannot be taken over" in person.said[-1]
    assert person.types(" ") == TeleopSignal(stop=True)
    assert person.types("y\r") == TeleopSignal(label=Label.SUCCESS, enable=True)
    person.keyboard.close()
    os.close(person.hands)
    os.close(person.terminal)


def test_a_file_is_no_terminal(robot: RobotSpec, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UsageError, match="standard input is not one"):
        Keyboard(robot, file=file.fileno())


@pytest.mark.parametrize("end", ["raise", "exit", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_itself_again_however_the_program_ends(end: str) -> None:
    hands, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup
        "from sacflow_robot.robot.teleop.keyboard import Terminal\n"
        "t = Terminal(0)\n"
        "print('raw', flush=True)\n" + {"raise": "1 / 0\n", "exit": "sys.exit(3)\n"}.get(end, "time.sleep(60)\n")
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert program.stdout is not None and program.stdout.readline() == "raw\n"
    if end.startswith("SIG"):
        assert termios.tcgetattr(terminal) != before
        time.sleep(0.1)
        program.send_signal(getattr(signal, end))
    status = program.wait(30)
    program.stdout.close()
    assert status == {"raise": 1, "exit": 3}.get(end, -getattr(signal, end, 0))
    assert termios.tcgetattr(terminal) == before
    os.close(hands)
    os.close(terminal)
