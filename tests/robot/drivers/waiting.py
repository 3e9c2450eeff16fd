"""Deadlines of commands, and waiting for what a thread does."""

import time
from collections.abc import Callable


def in_s(seconds: float) -> int:
    return time.monotonic_ns() + round(seconds * 1e9)


def eventually(true: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.005)
    return False
