"""What a person asks of a running arm from anywhere: stop, and arm again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Switches:
    """Requests, from whatever thread or signal handler, until the control loop takes them."""

    def __init__(self) -> None:
        self._stop, self._arm = "", False

    def stop(self, reason: str) -> None:
        """Emergency stop."""
        self._stop = reason or "stopped"

    def arm(self) -> None:
        """Arm again after a hold or a stop."""
        self._arm = True

    def take(self) -> tuple[str, bool]:
        """What was asked for since the last call: why to stop, empty for not; whether to arm. A stop outdoes an arming."""
        if not self._stop and not self._arm:
            return "", False
        stop, arm = self._stop, self._arm
        self._stop, self._arm = "", False
        return stop, arm and not stop


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
