"""What a person asks of a running arm from anywhere: stop, and arm again."""

from __future__ import annotations

import signal
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
