"""Offset of a server's clock, learned from its answers."""

from __future__ import annotations

import time

_REMEMBERED = 32
_LAST_INSTANT_NS = 2**63


class ServerClock:
    """Offset of a server's clock ahead of this one, less the way back: what leaves the server by ``ours + ahead_ns`` is here
    by ``ours``. The quickest of the last answers tells best, so that slow ones change nothing."""

    def __init__(self) -> None:
        self._sent_ns: dict[int, int] = {}
        self._seen: list[tuple[int, int]] = []

    def forget(self) -> None:
        """The server is another one from now on."""
        self._seen.clear()

    def sent(self, number: int) -> None:
        """Request ``number`` leaves now."""
        self._sent_ns[number] = time.monotonic_ns()

    def since_s(self, number: int) -> float:
        """Time since request ``number`` left; since long ago for one that is not known."""
        return (time.monotonic_ns() - self._sent_ns.get(number, 0)) / 1e9

    def answered(self, number: int, server_ns: object) -> None:
        """The answer to request ``number`` has come; it gives the server's time, if it is a time."""
        now = time.monotonic_ns()
        sent = self._sent_ns.get(number, now)
        self._sent_ns.clear()  # older answers do not count any more
        if type(server_ns) is int and 0 <= server_ns < _LAST_INSTANT_NS:
            self._seen.append((now - sent, server_ns - now))
            del self._seen[:-_REMEMBERED]

    @property
    def ahead_ns(self) -> int | None:
        """None where no answer gave a time."""
        return min(self._seen)[1] if self._seen else None
