"""Listen for stops over the network, beside a control loop; :mod:`~sacflow_robot.robot.control.estop` has the protocol.

The server keeps nothing for a client that has not shown the key: its nonce is an HMAC of the connection's identity and the time
under a secret of the server's own, and so is a ticket of the request's number. However many connections ask for challenges, each
is answered in turn, and a stop among them too.
"""

from __future__ import annotations

import hmac
import itertools
import resource
import secrets
import threading
import time
from contextlib import suppress
from typing import Any

import zmq

from sacflow_robot.errors import UsageError, one_line
from sacflow_robot.robot.control.announcer import announce
from sacflow_robot.robot.control.estop import ENABLE, PENDING, RUNNING, TICKET, proof_of
from sacflow_robot.robot.control.operator import OperatorRequests
from sacflow_robot.utils.sockets import AddressClaim

_LOOPBACK = "tcp://127.0.0.1:", "tcp://localhost:", "ipc://"
_NONCE_S = 5.0  # a nonce is valid for this time at least, and for twice of it at most
_MOST_FRAMES = 8  # of a message; one of more takes long to read
_MOST_BYTES = 4096  # of a frame
_UNREAD, _UNSENT = 2, 64  # messages waiting for each connection; more are left to it, or dropped
_OPEN_FILES = 65536
_HANDSHAKE_MS = 5000
_MESSAGES_A_ROUND = 64
_REST_S = 0.001  # after each round: the control loop runs in the same process
_AFTER_ERROR_S = 0.05

_NO_KEY = (
    b"enabling over the network needs a key: give one file to --estop-key there and to --key here, "
    b"or use kill -USR2 on the robot's computer"
)


class StopServer:
    """Receives requests in a thread of its own, and passes them on; use it as a context manager.

    Args:
        address: Where to listen, e.g. ``tcp://127.0.0.1:5560``; port 0 picks a free one.
        key: Shared key; needed to listen beyond this machine, and to enable from anywhere.

    Raises:
        UsageError: It cannot listen there, or should do so without a key.
    """

    def __init__(self, address: str, requests: OperatorRequests, key: bytes = b"") -> None:
        if not key and not address.startswith(_LOOPBACK):
            raise UsageError(
                f"listening for stops at {address}, beyond this machine, needs a key; give one with --estop-key"
            )
        self._requests = requests
        self._key = key
        self._nonces = _Nonces()
        self._claim = AddressClaim(address)
        _allow_connections()
        try:
            self._context, self._socket = _bound(address)
        except zmq.ZMQError as error:
            self._claim.release()
            raise UsageError(f"cannot listen for stops at {address}: {error}") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._trouble = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="stop server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._context.destroy(linger=100)
        self._claim.release()

    def __enter__(self) -> StopServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Until it is closed, whatever happens: a robot must not lose its stop."""
        while not self._done.is_set():
            try:
                if self._context.closed:
                    self._context, self._socket = _bound(self.address)
                if self._socket.poll(100):
                    self._round()
            except Exception as error:
                self._say(f"the network stop goes on after an error: {one_line(error)}")
                if isinstance(error, zmq.ZMQError):
                    self._hang_up()
                self._done.wait(_AFTER_ERROR_S)
            self._done.wait(_REST_S)

    def _hang_up(self) -> None:
        """End all connections, and with them what waits in their queues; the address is listened at anew.

        ZeroMQ cannot end a single one. A client with a stop to send comes back at once.
        """
        self._context.destroy(linger=0)

    def _round(self) -> None:
        """Answer what waits, one message of each connection after the other's, up to a limit."""
        for _ in range(_MESSAGES_A_ROUND):
            try:
                who, *frames = self._receive()
            except zmq.Again:
                return
            if len(frames) > _MOST_FRAMES:
                self._hang_up()
                return
            try:
                answer = self._answer(who, frames)
            except Exception as error:
                self._say(f"a request over the network failed: {one_line(error)}")
                answer = [b"failed", one_line(error).encode()]
            try:
                self._socket.send_multipart([who, *answer], zmq.NOBLOCK)
            except zmq.ZMQError:  # it does not read its answers, or is gone
                continue

    def _receive(self) -> list[bytes]:
        """The next message, from its sender's identity on; of one with too many frames no more than that is read."""
        frames = [self._socket.recv(zmq.NOBLOCK)]
        while self._socket.getsockopt(zmq.RCVMORE) and len(frames) <= _MOST_FRAMES + 1:
            frames.append(self._socket.recv(zmq.NOBLOCK))
        return frames

    def _answer(self, who: bytes, frames: list[bytes]) -> list[bytes]:
        if frames == [b"challenge"]:
            return [self._nonces.current(who)]
        if len(frames) == 2 and frames[0] == b"outcome":
            return self._outcome(frames[1])
        if len(frames) != 3:
            return [b"refused", b"ask for a challenge first"]
        verb, reason, proof = frames
        if self._key and not self._shown(who, verb, reason, proof):
            return [b"refused", b"the key is not the right one, or its challenge is not valid any more"]
        if verb == b"stop":
            # What comes over the network is shown on a terminal.
            said = "".join(letter if letter.isprintable() else "?" for letter in reason.decode(errors="replace"))
            return self._accepted(self._requests.stop(f"stopped over the network{said and f': {said}'}"))
        if verb == ENABLE and self._key:
            return self._accepted(self._requests.enable())
        return [b"refused", _NO_KEY if verb == ENABLE else b"unknown request"]

    def _shown(self, who: bytes, verb: bytes, reason: bytes, proof: bytes) -> bool:
        """Check that the client knows the key, and use up its nonce if it does."""
        for nonce, period in self._nonces.valid(who):
            if hmac.compare_digest(proof, proof_of(self._key, nonce, verb, reason)):
                self._nonces.use(nonce, period)
                return True
        return False

    def _accepted(self, number: int) -> list[bytes]:
        return [b"ok", PENDING.encode(), TICKET.pack(number, self._nonces.mark(number))]

    def _outcome(self, ticket: bytes) -> list[bytes]:
        if len(ticket) != TICKET.size:
            return [b"refused", b"no ticket of this server"]
        number, mark = TICKET.unpack(ticket)
        if not hmac.compare_digest(mark, self._nonces.mark(number)):
            return [b"refused", b"no ticket of this server"]
        state = self._requests.outcome(number) or PENDING
        return [b"ok", RUNNING if state == "running" else state.encode()]

    def _say(self, line: str) -> None:
        """On standard error, once, without waiting for a terminal."""
        if line != self._trouble:
            self._trouble = line
            with suppress(Exception):  # nothing ends this thread
                announce(line)


