"""Where actions come from, one in each control period."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sacflow_robot.interfaces import Policy
from sacflow_robot.spec import FloatArray, Observation


class ActionStep(Protocol):
    """What a chooser says in one control period; ``serve.stream.StreamStep`` is one."""

    @property
    def action(self) -> FloatArray | None: ...

    @property
    def joined(self) -> bool: ...


class ActionSource(Protocol):
    """Where actions come from, one in each control period; ``serve.stream.ActionQueue`` is one."""

    def begin(self) -> None:
        """Forget what was planned."""
        ...

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep: ...


@runtime_checkable
class Connected(Protocol):
    """A chooser behind a connection, which is to be kept while nothing is chosen."""

    def keep_alive(self) -> None:
        """Keep the connection, or make it anew; must not wait."""
        ...


@dataclass(frozen=True, slots=True)
class _Planned:
    action: FloatArray
    joined: bool


class SyncChunking:
    """Chunks one after another, each played to its end: for robots whose time stands still while a policy thinks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.begin()

    def begin(self) -> None:
        self._chunk, self._next = np.zeros((0, 0), np.float32), 0

    def step(self, observation: Observation, noise: FloatArray | None = None) -> _Planned:
        joined = self._next == len(self._chunk)
        if joined:
            assert noise is not None
            batch = {key: array[None] for key, array in observation.items()}
            self._chunk, self._next = self._policy.infer(batch, noise[None])[0], 0
        self._next += 1
        return _Planned(self._chunk[self._next - 1], joined)
