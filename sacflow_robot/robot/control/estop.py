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
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import zmq

from sacflow_robot.errors import DataError, RobotError, UsageError, one_line

PENDING: Final = "pending"
"""State of a request that was accepted, and has not led to a state yet."""

ENABLE: Final = b"arm"  # the words on the wire
RUNNING: Final = b"armed"
NONCE_BYTES: Final = 32
TICKET: Final = struct.Struct(">Q16s")  # number of the request, proof that the server gave it

_LEAST_KEY_BYTES = 16
_LOOK_S = 0.02
_PATIENCE_S = 0.25  # with one connection
_AGAIN_S = 0.05  # a server that ends all connections drops what it had not read
_RECONNECT_MS = 5
_TRIES = 3


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


def proof_of(key: bytes, nonce: bytes, verb: bytes, reason: bytes) -> bytes:
    """The HMAC with which a client answers a challenge."""
    return hmac.new(key or b"none", nonce + verb + b"\0" + reason, hashlib.sha256).digest()


def request(address: str, verb: str, reason: str = "", key: bytes = b"", timeout_s: float = 2.0) -> str:
    """Have a robot stopped (``stop``) or enabled (``enable``).

    A message that gets no answer is sent again over a new connection, but an enabling request is not: a stop may have come
    after it.

    Args:
        address: Where ``run --estop`` listens.
        verb: ``stop`` or ``enable``.
        key: Shared key; empty for none.
        timeout_s: Longest wait for the answer and the state together (s).

    Returns:
        The state reached, ``stopped``, ``hold`` or ``running``; :data:`PENDING` if the request was accepted and led to no state
        in time.

    Raises:
        RobotError: Nobody answers there, or the request is refused; says why.
        UsageError: That is not an address.
    """
    with closing(_Line(address, timeout_s)) as line:
        ticket = _put(line, verb, reason, key)
        while ticket and not line.over:
            state = line.ask([b"outcome", ticket], _PATIENCE_S)
            if state is None:
                line.renew()
            elif state[0] == b"ok" and len(state) == 2 and state[1] != PENDING.encode():
                return "running" if state[1] == RUNNING else state[1].decode(errors="replace")
            time.sleep(min(_LOOK_S, line.left_s))
    return PENDING


def _put(line: _Line, verb: str, reason: str, key: bytes) -> bytes:
    """Have the request accepted; its ticket, empty from a server that gives none."""
    said = (ENABLE if verb == "enable" else verb.encode()), reason.encode(errors="replace")[:500]
    failure = f"no answer from {line.address} within {line.timeout_s:g} s"
    tries = 0
    while not line.over:
        nonce = line.ask([b"challenge"], _PATIENCE_S)
        if nonce is not None:
            if nonce[0] == b"refused":  # by what is not a stop server, and says so
                failure = f"{line.address} refused to {verb}: {b' '.join(nonce[1:]).decode(errors='replace')}"
                break
            if len(nonce[0]) != NONCE_BYTES:
                failure = f"what answers at {line.address} is not a stop server; give the address of run --estop"
                break
            proven = [*said, proof_of(key, nonce[0], *said)]
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
        self.address = address
        self.timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[Any] | None = None

    def close(self) -> None:
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
        """The answer; None if none comes in time. Sent again and again meanwhile, unless that is forbidden."""
        if self._socket is None:
            self._socket = self._connected()
        until = min(self._until, time.monotonic() + patience_s)
        while (left_s := until - time.monotonic()) > 0:
            with suppress(zmq.Again):
                self._socket.send_multipart(frames, zmq.NOBLOCK)
            while self._socket.poll(round((min(_AGAIN_S, left_s) if again else left_s) * 1e3)):
                answer = list(self._socket.recv_multipart())
                if frames == [b"challenge"] or len(answer[0]) != NONCE_BYTES:  # not that of an earlier question
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
