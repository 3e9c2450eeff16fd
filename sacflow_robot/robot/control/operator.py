"""A person's side of a moving robot: every way to stop, hold and enable it, in one place for every command."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np

from sacflow_robot.errors import RobotError, StoppedError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.safety.latch import Latch, State
from sacflow_robot.robot.teleop.intervention import HANDS_OFF, Label, Teleoperator
from sacflow_robot.spec import FloatArray

_REMEMBERED = 1024  # outcomes kept for those who asked
_ENDING_S = 3.0  # a stop is over by then; a program that has not ended is interrupted where it is


class _Kind(Enum):
    STOP = auto()
    HOLD = auto()
    ENABLE = auto()
    HANGUP = auto()


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """A person's wishes in one control period. A stop takes precedence over a hold, and both over enabling.

    Attributes:
        stop: Why to stop; empty for no stop.
        hold: Why to hold; empty for no hold.
        enable: Whether to enable the robot after a hold or a stop.
        action: What the person commands by an input device (A,); None while nobody has taken over.
        label: How the person judged the episode; None for no judgment.
    """

    stop: str = ""
    hold: str = ""
    enable: bool = False
    action: FloatArray | None = None
    label: Label | None = None


class OperatorRequests:
    """Requests from any thread or signal handler, until the control loop takes them, and what became of them.

    No locks: a signal handler may interrupt any line of the thread that it runs in.

    Attributes:
        ending: The name of the signal that asked the program to end; empty for none.
        watched: Whether somebody takes requests.
        state: The last reported state; empty before the first report.
    """

    def __init__(self) -> None:
        self._requests: deque[tuple[_Kind, str, int]] = deque()
        self._count = 0
        self.state = ""
        self._open: list[int] = []  # taken, and the robot still comes to rest
        self._outcomes: dict[int, str] = {}
        self.ending = ""
        self.watched = False

    def stop(self, reason: str) -> int:
        """Request an emergency stop; the number of the request, for :meth:`outcome`."""
        return self._put(_Kind.STOP, reason or "stopped")

    def hold(self, reason: str) -> int:
        """Request a hold; the number of the request."""
        return self._put(_Kind.HOLD, reason or "held")

    def enable(self) -> int:
        """Request that the robot be enabled after a hold or a stop; the number of the request."""
        return self._put(_Kind.ENABLE, "")

    def hangup(self) -> int:
        """Report that the terminal is gone: a stop while a person moves the robot, else a hold."""
        return self._put(_Kind.HANGUP, "the terminal is gone")

    def end(self, name: str) -> int:
        """Request a stop, and the end of the program after it; ``name`` is the signal's."""
        self.ending = name
        return self.stop(f"stopped by {name}")

    @property
    def halt_pending(self) -> bool:
        """True while a requested stop or hold was not taken yet."""
        return any(kind is not _Kind.ENABLE for kind, _, _ in tuple(self._requests))

    def take(self, in_charge: bool = False) -> OperatorInput:
        """Requests since the last call.

        Args:
            in_charge: Whether a person moves the robot by an input device: a terminal that is gone then stops it.
        """
        stop = ""
        hold = ""
        enable = False
        while self._requests:
            kind, reason, number = self._requests.popleft()
            if kind is _Kind.HANGUP:
                kind = _Kind.STOP if in_charge else _Kind.HOLD
            if kind is _Kind.STOP:
                stop = stop or reason
            elif kind is _Kind.HOLD:
                hold = hold or reason
            else:
                enable = True
            self._open.append(number)
        return OperatorInput(stop, hold, enable and not (stop or hold))

    def report(self, state: str, settled: bool) -> None:
        """Say what became of the requests taken so far; called by whatever moves the robot.

        Args:
            state: That of the robot's :class:`~sacflow_robot.robot.safety.latch.Latch`.
            settled: Whether that state is final for those requests: false while the robot still comes to rest.
        """
        self.state = state
        if not settled or not self._open:
            return
        done, self._open = self._open, []
        self._outcomes.update(dict.fromkeys(done, state))
        for number in sorted(self._outcomes)[:-_REMEMBERED]:
            del self._outcomes[number]

    def outcome(self, number: int) -> str:
        """The state that a request led to; empty while it has not been taken, or the robot still comes to rest.

        A state that came after it, by a later request, does not change it.
        """
        return self._outcomes.get(number, "")

    def _put(self, kind: _Kind, reason: str) -> int:
        self._count += 1
        number = self._count
        self._requests.append((kind, reason, number))
        return number


