"""A person's requests to a running robot from anywhere: stop, hold, and enable again."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from sacflow_robot.robot.teleop.intervention import Label
from sacflow_robot.spec import FloatArray

_REMEMBERED = 1024  # outcomes kept for those who asked


class _Kind(Enum):
    STOP = 1
    HOLD = 2
    ENABLE = 3
    HANGUP = 4


@dataclass(frozen=True, slots=True)
class OperatorInput:
    """A person's wishes in one control period. A stop takes precedence over a hold, and both over enabling.

    Attributes:
        stop: Why to stop; empty for no stop.
        hold: Why to hold; empty for no hold.
        enable: Whether to enable.
        action: What the person commands by an input device (A,); None while nobody has taken over.
        label: The person's word on the episode.
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
    """

    def __init__(self) -> None:
        self._requests: deque[tuple[_Kind, str, int]] = deque()
        self._count = 0
        self._state = ""
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
        self._state = state
        if not settled or not self._open:
            return
        done, self._open = self._open, []
        self._outcomes.update(dict.fromkeys(done, state))
        for number in sorted(self._outcomes)[:-_REMEMBERED]:
            del self._outcomes[number]

    @property
    def state(self) -> str:
        """The last reported state; empty before the first report."""
        return self._state

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


_ENDING_S = 3.0  # a stop is over by then; a program that has not ended is interrupted where it is


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
