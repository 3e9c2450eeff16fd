"""What a person asks of a running robot from anywhere: stop, and enable again."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Switches:
    """Requests from any thread or signal handler, until the control loop takes them, and what became of them.

    No locks: a signal handler may interrupt any line of the thread that it runs in.
    """

    def __init__(self) -> None:
        self._requests: deque[tuple[str, int]] = deque()  # reason to stop, empty to enable; number
        self._count = 0
        self._taken = 0
        self._state = ""
        self._settled = 0, ""

    def stop(self, reason: str) -> int:
        """Request an emergency stop; the number of the request, for :meth:`outcome`."""
        return self._put(reason or "stopped")

    def arm(self) -> int:
        """Request that the robot be enabled after a hold or a stop; the number of the request."""
        return self._put("")

    def take(self) -> tuple[str, bool]:
        """Requests since the last call: why to stop, empty for no stop; whether to enable. A stop outdoes an enabling,
        whichever came first."""
        stop, enable = "", False
        while self._requests:
            reason, number = self._requests.popleft()
            stop, enable = reason or stop, enable or not reason
            self._taken = max(self._taken, number)
        return stop, enable and not stop

    def report(self, state: str, settled: bool) -> None:
        """Say what became of the requests taken so far; called by whatever moves the robot.

        Args:
            state: ``armed``, ``hold`` or ``stopped``.
            settled: Whether that state is final for those requests: false while the robot still comes to rest.
        """
        self._state = state
        if settled:
            self._settled = self._taken, state

    @property
    def state(self) -> str:
        """The last reported state; empty before the first report."""
        return self._state

    def outcome(self, number: int) -> str:
        """The state that a request led to; empty while it has not been taken, or the robot still comes to rest."""
        taken, state = self._settled
        return state if taken >= number else ""

    @property
    def _arm(self) -> bool:
        """Whether a request to enable waits to be taken."""
        return any(not reason for reason, _ in self._requests.copy())

    def _put(self, reason: str) -> int:
        self._count += 1
        number = self._count
        self._requests.append((reason, number))
        return number


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, also one that a script started in the background, where Ctrl-C would be ignored:
    the arm holds, and what was logged is whole."""

    def on_term(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the signals are somebody else's there
        yield
        return
    before = [signal.signal(number, on_term) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


@contextmanager
def signals(switches: Switches) -> Iterator[None]:
    """SIGUSR1 stops, SIGUSR2 arms, while this lasts."""

    def on_stop(*_: object) -> None:
        switches.stop("stopped by SIGUSR1")

    def on_arm(*_: object) -> None:
        switches.arm()

    before = [signal.signal(signal.SIGUSR1, on_stop), signal.signal(signal.SIGUSR2, on_arm)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGUSR2), before, strict=True):
            signal.signal(number, handler)
