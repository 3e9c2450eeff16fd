"""Requests that are evaluated together, and which of them would be answered too late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.session import Refusal, Session
from sacflow_robot.spec import FloatArray

_MEMORY = 0.9  # weight of what was known of durations before the last one


class Request(NamedTuple):
    """One admitted inference request."""

    peer: bytes
    identifier: int
    session: Session
    policy: OnnxPolicy
    inputs: dict[str, FloatArray]
    rows: int
    seed: int | None
    step: int | None
    deadline_ns: int | None
    received_ns: int


def join(requests: Sequence[Request]) -> dict[str, FloatArray]:
    """The inputs of all of them, one after another; those of a lone one as they are."""
    inputs = requests[0].inputs
    if len(requests) == 1:
        return inputs
    return {name: np.concatenate([request.inputs[name] for request in requests]) for name in inputs}


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
