"""A person at the keyboard of a terminal: takes the robot over, moves it, labels episodes, stops it. Works over ssh."""

import atexit
import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np

from sacflow_robot.errors import UsageError
from sacflow_robot.robot.control.announcer import announce
from sacflow_robot.robot.teleop.intervention import Label, TeleopDevice
from sacflow_robot.spec import FloatArray, RobotSpec

HELP = """\
space  EMERGENCY STOP                        enter  enable again after a hold or a stop
t      take the robot over; hand it back       g      close or open the gripper
w s    forward, back (x)      i k  pitch     + -    faster, slower
a d    left, right (y)        j l  roll      y n x  episode: success, failure, discard
q e    up, down (z)           u o  yaw       ?      this help"""

_PAIRS = "ws", "ad", "qe", "jl", "ik", "uo"  # of the six axes: the key forward, and the one back
_MOVES = {key: (axis, sign) for axis, pair in enumerate(_PAIRS) for key, sign in zip(pair, (1.0, -1.0), strict=True)}
_LABELS = {"y": Label.SUCCESS, "n": Label.FAILURE, "x": Label.DISCARD}

# A terminal tells of keys pressed, not of keys released: a held key repeats, after half a second or so and then some
# thirty times a second. A press moves for as long as to bridge that, or a held key would stutter at its start.
_FIRST_PRESS_S, _REPEAT_S = 0.10, 0.15
_REPEATS_WITHIN_S = 0.7
_SPEEDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
_ESCAPE = "\x1b"
_STOPS = " \u00a0\u3000"  # also the spaces that other layouts give, with AltGr or in an input method
_MOST_KEYS = 4096  # in one look
_NO_KEY = b"\0"


class Terminal:
    """A terminal in raw mode: keys arrive one by one, unechoed, and Ctrl-C stays Ctrl-C.

    It gets its settings back on ``close``, at exit, and when the process is ended by SIGTERM, SIGHUP or SIGQUIT; nothing can
    be done about SIGKILL, after which ``stty sane`` helps.

    Neither Ctrl-S nor Ctrl-Z stops the process meanwhile; they are keys like others.

    Attributes:
        gone: Whether it has vanished, e.g. with an ssh connection.

    Raises:
        UsageError: It is not a terminal.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self.gone = False
        try:
            self._before = termios.tcgetattr(file)
        except termios.error:
            raise UsageError("the keyboard needs a terminal, and standard input is not one") from None
        raw = termios.tcgetattr(file)
        raw[0] &= ~termios.IXON  # Ctrl-S would block whatever prints
        raw[3] &= ~(termios.ICANON | termios.ECHO)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 0, 0
        raw[6][termios.VSUSP] = _NO_KEY  # a process that Ctrl-Z suspended hears no stop
        termios.tcsetattr(file, termios.TCSANOW, raw)  # without waiting for a terminal that takes no text
        self._open = True
        self._come = select.poll()
        self._come.register(file, select.POLLIN)
        atexit.register(self.close)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                self._handlers[number] = signal.signal(number, self._ended)

    def read(self) -> str:
        keys = b""
        while self._open and not self.gone and len(keys) < _MOST_KEYS and self._come.poll(0):
            try:
                more = os.read(self._file, 1024)
            except OSError:
                more = b""
            self.gone = not more
            keys += more
        return keys.decode(errors="ignore")

    def close(self) -> None:
        """Give the terminal its settings back."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(self._file, termios.TCSANOW, self._before)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._ended:
                signal.signal(number, handler)
        atexit.unregister(self.close)

    def _ended(self, number: int, frame: FrameType | None) -> None:
        before = self._handlers.get(number, signal.SIG_DFL)
        self.close()
        self.gone = True
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            os.kill(os.getpid(), number)


class Keyboard(TeleopDevice):
    """A ``Teleoperator``: the keys of a terminal, see ``help``.

    A key commands a share of the action's range, 0.2 at first.

    Args:
        file: File descriptor of the terminal; standard input if None.
        clock_s: Clock of held keys (s).

    Raises:
        UsageError: There is no terminal.
    """

    help = HELP

    def __init__(
        self,
        robot: RobotSpec,
        *,
        file: int | None = None,
        say: Callable[[str], None] = announce,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terminal = Terminal(sys.stdin.fileno() if file is None else file)
        self._clock_s = clock_s
        self._speed = _SPEEDS.index(0.2)
        self._until: dict[int, tuple[float, float]] = {}  # axis: direction, and when it ends
        self._pressed: dict[str, float] = {}
        self._there = True
        super().__init__(robot, say)

    def close(self) -> None:
        self._terminal.close()

    def _read(self, commanded: FloatArray) -> None:
        keys = self._terminal.read()
        if any(key in _STOPS for key in keys):
            self._emergency("EMERGENCY STOP; enter enables the robot again")
        for key in _plain(keys):
            self._press(key, commanded)
        if self._terminal.gone and self._there:
            self._there = False
            self._gone("the terminal")

    def _press(self, key: str, commanded: FloatArray) -> None:
        if key in _LABELS:
            self._label_episode(_LABELS[key])
        elif key in "\r\n":
            self._said = replace(self._said, enable=True)
        elif key == "t":
            self._until.clear()
            self._take_over(commanded)
        elif key == "?":
            self._say(HELP)
        elif key in "+=-_":
            self._speed = int(np.clip(self._speed + (1 if key in "+=" else -1), 0, len(_SPEEDS) - 1))
            self._say(f"speed {_SPEEDS[self._speed]:.0%}")
        elif key == "g":
            self._grip()
        elif self._human and key in _MOVES:
            now = self._clock_s()
            held = now - self._pressed.get(key, -np.inf) < _REPEATS_WITHIN_S
            self._pressed[key] = now
            axis, direction = _MOVES[key]
            self._until[axis] = direction, now + (_REPEAT_S if held else _FIRST_PRESS_S)

    def _motion(self) -> FloatArray:
        now = self._clock_s()
        motion = np.zeros(6, np.float32)
        for axis, (direction, until) in self._until.items():
            if now < until:
                motion[axis] = direction * _SPEEDS[self._speed]
        return motion


def _plain(keys: str) -> str:
    """Without the escape sequences of arrow and function keys, whose letters would count as keys."""
    plain, skipping = [], False
    for i, key in enumerate(keys):
        if key == _ESCAPE:
            skipping = True
        elif skipping:
            introducer = keys[i - 1] == _ESCAPE and key in "[O"
            skipping = introducer or not ("@" <= key <= "~")
        else:
            plain.append(key.lower())
    return "".join(plain)
