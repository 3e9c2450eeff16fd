"""Numbered requests to a policy server, the replies to them, and what these tell of the server's clock."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from sacflow_robot.errors import (
    ConnectionLost,
    DeadlineExceeded,
    RefusedError,
    ServerError,
    ServerRestartedError,
    SpecMismatchError,
    UsageError,
    WireError,
)
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.connection import Connection, Keys

_FIRST_HEARTBEAT_S = 1.0
_BYE_MS = 50
_LOOK_S = 0.02  # between two looks for a reason to end a wait
_BEHIND_S = 0.01  # how long replies to earlier requests are still passed over when time is up
_REMEMBERED = 32
_LAST_INSTANT_NS = 2**63


class Channel(Connection):
    """Requests over one connection. For the process that made it: a forked one shares its parent's sockets.

    Args:
        address: The server's address.
        timeout_s: Longest wait for a reply, where no other is given.
        keys: Keys, where the server asks for them.

    Attributes:
        last_header: Header of the last reply.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, address: str, timeout_s: float, keys: Keys | None) -> None:
        self.last_header: Mapping[str, Any] = {}
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._process = os.getpid()
        self._sent_ns: dict[int, int] = {}
        self._clocks: list[
            tuple[int, int]
        ] = []  # round trips of the last replies, and the server's clock minus ours (ns)
        super().__init__(address, _FIRST_HEARTBEAT_S, keys)

    @property
    def is_open(self) -> bool:
        """True if it is open, in the process that made it."""
        return not self._context.closed and os.getpid() == self._process

    def check_open(self) -> None:
        """Raise a UsageError where the channel is of no use any more."""
        if not self.is_open:
            raise UsageError(f"this client of {self.address} is closed or of another process; make a new one")

    @property
    def ahead_ns(self) -> int | None:
        """The server's clock ahead of this one, less the way back: what leaves the server by ``ours + ahead_ns`` is here by
        ``ours``. The quickest of the last replies tells best, so that slow ones change nothing. None where none gave a time.
        """
        return min(self._clocks)[1] if self._clocks else None

    def forget_clock(self) -> None:
        """The server is another one from now on."""
        self._clocks.clear()

    def waited_s(self, number: int) -> float:
        """Time since request ``number`` left; very long for one that is not known."""
        return (time.monotonic_ns() - self._sent_ns.get(number, 0)) / 1e9

    def request(self, header: dict[str, Any], arrays: Mapping[str, Any] | None = None) -> int:
        """Send a request; returns its number.

        Raises:
            WireError: It is too large, or has a dtype that does not travel.
            ConnectionLost: There is no server to send it to.
        """
        number = next(self._ids)
        header["id"] = number
        frames = wire.encode(wire.Message(header, arrays or {}))
        if (largest := max(map(len, frames))) > wire.MAX_FRAME_BYTES:  # the server would hang up
            raise WireError(
                f"an array has {largest} bytes; one carries at most {wire.MAX_FRAME_BYTES}: send fewer rows"
            )
        self._sent_ns[number] = time.monotonic_ns()
        self.send(frames)
        return number

    def reply(
        self, number: int, wait_s: float | None = None, interrupted: Callable[[], bool] | None = None
    ) -> wire.Message:
        """The reply to request ``number``; replies to earlier ones are dropped.

        Args:
            number: What :meth:`request` returned.
            wait_s: Longest wait, after which a TimeoutError is raised; by default ``timeout_s``, and a ConnectionLost.
            interrupted: Asked every 20 ms; the wait ends with a ServerError once it is true.

        Raises:
            ConnectionLost: The connection is lost.
            ServerError, SpecMismatchError: The reply says so, or what answers is no policy server.
        """
        self.check_open()
        give_up = time.monotonic() + (self._timeout_s if wait_s is None else wait_s)
        while True:
            left_s = give_up - time.monotonic()
            frames = self.receive(left_s if interrupted is None else min(left_s, _LOOK_S))
            if frames is not None:
                reply = self._decode(frames)
                if reply.header.get("id") in (None, number):
                    break
            elif interrupted is not None and interrupted():
                raise ServerError("the wait for an answer was ended by a person's request")
            elif self.broken():
                raise ConnectionLost(f"the connection to {self.address} is lost; what was asked is lost too")
            if time.monotonic() < give_up + (0.0 if frames is None else _BEHIND_S):
                continue
            if wait_s is not None:
                raise TimeoutError
            raise self.gone(self._timeout_s)
        now_ns, server_ns = time.monotonic_ns(), reply.header.get("server_ns")
        sent_ns = self._sent_ns.get(number, now_ns)
        self._sent_ns.clear()  # older replies do not count any more
        if type(server_ns) is int and 0 <= server_ns < _LAST_INSTANT_NS:
            self._clocks.append((now_ns - sent_ns, server_ns - now_ns))
            del self._clocks[:-_REMEMBERED]
        self.last_header = reply.header
        if reply.header.get("ok") is not True:
            raise self._failure(reply.header.get("error"))
        return reply

    def gone(self, waited_s: float) -> ConnectionLost:
        """The error for a server that did not answer while ``waited_s`` passed, or is not there now (0)."""
        if not waited_s:
            return ConnectionLost(f"the connection to {self.address} is lost, and is being made again")
        return ConnectionLost(
            f"no answer from {self.address} within {self._timeout_s:g} s; is a server running there? "
            "Start one with 'sacflow-robot serve --policy FILE'"
        )

    def close(self, linger_ms: int = _BYE_MS) -> None:
        """Close the connection; what was sent still leaves."""
        if self.is_open:
            super().close(linger_ms)

    def _decode(self, frames: list[Any]) -> wire.Message:
        if frames[0] == wire.STOP_REFUSED:
            raise ServerError(
                f"{self.address} is where a robot listens for stops (run --estop); give the policy server's"
            )
        try:
            reply = wire.decode(frames)
        except WireError as error:
            raise ServerError(f"{self.address} does not speak the protocol: {error}") from None
        if "op" in reply.header:  # where nobody serves on a port yet, a system may connect a socket to itself
            self.connect(self.heartbeat_s)
            raise ConnectionLost(f"a request to {self.address} came back; no server is running there")
        return reply

    def _failure(self, error: object) -> ServerError | SpecMismatchError:
        kind, message = (error.get("kind"), error.get("message")) if isinstance(error, dict) else (None, None)
        reason = message or "it gave no reason"
        if kind == "late":
            return DeadlineExceeded(f"{self.address}: {reason}")
        if kind == "mismatch":
            return SpecMismatchError(f"{self.address}: {reason}")
        if kind == "session":
            return ServerRestartedError(
                f"{self.address} was restarted; nothing asked before counts any more, ask again"
            )
        return RefusedError(f"{self.address} refused the request: {reason}")
