"""One connection of a client that speaks ZeroMQ's protocol itself: read and written by whoever calls, without a thread."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

from sacflow_robot.errors import WireError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve import zmtp

_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([1-9][0-9]{0,4})")
_IPC = re.compile(r"ipc://(@?)([^\0]+)")
_LAST_PORT = 2**16 - 1
_LONGEST_PATH = 107
_CHUNK = 2**16
_KEPT = 64  # answers that nobody collects; the oldest are dropped
_JOINED = 2**16  # above, the pieces of a message are handed to the system as they lie in memory
_HANDSHAKE_S = 5.0

Place = tuple[str, int] | str
"""Host and port, or the path of a Unix socket (with a zero byte in front: an abstract name)."""


def place_of(address: str) -> Place | None:
    """Where to connect to; None for what only ZeroMQ understands, or nobody."""
    if not hasattr(select, "poll"):
        return None
    tcp, ipc = _TCP.fullmatch(address), _IPC.fullmatch(address)
    if tcp is not None and int(tcp[3]) <= _LAST_PORT:
        return tcp[1] or tcp[2], int(tcp[3])
    if ipc is None or len(os.fsencode(ipc[1] + ipc[2])) > _LONGEST_PATH:
        return None
    return ("\0" if ipc[1] else "") + ipc[2]


class Link:
    """One connection, from its handshake to its end.

    Attributes:
        inbox: Messages that have come and were not collected.
        reading: Held by whoever reads; there is one reader at a time.
        unsent: What the system did not take yet (bytes).
        heard: When something came last (s, monotonic clock).

    Args:
        place: Where to connect to.

    Raises:
        OSError: Nobody is there, or does not shake hands in time.
        UnicodeError: It is no name that a computer can have.
        WireError: What answers there is no ZeroMQ.
        KeysNeededError: It lets nobody in without keys.
    """

    def __init__(self, place: Place) -> None:
        if isinstance(place, str):
            self.socket = socket.socket(socket.AF_UNIX)
        else:
            self.socket = socket.create_connection(place, _HANDSHAKE_S)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader, self.inbox = zmtp.Reader(), deque[list[bytes]](maxlen=_KEPT)
        self.reading, self._writing = threading.Lock(), threading.Lock()
        self.unsent, self.heard = bytearray(), time.monotonic()
        self._come = select.poll()
        try:
            if isinstance(place, str):
                self.socket.settimeout(_HANDSHAKE_S)
                self.socket.connect(place)
            self._shake_hands()
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise
        self._come.register(self.socket, select.POLLIN)

    def _shake_hands(self) -> None:
        if self.socket.getsockname() == self.socket.getpeername() != "":
            raise ConnectionRefusedError  # nobody serves there, and the system connected the socket to itself
        deadline = time.monotonic() + _HANDSHAKE_S
        # In two parts: a server with keys hangs up on reading that there are none here, before it has said what it asks for.
        self.socket.sendall(zmtp.GREETING[: zmtp.VERSION_END])
        zmtp.check_greeting(self._exactly(len(zmtp.GREETING), deadline))
        self.socket.sendall(zmtp.GREETING[zmtp.VERSION_END :] + zmtp.READY)
        while not self._reader.commands:
            if self._reader.feed(self._exactly(1, deadline)):
                raise WireError("what answers there sends messages before it has introduced itself")
        name, body = self._reader.commands.pop()
        if name != b"READY":
            raise zmtp.KeysNeededError
        zmtp.check_ready(body)

    def _exactly(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            self.socket.settimeout(max(1e-3, deadline - time.monotonic()))  # whoever sends byte by byte has no more
            if time.monotonic() >= deadline:
                raise TimeoutError
            data += (more := self.socket.recv(size - len(data)))
            if not more:
                raise ConnectionResetError
        return data

    def come(self, wait_ms: float) -> bool:
        """Whether there is something to take, or will be in time; with ``reading`` held."""
        return bool(self._come.poll(wait_ms))

    def has_come(self) -> bool:
        """Whether there is something that nobody has taken yet; whoever holds ``reading``."""
        come = select.poll()
        come.register(self.socket, select.POLLIN)
        return bool(come.poll(0))

    def take(self) -> None:
        """Read what has come, with ``reading`` held.

        Raises:
            OSError, WireError: The connection has ended, or what came is not ZMTP.
        """
        try:
            data = self.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError
        self.heard = time.monotonic()
        self.inbox.extend(self._reader.feed(data))
        while self._reader.commands:
            name, body = self._reader.commands.pop()
            if name == b"PING":
                self.send([zmtp.pong(body[2:])])

    def send(self, pieces: Sequence[bytes | memoryview]) -> bool:
        """Hand over to the system; whether it took all, or something was left for :meth:`flush`.

        Raises:
            OSError: The connection has ended, or takes nothing for long.
        """
        with self._writing:
            if self.unsent:
                if len(self.unsent) > wire.MAX_MESSAGE_BYTES:
                    raise BrokenPipeError
                self.unsent += b"".join(pieces)
                return False
            size, sent = sum(map(len, pieces)), 0
            with contextlib.suppress(BlockingIOError):
                sent = self.socket.send(b"".join(pieces)) if size < _JOINED else self.socket.sendmsg(pieces)
            if sent < size:
                self.unsent += b"".join(pieces)[sent:]
            return sent == size

    def flush(self) -> None:
        """Hand over more of what was left.

        Raises:
            OSError: The connection has ended.
        """
        with self._writing, contextlib.suppress(BlockingIOError):
            del self.unsent[: self.socket.send(self.unsent)]

    def end(self) -> None:
        """Wake whoever waits for something from it."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release it, once nobody reads or writes any more."""
        with self.reading, self._writing:
            self.socket.close()
