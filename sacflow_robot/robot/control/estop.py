"""Stop a running robot over the network, and enable it again.

A client asks for a challenge, and answers it with its request and an HMAC-SHA256 of both under a shared key, so that a request
that somebody overheard cannot be sent again. Without a key, only this machine may stop, and nobody may enable.

    client                         server
    ["challenge"]              →
                               ←   [nonce, 32 bytes]
    [verb, reason, hmac]       →                        verb: stop, arm (to enable)
                               ←   ["ok", "pending", ticket], ["refused", why] or ["failed", why]
    ["outcome", ticket]        →                        as often as the client likes
                               ←   ["ok", state]        state: pending, stopped, hold, armed (running)

The server keeps nothing for a client that has not shown the key: its nonce is an HMAC of the connection's identity and the time
under a secret of the server's own, and so is a ticket of the request's number. However many connections ask for challenges, each
is answered in turn, and a stop among them too.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import resource
import secrets
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import zmq

from sacflow_robot.errors import DataError, RobotError, UsageError, one_line
from sacflow_robot.robot.control.announcer import announce
from sacflow_robot.robot.control.operator_requests import OperatorRequests
from sacflow_robot.utils.sockets import AddressClaim

PENDING: Final = "pending"
"""State of a request that was accepted, and has not led to a state yet."""

_ENABLE = b"arm"  # the words on the wire
_RUNNING = b"armed"
_LEAST_KEY_BYTES = 16
_LOOPBACK = "tcp://127.0.0.1:", "tcp://localhost:", "ipc://"
_NONCE_S = 5.0  # a nonce is valid for this time at least, and for twice of it at most
_NONCE_BYTES = 32
_MOST_FRAMES = 8  # of a message; one of more takes long to read
_MOST_BYTES = 4096  # of a frame
_UNREAD, _UNSENT = 2, 64  # messages waiting for each connection; more are left to it, or dropped
_OPEN_FILES = 65536
_HANDSHAKE_MS = 5000
_MESSAGES_A_ROUND = 64
_REST_S = 0.001  # after each round: the control loop runs in the same process
_AFTER_ERROR_S = 0.05
_LOOK_S = 0.02
_PATIENCE_S = 0.25  # with one connection
_AGAIN_S = 0.05  # a server that ends all connections drops what it had not read
_RECONNECT_MS = 5
_TRIES = 3
_TICKET = struct.Struct(">Q16s")  # number of the request, proof that the server gave it


def read_key(path: Path | None) -> bytes:
    """A shared key: any file of at least 16 bytes; empty for None.

    Raises:
        DataError: The file cannot be read, or is too short.
    """
    if path is None:
        return b""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise DataError(f"key {path} cannot be read: {one_line(error)}") from None
    if len(key) < _LEAST_KEY_BYTES:
        raise DataError(f"key {path} is shorter than {_LEAST_KEY_BYTES} bytes; make one: openssl rand -hex 32 > {path}")
    return key


_NO_KEY = (
    b"enabling over the network needs a key: give one file to --estop-key there and to --key here, "
    b"or use kill -USR2 on the robot's computer"
)


class StopServer:
    """Listens in a thread of its own, and passes on what is asked; use it as a context manager.

    Args:
        address: Where to listen, e.g. ``tcp://127.0.0.1:5560``; port 0 picks a free one.
        switches: Where the requests go.
        key: Shared key; needed to listen beyond this machine, and to enable from anywhere.

    Attributes:
        address: Where it listens.

    Raises:
        UsageError: It cannot listen there, or should do so without a key.
    """

    def __init__(self, address: str, switches: OperatorRequests, key: bytes = b"") -> None:
        if not key and not address.startswith(_LOOPBACK):
            raise UsageError(
                f"listening for stops at {address}, beyond this machine, needs a key; give one with --estop-key"
            )
        self._switches, self._key = switches, key
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
            return self._accepted(self._switches.stop(f"stopped over the network{said and f': {said}'}"))
        if verb == _ENABLE and self._key:
            return self._accepted(self._switches.enable())
        return [b"refused", _NO_KEY if verb == _ENABLE else b"unknown request"]

    def _shown(self, who: bytes, verb: bytes, reason: bytes, proof: bytes) -> bool:
        """Whether the client knows the key. Its nonce is used up then."""
        for nonce, period in self._nonces.valid(who):
            if hmac.compare_digest(proof, _proof(self._key, nonce, verb, reason)):
                self._nonces.use(nonce, period)
                return True
        return False

    def _accepted(self, number: int) -> list[bytes]:
        return [b"ok", PENDING.encode(), _TICKET.pack(number, self._nonces.mark(number))]

    def _outcome(self, ticket: bytes) -> list[bytes]:
        if len(ticket) != _TICKET.size:
            return [b"refused", b"no ticket of this server"]
        number, mark = _TICKET.unpack(ticket)
        if not hmac.compare_digest(mark, self._nonces.mark(number)):
            return [b"refused", b"no ticket of this server"]
        state = self._switches.outcome(number) or PENDING
        return [b"ok", _RUNNING if state == "running" else state.encode()]

    def _say(self, line: str) -> None:
        """On standard error, once, without waiting for a terminal."""
        if line != self._trouble:
            self._trouble = line
            with suppress(Exception):  # nothing ends this thread
                announce(line)


def _bound(address: str) -> tuple[zmq.Context[Any], zmq.Socket[Any]]:
    """A socket that listens there, in a context of its own: ending that ends the connections, too, before it returns.

    Raises:
        zmq.ZMQError: It cannot listen there.
    """
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
        """The nonce of a connection now."""
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


def request(address: str, verb: str, reason: str = "", key: bytes = b"", timeout_s: float = 2.0) -> str:
    """Have a robot stopped (``stop``) or enabled (``enable``).

    A message that gets no answer is sent again over a new connection, but an enabling request is not: a stop may have come
    after it.

    Args:
        address: Where ``run --estop`` listens.
        verb: ``stop`` or ``enable``.
        reason: What to say there.
        key: Shared key; empty for none.
        timeout_s: Longest wait for the answer and the state together (s).

    Returns:
        The state reached, ``stopped``, ``hold`` or ``running``; :data:`PENDING` if the request was accepted and led to no state
        in time.

    Raises:
        RobotError: Nobody answers there, or the request is refused; says why.
        UsageError: That is no address.
    """
    with _Line(address, timeout_s) as line:
        ticket = _put(line, verb, reason, key)
        while ticket and not line.over:
            state = line.ask([b"outcome", ticket], _PATIENCE_S)
            if state is None:
                line.renew()
            elif state[0] == b"ok" and len(state) == 2 and state[1] != PENDING.encode():
                return "running" if state[1] == _RUNNING else state[1].decode(errors="replace")
            time.sleep(min(_LOOK_S, line.left_s))
    return PENDING


def _put(line: _Line, verb: str, reason: str, key: bytes) -> bytes:
    """Have the request accepted; its ticket, empty from a server that gives none."""
    said = (_ENABLE if verb == "enable" else verb.encode()), reason.encode(errors="replace")[:500]
    failure = f"no answer from {line.address} within {line.timeout_s:g} s"
    tries = 0
    while not line.over:
        nonce = line.ask([b"challenge"], _PATIENCE_S)
        if nonce is not None:
            if nonce[0] == b"refused":  # by what is no stop server, and says so
                failure = f"{line.address} refused to {verb}: {b' '.join(nonce[1:]).decode(errors='replace')}"
                break
            if len(nonce[0]) != _NONCE_BYTES:
                failure = f"what answers at {line.address} is no stop server; give the address of run --estop"
                break
            proven = [*said, _proof(key, nonce[0], *said)]
            # An enabling request is sent once: a stop may have come after it.
            answer = line.ask(proven, line.left_s, again=False) if verb == "enable" else line.ask(proven, _PATIENCE_S)
            if answer is not None:
                how, why = answer[0], b" ".join(answer[1:]).decode(errors="replace")
                if how == b"ok":
                    return answer[2] if len(answer) > 2 else b""
                failure = f"{line.address} {'refused' if how == b'refused' else 'failed'} to {verb}: {why}"
                tries += 1
                # A server that hung up after it had accepted the request takes the same one for used.
                if how == b"refused" and (tries == _TRIES or verb == "enable" or "challenge" not in why):
                    raise RobotError(failure)
            if verb == "enable":
                break
        line.renew()
        time.sleep(min(_LOOK_S, line.left_s))
    raise RobotError(f"{failure}; USE THE ROBOT'S OWN STOP BUTTON")


class _Line:
    """A connection to a stop server, until a time is over.

    It names itself, so that a challenge stays valid when the server hangs up and the connection is made again.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address, self.timeout_s = address, timeout_s
        self._until = time.monotonic() + timeout_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[Any] | None = None

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    @property
    def left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left_s == 0.0

    def renew(self) -> None:
        """Use another connection from now on: answers that come late to what was asked before are not read."""
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None

    def ask(self, frames: list[bytes], patience_s: float, again: bool = True) -> list[bytes] | None:
        """The answer; None if none comes in time. Sent again and again meanwhile, unless that is forbidden.

        Raises:
            UsageError: The address is none.
        """
        if self._socket is None:
            self._socket = self._connected()
        until = min(self._until, time.monotonic() + patience_s)
        while (left_s := until - time.monotonic()) > 0:
            with suppress(zmq.Again):
                self._socket.send_multipart(frames, zmq.NOBLOCK)
            while self._socket.poll(round((min(_AGAIN_S, left_s) if again else left_s) * 1e3)):
                answer = list(self._socket.recv_multipart())
                if frames == [b"challenge"] or len(answer[0]) != _NONCE_BYTES:  # not that of an earlier question
                    return answer
        return None

    def _connected(self) -> zmq.Socket[Any]:
        socket: zmq.Socket[Any] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, b"c" + secrets.token_bytes(16))  # one that begins with 0 is refused
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {self.address}: {error}; expected e.g. tcp://127.0.0.1:5560") from None
        return socket


def _proof(key: bytes, nonce: bytes, verb: bytes, reason: bytes) -> bytes:
    return hmac.new(key or b"none", nonce + verb + b"\0" + reason, hashlib.sha256).digest()