class Operator:
    """Everything through which a person controls a robot: requests from anywhere, and an input device.

    Args:
        requests: Requests from other threads, signals and the network; None for none but the device's.
        teleop: Keyboard, gamepad or SpaceMouse; None for none.
    """

    def __init__(self, requests: OperatorRequests | None = None, teleop: Teleoperator | None = None) -> None:
        self.requests = OperatorRequests() if requests is None else requests
        self.teleop = teleop
        self._in_charge = False
        self._label: Label | None = None

    def look(self, commanded: FloatArray, between: bool = False) -> OperatorInput:
        """Take what was requested since the last look; does not wait.

        Args:
            commanded: The last action (A,) that was sent.
            between: Whether no episode is under way: a label is kept for the next look in an episode.
        """
        signal = HANDS_OFF
        stop = ""
        if self.teleop is not None:
            try:
                signal = self.teleop.poll(commanded)
            except Exception as error:  # a device's fault must not end the loop before the robot has stopped
                stop = f"the input device failed: {one_line(error)}"
                self.teleop = None
        if signal.stop:
            stop = "stopped by hand"
        requested = self.requests.take(in_charge=signal.action is not None or self._in_charge)
        self._in_charge = signal.action is not None
        stop = stop or requested.stop
        hold = "the input device is gone" if signal.hold else requested.hold
        enable = (signal.enable or requested.enable) and not (stop or hold)
        self._label = signal.label or self._label
        label = None if between else self._label
        self._label = self._label if between else None
        return OperatorInput(stop, hold, enable, signal.action, label)

    def report(self, safety: Latch) -> None:
        """Note what state the robot is in, as the outcome of the requests taken so far."""
        self.requests.report(safety.state, safety.settled)


class StopOnlyOperator(Operator):
    """The operator of a program that can only be ended: taking over holds the robot, enabling does nothing."""

    def look(self, commanded: FloatArray, between: bool = False) -> OperatorInput:
        found = super().look(commanded, between)
        hold = found.hold or ("" if found.action is None else "a person took the robot over")
        return replace(found, hold=hold, enable=False, action=None, label=None)


def obey(safety: Latch, requested: OperatorInput) -> None:
    """Stop or hold as requested. The caller enables, because that depends on what the robot is doing."""
    if requested.stop:
        safety.halt(requested.stop)
        if safety.at_rest:
            safety.rest()
    elif requested.hold:
        safety.hold(requested.hold)


def refuse_if_stopped(robot: Robot, safety: Latch, operator: Operator) -> None:
    """Refuse to start an episode of a robot that is held or stopped, or is requested to be.

    Raises:
        StoppedError: A stop or a hold was requested.
        RobotError: The robot was held or stopped before, and nobody has enabled it since.
    """
    requested = operator.look(np.zeros(robot.spec.action_dim, np.float32), between=True)
    obey(safety, requested)
    if safety.may_start:
        return
    if safety.state is State.STOPPED:
        robot.stop()
    operator.report(safety)
    if requested.stop or requested.hold:
        how = "stopped" if requested.stop else "held"
        raise StoppedError(f"{how} before the first command: {requested.stop or requested.hold}")
    raise RobotError(f"the robot is not enabled: {safety.reason}; enable it before the next episode")


def settle(robot: Robot, safety: Latch, operator: Operator) -> None:
    """End the motion: hold the robot, stop it if a stop is under way, and only then report its state."""
    try:
        robot.hold()
    finally:
        safety.rest()
        if safety.state is State.STOPPED:
            robot.stop()
        operator.report(safety)


@contextmanager
def operator_signals(requests: OperatorRequests) -> Iterator[None]:
    """While this lasts: SIGUSR1 stops, SIGUSR2 enables, SIGHUP stops or holds, SIGINT and SIGTERM stop and end the program.

    A program that does not look at its requests, is asked to end a second time, or has not ended after three seconds, is
    interrupted where it is (KeyboardInterrupt). A script's background programs have SIGINT ignored by the shell; here
    it counts all the same. SIGHUP stays ignored where it is (``nohup``).
    """
    if threading.current_thread() is not threading.main_thread():  # the signals are another part's there
        yield
        return

    def on_end(number: int, _: object) -> None:
        if requests.ending or not requests.watched:
            raise KeyboardInterrupt
        requests.end(signal.Signals(number).name)
        timer = threading.Timer(_ENDING_S, insist, (number,))
        timer.daemon = True
        timer.start()

    def insist(number: int) -> None:
        if requests.watched:  # else it is ending, and what it still writes is not to be interrupted
            os.kill(os.getpid(), number)

    handlers: dict[int, Callable[[int, object], object]] = {
        signal.SIGINT: on_end,
        signal.SIGTERM: on_end,
        signal.SIGUSR1: lambda *_: requests.stop("stopped by SIGUSR1"),
        signal.SIGUSR2: lambda *_: requests.enable(),
    }
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = lambda *_: requests.hangup()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
