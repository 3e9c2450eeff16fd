"""Stop, and arm, a running arm over the network.

A client asks for a challenge, and answers it with what it wants and an HMAC-SHA256 of both under a shared key, so that
nobody can send a request again that he has overheard. Without a key, only this machine may stop, and nobody may arm.

    client                         server
    ["challenge"]              →
                               ←   [nonce, 32 bytes]
    [verb, reason, hmac]       →                        verb: stop, arm
                               ←   ["ok"] or ["refused", why]
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import zmq

from sacflow_robot.errors import DataError, RobotError, UsageError, one_line
from sacflow_robot.robot.switches import Switches

_REMEMBERED = 256  # challenges open at a time
_LEAST_KEY_BYTES = 16
_LOOPBACK = "tcp://127.0.0.1:", "tcp://localhost:", "ipc://"


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


class StopServer:
    """Listens in a thread of its own, and passes on what is asked; use it as a context manager.

    Args:
        address: Where to listen, e.g. ``tcp://127.0.0.1:5560``; port 0 picks a free one.
        switches: Where the requests go.
        key: Shared key; needed to listen beyond this machine, and to be armed from anywhere.

    Attributes:
        address: Where it listens.

    Raises:
        UsageError: It cannot listen there, or should do so without a key.
    """

    def __init__(self, address: str, switches: Switches, key: bytes = b"") -> None:
        if not key and not address.startswith(_LOOPBACK):
            raise UsageError(f"listening for stops at {address}, beyond this machine, needs a key; give one")
        self._switches, self._key = switches, key
        self._open: OrderedDict[bytes, bytes] = OrderedDict()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise UsageError(f"cannot listen for stops at {address}: {error}") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="stop server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._context.destroy(linger=100)

    def __enter__(self) -> StopServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while not self._done.is_set():
            if self._socket.poll(100):
                who, *frames = self._socket.recv_multipart()
                self._socket.send_multipart([who, *self._answer(who, frames)])

    def _answer(self, who: bytes, frames: list[bytes]) -> list[bytes]:
        if frames == [b"challenge"]:
            self._open[who] = secrets.token_bytes(32)
            while len(self._open) > _REMEMBERED:
                self._open.popitem(last=False)
            return [self._open[who]]
        nonce = self._open.pop(who, None)
        if len(frames) != 3 or nonce is None:
            return [b"refused", b"ask for a challenge first"]
        verb, reason, proof = frames
        if self._key and not hmac.compare_digest(proof, _proof(self._key, nonce, verb, reason)):
            return [b"refused", b"the key is not the right one"]
        if verb == b"stop":
            self._switches.stop(f"stopped over the network: {reason.decode(errors='replace') or 'no reason given'}")
        elif verb == b"arm" and self._key:
            self._switches.arm()
        else:
            return [b"refused", b"arming over the network needs a key" if verb == b"arm" else b"unknown request"]
        return [b"ok"]


def request(address: str, verb: str, reason: str = "", key: bytes = b"", timeout_s: float = 2.0) -> None:
    """Have an arm stopped (``stop``) or armed (``arm``).

    Raises:
        RobotError: Nobody answers there, or the request is refused; says why.
    """
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(address)
        nonce = _ask(socket, [b"challenge"], address, timeout_s)[0]
        said = verb.encode(), reason.encode()[:500]
        answer = _ask(socket, [*said, _proof(key, nonce, *said)], address, timeout_s)
    except zmq.ZMQError as error:
        raise UsageError(f"cannot connect to {address}: {error}; expected e.g. tcp://127.0.0.1:5560") from None
    finally:
        context.destroy(linger=0)
    if answer[0] != b"ok":
        raise RobotError(f"{address} refused to {verb}: {b' '.join(answer[1:]).decode(errors='replace')}")


def _ask(socket: zmq.Socket[Any], frames: list[bytes], address: str, timeout_s: float) -> list[bytes]:
    socket.send_multipart(frames)
    if not socket.poll(round(timeout_s * 1e3)):
        raise RobotError(f"no answer from {address} within {timeout_s:g} s; USE THE ARM'S OWN STOP BUTTON")
    return list(socket.recv_multipart())


def _proof(key: bytes, nonce: bytes, verb: bytes, reason: bytes) -> bytes:
    return hmac.new(key or b"none", nonce + verb + b"\0" + reason, hashlib.sha256).digest()
