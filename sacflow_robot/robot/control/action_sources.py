"""Sources of actions, one in each control period."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sacflow_robot.interfaces import Policy
from sacflow_robot.spec import FloatArray, Observation


class ActionStep(Protocol):
    """An action for one control period, None for none; ``joined``: whether a new chunk begins with it."""

    @property
    def action(self) -> FloatArray | None: ...

    @property
    def joined(self) -> bool: ...


class ActionSource(Protocol):
    """A source of actions, one in each control period; ``action_queue.ActionQueue`` is one."""

    def begin(self) -> None:
        """Forget what was planned."""
        ...

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep: ...


@runtime_checkable
class Connected(Protocol):
    """A source behind a connection, which is to be kept while no action is wanted."""

    def keep_alive(self) -> None:
        """Keep the connection, or make it anew; must not wait."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedAction:
    action: FloatArray | None
    joined: bool


class SyncChunking:
    """Chunks one after another, each played to its end: for robots whose time stands still while a policy thinks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.begin()

    def begin(self) -> None:
        self._chunk = np.zeros((0, 0), np.float32)
        self._next = 0

    def step(self, observation: Observation, noise: FloatArray | None = None) -> PlannedAction:
        joined = self._next == len(self._chunk)
        if joined:
            assert noise is not None
            batch = {key: array[None] for key, array in observation.items()}
            self._chunk = self._policy.infer(batch, noise[None])[0]
            self._next = 0
        self._next += 1
        return PlannedAction(self._chunk[self._next - 1], joined)
