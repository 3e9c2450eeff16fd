"""Episode: the one data type that goes round the circle.

It stands beside ``spec`` rather than inside ``data`` because every room makes or takes episodes, and rooms do not
import each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError
from sacflow_robot.spec import ArmSpec, FloatArray, StepResult


class Source(IntEnum):
    """Who chose the commanded action of a step."""

    POLICY = 0
    HUMAN = 1
    EXPERT = 2
    HOLD = 3


@dataclass(frozen=True)
class Episode:
    """One episode of T steps; step t goes from observation t to observation t + 1.

    Attributes:
        observations: Per key (T + 1, ...), float32; the last row is the observation after the last step.
        commanded: Actions sent to the arm (T, A), float32; what a learner trains on.
        proposed: Actions that the policy asked for (T, A), float32, before any clipping or takeover.
        measured: What the arm did (T, A), float32, NaN where the arm could not tell.
        source: Who chose each action (T,), uint8 values of :class:`Source`.
        rewards: (T,), float32.
        terminated: (T,), bool; the task itself ended at this step.
        truncated: (T,), bool; the horizon, or whoever stopped the recording, cut the episode at this step.
        time_ns: Capture time of each observation (T + 1,), int64 nanoseconds of the clock that ``info`` names.
        states: Full simulator states (T + 1, S), float64, or None.
        info: Seed, success, policy version, clock and whatever else describes the whole episode; JSON values.

    Raises:
        DataError: Lengths differ, a value is not finite, or the episode is empty.
    """

    observations: Mapping[str, FloatArray]
    commanded: FloatArray
    proposed: FloatArray
    measured: FloatArray
    source: npt.NDArray[np.uint8]
    rewards: FloatArray
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    time_ns: npt.NDArray[np.int64]
    states: npt.NDArray[np.float64] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.commanded)
        if steps == 0:
            raise DataError("an episode without steps cannot be used; skip it")
        for name in ("proposed", "measured", "source", "rewards", "terminated", "truncated"):
            if len(getattr(self, name)) != steps:
                raise DataError(f"episode column {name!r} has {len(getattr(self, name))} rows, expected {steps}")
        rows: dict[str, Any] = dict(self.observations, time_ns=self.time_ns)
        if self.states is not None:
            rows["states"] = self.states
        for name, array in rows.items():
            if len(array) != steps + 1:
                raise DataError(f"episode column {name!r} has {len(array)} rows, expected {steps + 1}")
            if not np.isfinite(array).all():
                raise DataError(f"episode column {name!r} holds NaN or infinity")
        if not (np.isfinite(self.commanded).all() and np.isfinite(self.rewards).all()):
            raise DataError("episode actions or rewards hold NaN or infinity")
        if self.terminated[:-1].any() or self.truncated[:-1].any():
            raise DataError("an episode may end only at its last step")

    def __len__(self) -> int:
        return len(self.commanded)

    @property
    def success(self) -> bool:
        """Whether the task was solved; sparse tasks end the episode when they are."""
        return bool(self.info.get("success", self.terminated[-1]))

    def check_fits(self, arm: ArmSpec, origin: str) -> None:
        """Raise DataError, naming ``origin``, unless the arrays have the arm's keys, shapes and action dimension."""
        if self.commanded.shape[1:] != (arm.action_dim,):
            raise DataError(
                f"{origin}: actions have {self.commanded.shape[1]} dimensions, task {arm.task!r} takes {arm.action_dim}"
            )
        for spec in arm.observations:
            if spec.key not in self.observations:
                raise DataError(f"{origin}: no observation {spec.key!r}, which task {arm.task!r} needs")
            if self.observations[spec.key].shape[1:] != spec.shape:
                found = self.observations[spec.key].shape[1:]
                raise DataError(f"{origin}: observation {spec.key!r} has shape {found}, expected {spec.shape}")


class EpisodeBuilder:
    """Collects one episode step by step.

    Args:
        start: What the arm reported at the start of the episode.
        time_ns: Capture time of its observation.
        period_ns: Time between observations, for arms whose time is nominal; else every step brings its own time.
    """

    def __init__(self, start: StepResult, time_ns: int = 0, period_ns: int | None = None) -> None:
        self._observations = {key: [value] for key, value in start.observation.items()}
        self._states = None if start.state is None else [start.state]
        self._times, self._period_ns = [time_ns], period_ns
        self._rows: list[tuple[FloatArray, FloatArray, FloatArray, int, float, bool, bool]] = []
        self._solved = False

    def __len__(self) -> int:
        return len(self._rows)

    def actions(self, action_dim: int) -> FloatArray:
        """Commanded actions so far (T, A)."""
        return np.array([row[0] for row in self._rows], np.float32).reshape(-1, action_dim)

    def add(
        self,
        result: StepResult,
        commanded: FloatArray,
        *,
        proposed: FloatArray | None = None,
        source: Source = Source.POLICY,
        time_ns: int | None = None,
    ) -> None:
        """Add one step: the action sent, what it led to, who chose it, and the capture time of what it led to."""
        if time_ns is None:
            if self._period_ns is None:
                raise DataError("a step of an arm with a clock came without a time")
            time_ns = self._times[-1] + self._period_ns
        for key, column in self._observations.items():
            column.append(result.observation[key])
        if self._states is not None:
            if result.state is None:
                raise DataError("this episode records simulator states, and a step came without one")
            self._states.append(result.state)
        self._times.append(time_ns)
        self._solved |= result.terminated if result.success is None else result.success
        measured = np.full_like(commanded, np.nan) if result.measured is None else result.measured
        asked = commanded if proposed is None else proposed
        row = commanded, asked, measured, int(source), result.reward, result.terminated, result.truncated
        self._rows.append(row)

    def build(self, **info: Any) -> Episode:
        """The episode so far; without an end of its own, its last step is marked truncated.

        Raises:
            DataError: No step was added.
        """
        if not self._rows:
            raise DataError("an episode without steps cannot be used; skip it")
        commanded, proposed, measured, source, rewards, terminated, truncated = zip(*self._rows, strict=True)
        cut = np.array(truncated, bool)
        cut[-1] |= not terminated[-1]
        return Episode(
            observations={k: np.stack(v).astype(np.float32) for k, v in self._observations.items()},
            commanded=np.stack(commanded).astype(np.float32),
            proposed=np.stack(proposed).astype(np.float32),
            measured=np.stack(measured).astype(np.float32),
            source=np.array(source, np.uint8),
            rewards=np.array(rewards, np.float32),
            terminated=np.array(terminated, bool),
            truncated=cut,
            time_ns=np.array(self._times, np.int64),
            states=None if self._states is None else np.stack(self._states).astype(np.float64),
            info={"success": self._solved, **info},
        )
