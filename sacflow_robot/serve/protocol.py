"""Wire protocol, version 2: a msgpack header frame followed by one raw frame per array. Written down in
``docs/protocol.md``; no pickle, nothing executable, and nothing that a peer sent is ever repeated in an error."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from sacflow_robot.errors import WireError

VERSION = 2
MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_ANSWER_HEADER_BYTES = 1024 * 1024  # it holds a policy's specification
MAX_ARRAYS = 64
PREFIX, PREFIX_MASK = "prefix", "prefix_mask"
STOP_REQUESTS = b"challenge", b"stop", b"arm", b"outcome"
"""First frames of what ``sacflow-robot estop`` sends, to a robot's stop server."""
STOP_REFUSED = b"refused"
_PEER_QUEUE = 64  # messages that wait for, or from, one client; beyond that it waits, or loses answers
_MAX_DIMENSIONS, _MAX_EXTENT = 8, 2**24
# A header's maps and lists: each costs its reader fifty times as much as its sender.
_MAX_ENTRIES, _MAX_CONTAINERS = 4096, 4096
_MAX_VALUES = 2**16  # of other protocols' messages, which carry arrays as numbers too
_NO_CONTAINERS = bytes(set(range(256)) - {*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF})
_DTYPES = {name: np.dtype(name) for name in ("<f4", "<f8", "|u1", "<i4", "<i8", "|b1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# As integers: arithmetic on pyzmq's enums takes a microsecond, on every frame.
NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE, _EVENTS, _POLLIN = int(zmq.SNDMORE), int(zmq.EVENTS), int(zmq.POLLIN)
_COPY_BELOW = 64 * 1024
give_way = getattr(os, "sched_yield", lambda: time.sleep(0))
"""Let another thread or process have this core, where one waits for it."""

Array = npt.NDArray[Any]
Frame = bytes | memoryview | zmq.Frame


class Message(NamedTuple):
    """One request or reply.

    Attributes:
        header: The fields of its header besides ``v`` and ``arrays``.
        arrays: Arrays by name.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, Array] = {}


def speaks_ipv6(address: str) -> bool:
    """True if ZeroMQ has to be told that an address is IPv6; where it is told, names become IPv6 addresses first."""
    return address.startswith("tcp://[")


def configure_router(socket: zmq.Socket[bytes], receive_ms: int, bind: str = "") -> None:
    """Bounds of a server's socket, so that no client costs more than its share, dead or alive."""
    # No ZMQ_HEARTBEAT_IVL here: libzmq 4.3.5 aborts (!_io_error, stream_engine_base.cpp) when a heartbeat is due to a client that
    # died while its queue was full. The clients' heartbeats are answered, and the time to live in them is kept to.
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.RCVTIMEO, receive_ms),
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.SNDHWM, _PEER_QUEUE),
        (zmq.RCVHWM, _PEER_QUEUE),
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.HANDSHAKE_IVL, 5000),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 10),
        (zmq.IPV6, speaks_ipv6(bind)),
    ):
        socket.setsockopt(option, value)


def encode(message: Message) -> list[bytes | memoryview]:
    """Frames of a message: header, then the bytes of each array in C order, little-endian.

    The frames of arrays of 64 KiB and more are their own memory, not copies, where they are contiguous.

    Raises:
        WireError: An array has a dtype that the protocol does not carry.
    """
    layout, frames = [], []
    for name, value in message.arrays.items():
        array = np.asarray(value, order="C")
        dtype = _NAMES.get(array.dtype)
        if dtype is None:
            raise WireError(f"array {name!r} has dtype {array.dtype}; the protocol carries {', '.join(_DTYPES)}")
        layout.append((name, dtype, array.shape))
        frames.append(array.tobytes() if array.nbytes < _COPY_BELOW else array.data.cast("B"))
    return [msgpack.packb({"v": VERSION, **message.header, "arrays": layout}), *frames]


def send(socket: zmq.Socket[bytes], frames: Sequence[Frame], flags: int = 0) -> None:
    """Send a message at once or not at all; frames of 64 KiB and more are not copied.

    Raises:
        zmq.ZMQError: The peer is unknown, or takes no more.
    """
    for frame in frames[:-1]:
        socket.send(frame, flags | _SNDMORE, copy=len(frame) < _COPY_BELOW)
    socket.send(frames[-1], flags, copy=len(frames[-1]) < _COPY_BELOW)


def has_come(socket: zmq.Socket[Any]) -> bool:
    return bool(int(socket.get(_EVENTS)) & _POLLIN)


def receive(socket: zmq.Socket[bytes], flags: int = 0, heads: int = 1) -> list[Any]:
    """The next message: ``heads`` frames as bytes (routing identity, header), array frames as they lie in memory.

    Of frames beyond those that a message may have, one is kept.

    Raises:
        zmq.Again: No message has arrived yet.
    """
    return as_heads(receive_frames(socket, flags), heads)