def _bound(address: str) -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
    """A socket that listens there, in a context of its own: ending that ends the connections, too, before it returns."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    options = {
        zmq.LINGER: 0,
        zmq.MAXMSGSIZE: _MOST_BYTES,
        zmq.RCVHWM: _UNREAD,
        zmq.SNDHWM: _UNSENT,
        zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
    }
    for option, value in options.items():
        socket.setsockopt(option, value)
    try:
        socket.bind(address)
    except zmq.ZMQError:
        context.destroy(linger=0)
        raise
    return context, socket


def _allow_connections() -> None:
    """Raise this process's limit of open files: a flood of connections must not use up those of the robot."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Nonces:
    """Nonces that are computed, not kept: only those that were used are remembered, while they would be valid."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._used: dict[bytes, int] = {}  # nonce: its period

    def current(self, who: bytes) -> bytes:
        return self._unused(who, self._period())

    def valid(self, who: bytes) -> list[tuple[bytes, int]]:
        """The nonces that a connection may answer now, and their periods."""
        period = self._period()
        return [(self._unused(who, one), one) for one in (period, period - 1)]

    def use(self, nonce: bytes, period: int) -> None:
        """Make a nonce invalid, and forget those that have become so with time."""
        oldest = self._period() - 1
        self._used = {one: its for one, its in self._used.items() if its >= oldest} | {nonce: period}

    def mark(self, number: int) -> bytes:
        """Proof that the server gave out a ticket of that number."""
        return hmac.digest(self._secret, b"ticket %d" % number, "sha256")[:16]

    def _unused(self, who: bytes, period: int) -> bytes:
        for count in itertools.count():
            nonce = hmac.digest(self._secret, b"nonce %d %d " % (period, count) + who, "sha256")
            if nonce not in self._used:
                return nonce
        raise AssertionError

    @staticmethod
    def _period() -> int:
        return int(time.monotonic() / _NONCE_S)
