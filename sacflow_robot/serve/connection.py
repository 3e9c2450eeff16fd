"""A client's connection to one server: the socket, what heartbeats tell of it, and how answers are waited for."""

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

from sacflow_robot.errors import RefusedError, UsageError
from sacflow_robot.serve import wire
from sacflow_robot.serve.security import load_public, load_secret

HEARTBEAT_S = 1.0
AWAKE_S = 0.002
# A ping every half heartbeat, and an answer to it within one and a half: what does not answer is gone within two, and a
# computer that is busy for longer than one heartbeat is not taken for one that is gone.
_PING, _PATIENCE, _TIME_TO_LIVE = 0.5, 1.5, 2.0
_FIRST_TRIES = 32  # in turns
_TRY_THE_OTHER = 256  # more often, and the slower way would be what the slowest hundredth of answers came by
_STEP, _FIRST_STEP = 1.05, 1.3
_PATIENT = 2.0
_GONE = zmq.Event.DISCONNECTED
_BARRED = zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
_EVENTS, _IN, _NOBLOCK = (
    int(zmq.EVENTS),
    int(zmq.POLLIN),
    int(zmq.NOBLOCK),
)  # arithmetic on their enums takes a microsecond


@dataclass(frozen=True)
class Keys:
    """What a client needs where the server asks for keys.

    Attributes:
        own: The client's secret key file.
        server: The server's public key file.
    """

    own: Path
    server: Path


class Habit:
    """Whether to wait for an answer awake or asleep: the way that brought answers sooner of late, the other one now and then.

    Awake is quicker as a rule. It is not where others want the core, who are given way to for long; nor where the answer comes
    from a thread of this process, which cannot run while this one holds the interpreter; nor where it comes from far away.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._typical_s: dict[bool, float] = {}

    def awake(self) -> bool:
        """How to wait this time."""
        self._turn += 1
        if self._turn <= _FIRST_TRIES or len(self._typical_s) < 2:
            return self._turn % 2 == 1
        better = self._typical_s[True] < self._typical_s[False]
        return better != (self._turn % _TRY_THE_OTHER == 0)

    @property
    def patience_s(self) -> float:
        """How long to wait awake: what takes longer than usual may be waiting for this one's core."""
        return _PATIENT * self._typical_s.get(True, math.inf)

    def learn(self, awake: bool, took_s: float) -> None:
        """The answer waited for in that way took so long."""
        before = self._typical_s.get(awake)
        step = _FIRST_STEP if self._turn <= _FIRST_TRIES else _STEP
        # Follows the median: what else the computer does makes some answers late, however they are waited for.
        self._typical_s[awake] = took_s if before is None else before * (step if took_s > before else 1 / step)


class Connection:
    """A DEALER socket that reconnects by itself and keeps nothing for a server that is not there.

    Args:
        address: The server's.
        heartbeat_s: Time between heartbeats; a server that does not answer is gone within two.
        keys: Keys, where the server asks for them.
        awake_s: How long an answer is waited for awake, giving way to whatever else wants the core, before sleeping: to be
            woken takes as long as some answers. It sleeps at once where that brings answers sooner; see :class:`Habit`.

    Raises:
        UsageError: The address is malformed.
    """

    def __init__(self, address: str, heartbeat_s: float, keys: Keys | None, awake_s: float = AWAKE_S) -> None:
        self.address, self.heartbeat_s = address, heartbeat_s
        self._awake_s = awake_s
        self._habit = Habit()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._open(keys)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def _open(self, keys: Keys | None) -> None:
        socket, milliseconds = self._socket, 1e3 * self.heartbeat_s
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES),
            (zmq.IMMEDIATE, 1),  # nothing is kept for a server that is not there
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.HEARTBEAT_IVL, max(1, round(_PING * milliseconds))),
            (zmq.HEARTBEAT_TIMEOUT, max(1, round(_PATIENCE * milliseconds))),
            (zmq.HEARTBEAT_TTL, max(1, round(_TIME_TO_LIVE * milliseconds))),
        ):
            socket.setsockopt(option, value)
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = load_secret(keys.own)
            socket.curve_serverkey = load_public(keys.server)
        self._monitor = socket.get_monitor_socket(_GONE | _BARRED)
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
            left_ms = max(0.0, deadline - time.monotonic()) * 1e3
            found = dict(self._room.poll(math.ceil(left_ms)))
            if self._socket in found:
                return True
            if self._monitor in found and self._events() & _BARRED:
                raise RefusedError(f"{self.address} does not let this client in; does it know this client's key?")
            if left_ms <= 0:
                return False

    def broken(self) -> bool:
        """Whether the connection was lost since the last look."""
        return bool(int(self._monitor.get(_EVENTS)) & _IN) and self._events() != 0

    def send(self, frames: Sequence[wire.Frame]) -> None:
        """Hand a message over.

        Raises:
            zmq.Again: There is nobody to send it to.
        """
        wire.send(self._socket, frames, _NOBLOCK)

    def receive(self, wait_s: float) -> list[Any] | None:
        """The next message; None if none comes in time, or when the connection is lost meanwhile."""
        socket = self._socket
        if int(socket.get(_EVENTS)) & _IN:
            return wire.receive(socket, _NOBLOCK)
        if wait_s <= 0:
            return None
        began = time.monotonic()
        awake = self._habit.awake()
        awake_s = min(wait_s, self._awake_s, self._habit.patience_s) if awake else 0.0
        frames = self._wait(began + wait_s, began + awake_s)
        if frames is not None:
            self._habit.learn(awake, time.monotonic() - began)
        return frames

    def _wait(self, deadline: float, awake_until: float) -> list[Any] | None:
        socket, now = self._socket, time.monotonic()
        while now < awake_until:
            wire.give_way()
            if int(socket.get(_EVENTS)) & _IN:
                return wire.receive(socket, _NOBLOCK)
            now = time.monotonic()
        while now < deadline:
            found = dict(self._news.poll(math.ceil((deadline - now) * 1e3)))
            if socket in found:
                return wire.receive(socket, _NOBLOCK)
            if found:
                return None
            now = time.monotonic()
        return None

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what was sent has ``linger_ms`` to leave."""
        if not self._context.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disable_monitor()
            self._context.destroy(linger=linger_ms)

    def _events(self) -> int:
        """Events since the last look."""
        seen = 0
        while self._monitor.poll(0):
            seen |= recv_monitor_message(self._monitor)["event"]
        return seen
