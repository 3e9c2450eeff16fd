"""The machine's clock, for robots that live in the real world."""

import time

# The operating system wakes a sleeper late by less than this; the rest of a wait is spent looking at the clock.
_SPIN_NS = 200_000


class MonotonicClock:
    """``time.monotonic_ns``; a :class:`~sacflow_robot.interfaces.Clock`.

    Args:
        spin_ns: The last part of every wait, spent awake, because a sleeper wakes late (ns).
    """

    def __init__(self, spin_ns: int = _SPIN_NS) -> None:
        self._spin_ns = spin_ns

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, time_ns: int) -> None:
        while (left := time_ns - time.monotonic_ns()) > 0:
            if left > self._spin_ns:
                time.sleep((left - self._spin_ns) / 1e9)
