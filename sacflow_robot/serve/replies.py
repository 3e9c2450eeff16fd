"""Replies of a policy server, as its clients read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sacflow_robot.errors import (
    DataError,
    DeadlineExceeded,
    RefusedError,
    ServerError,
    ServerRestartedError,
    SpecMismatchError,
    WireError,
)
from sacflow_robot.serve import protocol as wire
from sacflow_robot.spec import FloatArray, PolicySpec

_SHORTEST_HEARTBEAT_S = 0.001
_LONGEST_HEARTBEAT_S = 3600.0


class Welcome(NamedTuple):
    """The answer to ``hello``."""

    spec: PolicySpec
    policy_version: str
    session: str
    seed: int
    heartbeat_s: float
    takes_prefix: bool


def decode(frames: list[Any], address: str) -> wire.Message:
    """The reply in these frames.

    Raises:
        ServerError: What answers at ``address`` is no policy server.
    """
    if frames[0] == wire.STOP_REFUSED:
        raise ServerError(f"{address} is where a robot listens for stops (run --estop); give the policy server's")
    try:
        return wire.decode(frames)
    except WireError as error:
        raise ServerError(f"{address} does not speak the protocol: {error}") from None


def welcome(reply: wire.Message, address: str) -> Welcome:
    """Read the answer to ``hello``.

    Raises:
        ServerError: It lacks a field, or has one that cannot be.
    """
    header = reply.header
    try:
        heartbeat_s = float(header["heartbeat_s"])
        if not _SHORTEST_HEARTBEAT_S <= heartbeat_s <= _LONGEST_HEARTBEAT_S:
            raise ValueError(f"a heartbeat of {heartbeat_s} s cannot be kept")
        return Welcome(
            spec=PolicySpec.from_json(header["spec"]),
            policy_version=str(header["policy_version"]),
            session=str(header["session"]),
            seed=int(header["seed"]),
            heartbeat_s=heartbeat_s,
            takes_prefix=header.get("takes_prefix") is True,
        )
    except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
        raise ServerError(f"{address} did not introduce itself as a policy server: {error}") from None


def actions(reply: wire.Message, shape: tuple[int, int], address: str) -> FloatArray:
    """The actions (B, H, A) of a reply, for ``shape`` (H, A).

    Raises:
        ServerError: It has none, or of another shape or dtype.
    """
    array = reply.arrays.get("actions")
    if array is not None and array.dtype == np.float32 and array.ndim == 3 and len(array) and array.shape[1:] == shape:
        return array
    raise ServerError(f"{address} answered without float32 actions of shape (B, {shape[0]}, {shape[1]})")


def failure(error: object, address: str) -> ServerError | SpecMismatchError:
    """The exception for a reply's ``error``."""
    kind, message = (error.get("kind"), error.get("message")) if isinstance(error, dict) else (None, None)
    reason = message or "it gave no reason"
    if kind == "late":
        return DeadlineExceeded(f"{address}: {reason}")
    if kind == "mismatch":
        return SpecMismatchError(f"{address}: {reason}")
    if kind == "session":
        return ServerRestartedError(f"{address} was restarted; nothing asked before counts any more, ask again")
    return RefusedError(f"{address} refused the request: {reason}")
