"""Requests that may wait: those that need no inference, and those of connections that take more of the server's time than others."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from sacflow_robot.serve.protocol import MAX_MESSAGE_BYTES

_MOST_WAITING = 256
_BURST_NS = 10_000_000
_SHARE = 0.02  # of the server's time
_KEPT = 4096


class Backlog:
    """Messages put off until no inference waits: those of one connection in the order in which they came, and the
    connections in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, deque[list[Any]]] = OrderedDict()
        self._bytes: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._waiting

    def put(self, frames: list[Any]) -> bool:
        """Put a message off (its peer first); false where its connection has too much waiting already."""
        peer, size = frames[0], sum(map(len, frames))
        queue = self._waiting.setdefault(peer, deque())
        size += self._bytes.get(peer, 0)
        if queue and (len(queue) >= _MOST_WAITING or size > MAX_MESSAGE_BYTES):
            return False
        queue.append(frames)
        self._bytes[peer] = size
        return True

    def take(self) -> list[Any]:
        """The next message; there has to be one."""
        peer, queue = self._waiting.popitem(last=False)
        frames = queue.popleft()
        if queue:
            self._waiting[peer] = queue
            self._bytes[peer] -= sum(map(len, frames))
        else:
            del self._bytes[peer]
        return frames


class TimeBudget:
    """Time that the server spends on a connection, besides inference: 2 % of it, and 10 ms at once."""

    def __init__(self) -> None:
        self._spent_ns: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def charge(self, peer: bytes, duration_ns: int, now_ns: int) -> None:
        """So much time was spent on a message of this connection."""
        self._spent_ns[peer] = self._left_over(peer, now_ns) + duration_ns, now_ns
        self._spent_ns.move_to_end(peer)
        if len(self._spent_ns) > _KEPT:
            self._spent_ns.popitem(last=False)

    def exceeded(self, peer: bytes, now_ns: int) -> bool:
        """True if the connection has to wait for its turn."""
        return peer in self._spent_ns and self._left_over(peer, now_ns) > _BURST_NS

    def _left_over(self, peer: bytes, now_ns: int) -> float:
        spent_ns, at_ns = self._spent_ns.get(peer, (0.0, now_ns))
        return max(0.0, spent_ns - _SHARE * (now_ns - at_ns))