def receive_frames(socket: zmq.Socket[bytes], flags: int = 0) -> list[Any]:
    """As :func:`receive`, with no frame made bytes: the first one tells whose the connection is."""
    frame: Any = socket.recv(flags, copy=False)
    frames = [frame]
    while frame.more:
        frame = socket.recv(0, copy=False)
        if len(frames) <= MAX_ARRAYS + 2:
            frames.append(frame)
    return frames


def as_heads(frames: list[Any], heads: int) -> list[Any]:
    """The same frames, the first ``heads`` of them bytes."""
    for i, head in enumerate(frames[:heads]):
        if len(head) <= MAX_HEADER_BYTES:  # a larger one is refused unread, or is an answer
            frames[i] = head.bytes
    return frames


def decode(frames: Sequence[Any]) -> Message:
    """Inverse of :func:`encode`, for answers; arrays are read-only views of the frames.

    Raises:
        WireError: The frames are not a message of this version.
    """
    return decode_arrays(decode_header(frames, MAX_ANSWER_HEADER_BYTES), frames)


def decode_header(frames: Sequence[Any], most_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The header, still with ``arrays``; the first thing to know of a message, for it says whom to answer.

    Raises:
        WireError: It is not a header of this version, or too large.
    """
    if not frames or len(frames[0]) > most_bytes:
        raise WireError(f"a header frame has 1 to {most_bytes} bytes")
    content = bytes(frames[0])
    if len(content) > _MAX_CONTAINERS and len(content.translate(None, _NO_CONTAINERS)) > _MAX_CONTAINERS:
        raise WireError(f"a header has {_MAX_CONTAINERS} maps and lists at most")
    try:
        header = msgpack.unpackb(
            content, raw=False, strict_map_key=True, max_array_len=_MAX_ENTRIES, max_map_len=_MAX_ENTRIES
        )
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException):
        raise WireError("the header frame is not msgpack with string keys") from None
    if not isinstance(header, dict):
        raise WireError("the header frame is not a msgpack map")
    if header.pop("v", None) != VERSION:
        raise WireError(f"protocol version is not {VERSION}; use a client and a server of the same release")
    return header


def unpack_bounded(data: bytes, hook: Callable[[dict[Any, Any]], Any], arrays: str) -> Any:
    """Unpack msgpack data of other protocols, each map passed through ``hook``: few values, however large their arrays.

    Raises:
        WireError: It is not msgpack of plain values and such ``arrays``, or holds too much.
    """
    left = _MAX_VALUES

    def counted(value: Any) -> Any:
        nonlocal left
        left -= 1 + len(value)
        if left < 0:
            raise ValueError("too many values")
        return hook(value) if isinstance(value, dict) else value

    limits = {"max_array_len": _MAX_VALUES, "max_map_len": _MAX_ENTRIES}
    try:
        return msgpack.unpackb(data, object_hook=counted, list_hook=counted, strict_map_key=False, raw=False, **limits)
    except (ValueError, TypeError, KeyError, EOFError, RecursionError, msgpack.exceptions.UnpackException):
        raise WireError(f"the message is not msgpack of plain values and {arrays} arrays") from None


def decode_arrays(header: dict[str, Any], frames: Sequence[Any]) -> Message:
    """The message with that header.

    Raises:
        WireError: The frames are not what the header says.
    """
    layout = header.pop("arrays", [])
    if not isinstance(layout, list) or len(layout) != len(frames) - 1 or len(layout) > MAX_ARRAYS:
        raise WireError("the header does not describe the array frames that follow it")
    arrays: dict[str, Array] = {}
    total = 0
    for i, (entry, frame) in enumerate(zip(layout, frames[1:], strict=True)):
        if type(entry) is not list or len(entry) != 3 or type(entry[0]) is not str or type(entry[1]) is not str:
            raise WireError(f"the description of array {i} is not [name, dtype, shape]")
        name, kind, shape = entry
        dtype, size = _DTYPES.get(kind), len(frame)
        if dtype is None:
            raise WireError(f"array {i} has a dtype that the protocol does not carry; valid: {', '.join(_DTYPES)}")
        if not _is_shape(shape) or size != dtype.itemsize * math.prod(shape):
            raise WireError(f"array {i} has {size} bytes, which its shape and dtype do not take")
        total += size
        array: Array = np.ndarray(shape, dtype, frame)
        # A frame starts anywhere in the buffer that came from the network; what computes on it expects whole words.
        arrays[name] = array if array.flags.aligned else array.copy()
    if total > MAX_MESSAGE_BYTES:
        raise WireError(f"a message has {MAX_MESSAGE_BYTES} bytes at most")
    return Message(header, arrays)


def _is_shape(shape: object) -> bool:
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        return False
    for extent in shape:  # noqa: SIM110 - all() takes twice as long, on every array of every request
        if type(extent) is not int or not 0 <= extent <= _MAX_EXTENT:
            return False
    return True
