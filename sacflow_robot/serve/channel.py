"""Numbered requests to a policy server, and the replies to them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from sacflow_robot.errors import ConnectionLost, ServerError, UsageError, WireError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve import replies
from sacflow_robot.serve.connection import Connection, Keys
from sacflow_robot.serve.server_clock import ServerClock

_FIRST_HEARTBEAT_S = 1.0
_BYE_MS = 50
_LOOK_S = 0.02  # between two looks for a reason to end a wait
_BEHIND_S = 0.01  # how long replies to earlier requests are still passed over when time is up


class Channel:
    """Requests over one connection. For the process that made it: a forked one shares its parent's sockets.

    Args:
        address: The server's address.
        timeout_s: Longest wait for a reply, where no other is given.
        keys: Keys, where the server asks for them.

    Attributes:
        clock: The server's clock, as far as its replies tell.
        last_header: Header of the last reply.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, address: str, timeout_s: float, keys: Keys | None) -> None:
        self.clock = ServerClock()
        self.last_header: Mapping[str, Any] = {}
        self._address = address
        self._timeout_s = timeout_s
        self._keys = keys
        self._ids = itertools.count(1)
        self._closed = False
        self._process = os.getpid()
        self._connection = Connection(address, _FIRST_HEARTBEAT_S, keys)

    @property
    def is_open(self) -> bool:
        """True if it is open, in the process that made it."""
        return not self._closed and os.getpid() == self._process

    def check_open(self) -> None:
        """Raise a UsageError where the channel is of no use any more."""
        if not self.is_open:
            raise UsageError(f"this client of {self._address} is closed or of another process; make a new one")

    def ready(self, wait_s: float) -> bool:
        """Wait until there is a server to send to; whether there is.

        Raises:
            RefusedError: The server does not let this client in.
        """
        return self._connection.ready(wait_s)

    def lost(self) -> bool:
        """True if the connection was lost since the last look."""
        return self._connection.broken()

    def keep_heartbeat(self, heartbeat_s: float) -> bool:
        """True if the connection has this heartbeat; if not, it is made anew, as ZeroMQ takes the period when one begins."""
        kept = heartbeat_s == self._connection.heartbeat_s
        if not kept:
            self._reconnect(heartbeat_s)
        return kept

    def send(self, header: dict[str, Any], arrays: Mapping[str, Any]) -> int:
        """Send a request; returns its number.

        Raises:
            WireError: It is too large, or has a dtype that does not travel.
            ConnectionLost: There is no server to send it to.
        """
        number = next(self._ids)
        header["id"] = number
        frames = wire.encode(wire.Message(header, arrays))
        if (largest := max(map(len, frames))) > wire.MAX_FRAME_BYTES:  # the server would hang up
            raise WireError(
                f"an array has {largest} bytes; one carries at most {wire.MAX_FRAME_BYTES}: send fewer rows"
            )
        self.clock.sent(number)
        self._connection.send(frames)
        return number

    def receive(
        self, number: int, wait_s: float | None = None, interrupted: Callable[[], bool] | None = None
    ) -> wire.Message:
        """The reply to request ``number``; replies to earlier ones are dropped.

        Args:
            number: What :meth:`send` returned.
            wait_s: Longest wait, after which a TimeoutError is raised; by default ``timeout_s``, and a ConnectionLost.
            interrupted: Asked every 20 ms; the wait ends with a ServerError once it is true.

        Raises:
            ConnectionLost: The connection is lost.
            ServerError, SpecMismatchError: As :func:`~sacflow_robot.serve.replies.failure` and ``decode``.
        """
        self.check_open()
        give_up = time.monotonic() + (self._timeout_s if wait_s is None else wait_s)
        while True:
            left_s = give_up - time.monotonic()
            frames = self._connection.receive(left_s if interrupted is None else min(left_s, _LOOK_S))
            if frames is not None:
                reply = self._decode(frames)
                if reply.header.get("id") in (None, number):
                    break
            elif interrupted is not None and interrupted():
                raise ServerError("the wait for an answer was ended by a person's request")
            elif self.lost():
                raise ConnectionLost(f"the connection to {self._address} is lost; what was asked is lost too")
            if time.monotonic() < give_up + (0.0 if frames is None else _BEHIND_S):
                continue
            if wait_s is not None:
                raise TimeoutError
            raise self.gone(self._timeout_s)
        self.clock.answered(number, reply.header.get("server_ns"))
        self.last_header = reply.header
        if reply.header.get("ok") is not True:
            raise replies.failure(reply.header.get("error"), self._address)
        return reply

    def gone(self, waited_s: float) -> ConnectionLost:
        """The error for a server that did not answer while ``waited_s`` passed, or is not there now (0)."""
        if not waited_s:
            return ConnectionLost(f"the connection to {self._address} is lost, and is being made again")
        return ConnectionLost(
            f"no answer from {self._address} within {self._timeout_s:g} s; is a server running there? "
            "Start one with 'sacflow-robot serve --policy FILE'"
        )

    def close(self) -> None:
        """Close the connection; what was sent still leaves."""
        if self.is_open:
            self._connection.close(_BYE_MS)
        self._closed = True

    def _decode(self, frames: list[Any]) -> wire.Message:
        reply = replies.decode(frames, self._address)
        if "op" in reply.header:  # where nobody serves on a port yet, a system may connect a socket to itself
            self._reconnect(self._connection.heartbeat_s)
            raise ConnectionLost(f"a request to {self._address} came back; no server is running there")
        return reply

    def _reconnect(self, heartbeat_s: float) -> None:
        self._connection.close()
        self._connection = Connection(self._address, heartbeat_s, self._keys)
