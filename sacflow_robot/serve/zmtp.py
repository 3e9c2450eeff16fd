"""ZMTP 3.1, what ZeroMQ speaks on a stream, as far as a DEALER socket without keys needs it (rfc.zeromq.org/spec/37)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from sacflow_robot.errors import WireError
from sacflow_robot.serve.protocol import MAX_ARRAYS, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES

VERSION_END = 12
_LONGEST_CONTEXT = 16
_MORE, _LONG, _COMMAND = 1, 2, 4
_SIZE = struct.Struct(">BQ")
_SHORT_BYTES = 256
_SHORT = [[bytes((flags, size)) for size in range(_SHORT_BYTES)] for flags in (0, _MORE)]
_MECHANISM = slice(VERSION_END, 32)
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


class KeysNeededError(Exception):
    """The peer speaks with keys only, or does not let this one in."""


def check_greeting(greeting: bytes) -> None:
    """Whether a peer's first 64 bytes are such that this module can talk to it.

    Raises:
        WireError: They are not ZMTP, or of a version without heartbeats.
        KeysNeededError: It asks for keys.
    """
    if greeting[0] != 0xFF or greeting[9] != 0x7F or (greeting[10], greeting[11]) < (3, 1):
        raise WireError("what answers there does not speak ZMTP 3.1")
    if greeting[_MECHANISM].rstrip(b"\0") != b"NULL":
        raise KeysNeededError


def _command(name: bytes, body: bytes) -> bytes:
    content = bytes([len(name)]) + name + body
    return bytes([_COMMAND, len(content)]) + content


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


_ANSWER = b"ROUTER", b"REP", b"DEALER"
READY = _command(b"READY", _property(b"Socket-Type", b"DEALER") + _property(b"Identity", b""))


def check_ready(body: bytes) -> None:
    """Whether a peer's READY says that it answers requests, as ZeroMQ checks.

    Raises:
        WireError: It is a socket of another type, or says nothing of it.
    """
    properties, at = {}, 0
    while at < len(body):
        name_end = at + 1 + body[at]
        value_end = name_end + 4 + int.from_bytes(body[name_end : name_end + 4], "big")
        properties[body[at + 1 : name_end].lower()] = body[name_end + 4 : value_end]
        at = value_end
    if properties.get(b"socket-type") not in _ANSWER:
        raise WireError("what answers there is a ZeroMQ socket that takes no requests")


def ping(time_to_live_s: float) -> bytes:
    """A heartbeat: the peer answers, and may forget this one if it hears nothing for so long."""
    return _command(b"PING", struct.pack(">H", min(max(1, round(10 * time_to_live_s)), 0xFFFF)))


def pong(context: bytes) -> bytes:
    """The answer to a heartbeat.

    Raises:
        WireError: The heartbeat's context is longer than ZMTP allows.
    """
    if len(context) > _LONGEST_CONTEXT:
        raise WireError("what was received is not ZMTP: a heartbeat's context is too long")
    return _command(b"PONG", context)


def pack(frames: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """What a message is on the stream, in pieces."""
    pieces: list[bytes | memoryview] = []
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        more, size = i < last, len(frame)
        pieces.append(_SHORT[more][size] if size < _SHORT_BYTES else _SIZE.pack(more | _LONG, size))
        pieces.append(frame)
    return pieces


class Reader:
    """Takes a stream apart, however it was cut.

    Attributes:
        commands: Commands since they were last taken from here, as (name, body).
    """

    def __init__(self) -> None:
        self.commands: list[tuple[bytes, bytes]] = []
        self._frames: list[bytes] = []
        self._bytes = 0
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[list[bytes]]:
        """The messages that are complete with this.

        Raises:
            WireError: It is not ZMTP, or larger than the protocol allows.
        """
        messages: list[list[bytes]] = []
        if self._rest:
            self._rest += data
            del self._rest[: self._parse(self._rest, messages)]
        else:
            done = self._parse(data, messages)
            if done < len(data):
                self._rest += data[done:]
        return messages

    def _parse(self, data: bytes | bytearray, messages: list[list[bytes]]) -> int:
        """Append complete messages to ``messages``; how many bytes were used up."""
        start, end = 0, len(data)
        while start + 2 <= end:
            flags, size, begin = data[start], data[start + 1], start + 2
            if flags & _LONG:
                begin = start + 9
                if begin > end:
                    break
                size = int.from_bytes(data[start + 1 : begin], "big")
            if flags & ~(_MORE | _LONG | _COMMAND) or size > MAX_FRAME_BYTES:
                raise WireError("what was received is not ZMTP, or too large")
            start_of_next = begin + size
            if start_of_next > end:
                break
            start, frame = start_of_next, bytes(data[begin:start_of_next])
            if flags & _COMMAND:
                length = frame[0] if frame else 0
                self.commands.append((frame[1 : 1 + length], frame[1 + length :]))
                continue
            self._frames.append(frame)
            self._bytes += size
            if len(self._frames) > MAX_ARRAYS + 1 or self._bytes > MAX_MESSAGE_BYTES + MAX_FRAME_BYTES:
                raise WireError("a message is larger than the protocol allows")
            if not flags & _MORE:
                messages.append(self._frames)
                self._frames, self._bytes = [], 0
        return start
