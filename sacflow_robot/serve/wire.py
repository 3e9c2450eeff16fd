"""Wire protocol, version 1: a msgpack header frame followed by one raw frame per array. Written down in
``docs/protocol.md``; no pickle, nothing executable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from sacflow_robot.errors import WireError
from sacflow_robot.spec import FloatArray

VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
_MAX_DIMENSIONS, _MAX_EXTENT = 8, 2**24
_DTYPE = "<f4"


@dataclass(frozen=True)
class Message:
    """One request or reply.

    Attributes:
        header: Fields besides ``v`` and ``arrays``.
        arrays: Float32 arrays by name.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, FloatArray] = field(default_factory=dict)


def encode(message: Message) -> list[bytes]:
    """Frames of a message: header, then the bytes of each array in C order, little-endian float32."""
    arrays = {name: np.asarray(array, _DTYPE, order="C") for name, array in message.arrays.items()}
    layout = [{"name": name, "dtype": _DTYPE, "shape": array.shape} for name, array in arrays.items()]
    header = msgpack.packb({"v": VERSION, **message.header, "arrays": layout})
    return [header, *(array.tobytes() for array in arrays.values())]


def decode(frames: Sequence[bytes]) -> Message:
    """Inverse of :func:`encode`; arrays are read-only views of the frames.

    Raises:
        WireError: The frames are not a message of this version.
    """
    try:
        header = msgpack.unpackb(frames[0], raw=False, strict_map_key=True)
    except (ValueError, IndexError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"header frame is not msgpack ({error})") from None
    if not isinstance(header, dict):
        raise WireError("header frame is not a msgpack map")
    if header.pop("v", None) != VERSION:
        raise WireError(f"protocol version is not {VERSION}; use a client and a server of the same release")
    layout = header.pop("arrays", [])
    if not isinstance(layout, list) or len(layout) != len(frames) - 1:
        raise WireError("header does not describe the array frames that follow it")
    arrays = {}
    for entry, frame in zip(layout, frames[1:], strict=True):
        try:
            name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
        except (KeyError, TypeError, IndexError):
            raise WireError("an array's description lacks name, dtype or shape") from None
        if not isinstance(name, str) or dtype != _DTYPE:
            raise WireError(f"array {name!r} has dtype {dtype!r}; the protocol carries {_DTYPE!r} only")
        if not _is_shape(shape) or len(frame) != 4 * math.prod(shape):
            raise WireError(f"array {name!r} has {len(frame)} bytes, which shape {str(shape)[:80]} does not take")
        arrays[name] = np.frombuffer(frame, _DTYPE).reshape(shape)
    return Message(header, arrays)


def _is_shape(shape: object) -> bool:
    """Whether it is a list of few, not negative and not absurd whole numbers."""
    return (
        isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n <= _MAX_EXTENT for n in shape)
    )
