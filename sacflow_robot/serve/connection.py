"""A client's connection to one server: a DEALER socket, what heartbeats tell of the server, numbered requests, and the replies."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

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
from sacflow_robot.serve.auth import load_keys, load_secret

# A ping every half heartbeat, and an answer to it within one and a half: a server that does not answer is gone within two, and
# a computer that is busy for one heartbeat is not taken for one that is gone.
_PING = 0.5
_PATIENCE = 1.5
_TIME_TO_LIVE = 2.0
_CONNECT_MS = 5000  # for each attempt; a computer that is off would otherwise hold one for minutes
_AWAKE_S = 0.002  # an answer is waited for awake first: waking up takes as long as a small network's inference
_STANDS = zmq.Event.HANDSHAKE_SUCCEEDED
_GONE = zmq.Event.DISCONNECTED
_BARRED = zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
_FIRST_HEARTBEAT_S = 1.0
_BYE_MS = 50
_LOOK_S = 0.02  # between two looks for a reason to end a wait
_BEHIND_S = 0.01  # how long replies to earlier requests are still passed over when time is up
_REMEMBERED = 32
_LAST_INSTANT_NS = 2**63


@dataclass(frozen=True)
class Keys:
    """Key files of a client, for a server that asks for keys.

    Attributes:
        own: The client's secret key file.
        server: The server's public key file.
    """

    own: Path
    server: Path


class Connection:
    """A DEALER socket that reconnects by itself and keeps nothing for a server that is not there.

    Args:
        heartbeat_s: Time between heartbeats; a server that does not answer is gone within two.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, address: str, heartbeat_s: float, keys: Keys | None = None) -> None:
        self.address = address
        self._keys = keys
        self._open(heartbeat_s)

    def connect(self, heartbeat_s: float) -> None:
        """Make the connection anew: ZeroMQ takes the period of heartbeats when one begins."""
        Connection.close(self)  # the monitor first, and without a farewell to the server
        self._open(heartbeat_s)

    def _open(self, heartbeat_s: float) -> None:
        self.heartbeat_s = heartbeat_s
        self._stands = False
        self._lost = False
        self._barred = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._configure()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _configure(self) -> None:
        socket, milliseconds = self._socket, 1e3 * self.heartbeat_s
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES),
            (zmq.IMMEDIATE, 1),  # nothing is kept for a server that is not there
            (zmq.IPV6, wire.speaks_ipv6(self.address)),
            (zmq.CONNECT_TIMEOUT, _CONNECT_MS),
            (zmq.HANDSHAKE_IVL, _CONNECT_MS),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 200),
            (zmq.HEARTBEAT_IVL, max(1, round(_PING * milliseconds))),
            (zmq.HEARTBEAT_TIMEOUT, max(1, round(_PATIENCE * milliseconds))),
            (zmq.HEARTBEAT_TTL, max(1, round(_TIME_TO_LIVE * milliseconds))),
        ):
            socket.setsockopt(option, value)
        if self._keys is not None:
            socket.curve_publickey, socket.curve_secretkey = load_secret(self._keys.own)
            socket.curve_serverkey = load_keys(self._keys.server)[0]
        self._monitor = socket.get_monitor_socket(_STANDS | _GONE | _BARRED)
        self._news, self._room = zmq.Poller(), zmq.Poller()
        for poller, what in ((self._news, zmq.POLLIN), (self._room, zmq.POLLOUT)):
            poller.register(socket, what)
            poller.register(self._monitor, zmq.POLLIN)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {self.address}: {error}; expected e.g. tcp://127.0.0.1:5555") from None

    def ready(self, wait_s: float) -> bool:
        """Wait until there is a server to send to; whether there is.

        Raises:
            RefusedError: The server does not let this client in.
        """
        deadline = time.monotonic() + wait_s
        while True:
            self._read_events()
            # In this order: the socket may still be writable for a while after the connection was lost.
            if self._stands and self._socket.poll(0, zmq.POLLOUT):
                self._lost = False
                return True
            if self._barred:
                raise RefusedError(f"{self.address} does not let this client in; does it know this client's key?")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            (self._room if self._stands else self._monitor).poll(math.ceil(left_s * 1e3))

    def broken(self) -> bool:
        """True if the connection was lost since the last look."""
        self._read_events()
        lost = self._lost
        self._lost = False
        self._barred = False
        return lost

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Hand a message over.

        Raises:
            ConnectionLost: There is no server to send it to.
        """
        try:
            wire.send(self._socket, frames, wire.NOBLOCK)
        except zmq.Again:
            raise ConnectionLost(f"{self.address} is gone; nothing was sent") from None

    def receive(self, wait_s: float) -> list[Any] | None:
        """The next message; None if none comes in time, or when the connection is lost meanwhile.

        The first 2 ms of the wait give way to other threads and processes, but do not sleep.
        """
        began = time.monotonic()
        found = self._news.poll(0)
        while not found and (waited_s := time.monotonic() - began) < wait_s:
            if waited_s < _AWAKE_S:
                wire.give_way()
                found = self._news.poll(0)
            else:
                found = self._news.poll(math.ceil((wait_s - waited_s) * 1e3))
        return wire.receive(self._socket, wire.NOBLOCK) if self._socket in dict(found) else None

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what was sent has ``linger_ms`` to leave."""
        if not self._context.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disable_monitor()
            self._context.destroy(linger=linger_ms)

    def _read_events(self) -> None:
        while wire.has_come(self._monitor):
            event = recv_monitor_message(self._monitor)["event"]
            self._stands = event == _STANDS
            self._lost |= event == _GONE
            self._barred = not self._stands and (self._barred or bool(event & _BARRED))


class Channel(Connection):
    """Requests over one connection. For the process that made it: a forked one shares its parent's sockets.

    Args:
        timeout_s: Longest wait for a reply, where no other is given.

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
            wait_s: Longest wait, after which a TimeoutError is raised; by default ``timeout_s``, and a ConnectionLost.
            interrupted: Asked every 20 ms; the wait ends with a ServerError once it is true.

        Raises:
            ConnectionLost: The connection is lost.
            ServerError, SpecMismatchError: The reply says so, or what answers is not a policy server.
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
