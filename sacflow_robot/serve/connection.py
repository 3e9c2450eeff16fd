"""A client's connection to one server: a DEALER socket, and what heartbeats tell of the server."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from sacflow_robot.errors import ConnectionLost, RefusedError, UsageError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.auth import load_public, load_secret

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
        address: The server's.
        heartbeat_s: Time between heartbeats; a server that does not answer is gone within two.
        keys: Keys, where the server asks for them.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, address: str, heartbeat_s: float, keys: Keys | None = None) -> None:
        self.address = address
        self._keys = keys
        self._context: zmq.Context[Any] = zmq.Context()
        self.connect(heartbeat_s)

    def connect(self, heartbeat_s: float) -> None:
        """Make the connection, or make it anew: ZeroMQ takes the period of heartbeats when one begins."""
        self._context.destroy(linger=0)
        self.heartbeat_s = heartbeat_s
        self._stands = False
        self._lost = False
        self._barred = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _open(self) -> None:
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
            socket.curve_serverkey = load_public(self._keys.server)
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
