"""Requests that are evaluated together, and which of them would be answered too late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.serve import wire
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.session import Refusal, Session
from sacflow_robot.serve.shortcut import Packed
from sacflow_robot.spec import FloatArray

_MEMORY = 0.9  # weight of what was known of durations before the last one


class Request(NamedTuple):
    """One admitted inference request."""

    peer: bytes
    identifier: int
    session: Session
    policy: OnnxPolicy
    asked: dict[str, FloatArray] | Packed
    rows: int
    seed: int | None
    step: int | None
    deadline_ns: int | None
    received_ns: int

    @property
    def inputs(self) -> dict[str, FloatArray]:
        """What the policy takes, by name."""
        return self.asked.arrays() if isinstance(self.asked, Packed) else self.asked


def join(requests: Sequence[Request]) -> dict[str, FloatArray]:
    """The inputs of all of them, one after another; those of a lone one as they are."""
    every = [request.inputs for request in requests]
    if len(every) == 1:
        return every[0]
    return {name: np.concatenate([inputs[name] for inputs in every]) for name in every[0]}


def evaluate(requests: Sequence[Request]) -> tuple[FloatArray, dict[str, FloatArray] | None]:
    """Actions (B, H, A) of requests for one policy, one after another; may hold NaN or infinity. And what :func:`join` makes
    of the requests, where that was needed.

    Raises:
        PolicyFileError: The graph cannot be evaluated.
    """
    first = requests[0]
    if len(requests) == 1 and isinstance(first.asked, Packed):
        return first.asked.run(), None
    inputs = join(requests)
    return first.policy.run(inputs), inputs


def too_late() -> Refusal:
    """What a request is told whose answer would come after its deadline."""
    return Refusal("late", "the answer would have come after the request's deadline; nothing was computed")


class Pace:
    """How long an evaluation takes, by the number of rows (to a power of two), learnt from those before."""

    def __init__(self) -> None:
        self._expected_ns: dict[int, float] = {}

    def learn(self, rows: int, duration_ns: int) -> None:
        """An evaluation of so many rows took so long."""
        size = rows.bit_length()
        before = self._expected_ns.get(size, duration_ns)
        self._expected_ns[size] = _MEMORY * before + (1 - _MEMORY) * duration_ns

    def split(self, requests: Sequence[Request], now_ns: int) -> tuple[Sequence[Request], Sequence[Request]]:
        """Those that would be answered in time if they were evaluated together now, and those that would not."""
        if all(request.deadline_ns is None for request in requests):
            return requests, ()
        size = sum(request.rows for request in requests).bit_length()
        ready_ns = now_ns + self._expected_ns.get(size, 0.0)
        in_time = [r for r in requests if r.deadline_ns is None or ready_ns <= r.deadline_ns]
        if not in_time:  # or one slow evaluation would make all that follow late, and none would correct it
            self._expected_ns[size] = _MEMORY * (ready_ns - now_ns)
        return in_time, [r for r in requests if r.deadline_ns is not None and ready_ns > r.deadline_ns]


def takes_prefix(policy: OnnxPolicy) -> bool:
    """Whether the policy completes actions already decided."""
    return bool(getattr(policy, "takes_prefix", False))


def checked(policy: OnnxPolicy, arrays: Mapping[str, Any], noise: Any) -> dict[str, FloatArray]:
    """What the policy takes, from a request's arrays; a prefix that it does not take is ignored.

    Raises:
        InvalidValueError: One is missing, has a wrong shape, or holds NaN or infinity.
    """
    check: Any = policy.check
    prefix, mask = arrays.get(wire.PREFIX), arrays.get(wire.PREFIX_MASK)
    decided = () if not takes_prefix(policy) or (prefix is None and mask is None) else (prefix, mask)
    if any(part is None for part in decided):
        raise InvalidValueError(f"{wire.PREFIX} and {wire.PREFIX_MASK} come together; one of them is missing")
    with np.errstate(over="ignore"):  # a float64 that is none as float32 becomes infinite, and is refused
        inputs: dict[str, FloatArray] = check(arrays, noise, *decided)
    return inputs
