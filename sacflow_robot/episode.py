"""Episode: the one data type that every package makes or takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec

# Clock of robots for which time stands still between commands.
NOMINAL_CLOCK = "nominal control rate, from the start of the episode"

LOOP_CLOCK = "monotonic of the robot's computer"  # clock of what a control loop recorded


class Source(IntEnum):
    """Source of a step's action."""

    POLICY = 0
    HUMAN = 1
    EXPERT = 2
    HOLD = 3


class StepFlag(IntFlag):
    """Unusual facts about a step; bits of one byte."""

    LATE = 1  # the action was not ready within one control period of the observation it follows
    CLIPPED = 2  # action differs from policy_action, because of the robot's bounds or the profile's limits
    HELD = 4  # no fresh action was there; the last one, or a standstill, was commanded
    CHUNK_START = 8  # first action of a newly inferred chunk
    OBS_INVALID = 16  # the observation that the step led to held NaN or infinity; the one before stands in its place
    UNKNOWN = 128  # the recorder kept no flags


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one action, or of starting an episode (then with reward 0)."""

    observation: dict[str, FloatArray]  # observation after the step, unbatched
    reward: float = 0.0  # task reward of the step
    terminated: bool = False  # the task itself ended
    truncated: bool = False  # the horizon cut the episode
    # full simulator state (S,) after the step; None on a robot that has none
    state: npt.NDArray[np.float64] | None = None
    measured: FloatArray | None = None  # what the robot did (A,), in action units, where it can tell; else None
    success: bool | None = None  # whether the task is solved; None where ending is solving, as in the robosuite tasks
    # when the observation was captured, in nanoseconds of the clock that the control loop runs on, where the robot can
    # tell; else None, and it counts as captured when it was received
    time_ns: int | None = None
    # why there is nothing newer, where the observation is old and the robot can tell; else empty
    stale_reason: str = ""
    action: FloatArray | None = None  # action executed (A,), where a wrapper changed the one given; else None
    info: Mapping[str, Any] = field(default_factory=dict)  # what to log of the episode that starts with this result

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


UNKNOWN_TIME = -1  # a time that nobody took
STEP_TIMES = ("received_ns", "inferred_ns", "sent_ns")


class Step(NamedTuple):
    """One step as the control loop hands it to a recorder: an action, its story, and what it led to."""

    result: StepResult  # what came of the action
    action: FloatArray  # action sent to the robot (A,), float32
    time_ns: int  # capture time of the result's observation (ns)
    policy_action: FloatArray | None = None  # action that the policy asked for (A,); the one sent if None
    source: int = Source.POLICY  # who chose the action
    flags: int = StepFlag.UNKNOWN  # bits of :class:`StepFlag`
    received_ns: int = UNKNOWN_TIME  # when the observation that the action follows reached the loop (ns)
    inferred_ns: int = UNKNOWN_TIME  # when the policy's answer that the action is from reached the loop (ns)
    sent_ns: int = UNKNOWN_TIME  # when the action was sent to the robot (ns)
    # action that a person asked for (A,), before the safety filter; None while nobody intervenes
    intervention_action: FloatArray | None = None


@dataclass(frozen=True)
class Episode:
    """One episode of T steps; step t goes from observation t to observation t + 1.

    Attributes:
        observations: Per key (T + 1, ...), float32 or what the robot declares, e.g. uint8 for images; the last row is the observation after the last step.
        action: Actions sent to the robot (T, A), float32; what a learner trains on.
        policy_action: Actions that the policy asked for (T, A), float32, before any clipping or intervention; where it
            asked for none, the ones sent.
        measured: What the robot did (T, A), float32, NaN where the robot could not tell.
        source: Who chose each action (T,), uint8 values of :class:`Source`.
        rewards: (T,), float32.
        terminated: (T,), bool; the task itself ended at this step.
        truncated: (T,), bool; the horizon, or the end of the recording, cut the episode at this step.
        time_ns: Capture time of each observation (T + 1,), int64 nanoseconds of the clock that ``info`` names.
        states: Full simulator states (T + 1, S), float64, or None.
        received_ns: When the observation before each action reached the control loop (T,), int64 nanoseconds of the same
            clock, ``UNKNOWN_TIME`` where nobody took it; None where that holds for every step.
        inferred_ns: When the policy's answer that each action is from reached the loop (T,), likewise.
        sent_ns: When each action was sent to the robot (T,), likewise.
        flags: Bits of :class:`StepFlag` (T,), uint8, or None.
        intervention_action: Actions that a person asked for (T, A), float32, before the safety filter, NaN where nobody
            intervened; None where that holds for every step.
        info: Seed, success, policy version, clock and whatever else describes the whole episode; JSON values.

    Raises:
        DataError: Lengths differ, a value is not finite, or the episode is empty.
    """

    observations: Mapping[str, FloatArray]
    action: FloatArray
    policy_action: FloatArray
    measured: FloatArray
    source: npt.NDArray[np.uint8]
    rewards: FloatArray
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    time_ns: npt.NDArray[np.int64]
    states: npt.NDArray[np.float64] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    received_ns: npt.NDArray[np.int64] | None = None
    inferred_ns: npt.NDArray[np.int64] | None = None
    sent_ns: npt.NDArray[np.int64] | None = None
    flags: npt.NDArray[np.uint8] | None = None
    intervention_action: FloatArray | None = None

    def __post_init__(self) -> None:
        steps = len(self.action)
        if steps == 0:
            raise DataError("an episode without steps cannot be used; skip it")
        told = "policy_action", "measured", "source", "rewards", "terminated", "truncated", *STEP_TIMES, "flags"
        for name in (*told, "intervention_action"):
            column = getattr(self, name)
            if column is not None and len(column) != steps:
                raise DataError(f"episode column {name!r} has {len(column)} rows, expected {steps}")
        rows: dict[str, Any] = dict(self.observations, time_ns=self.time_ns)
        if self.states is not None:
            rows["states"] = self.states
        for name, array in rows.items():
            if len(array) != steps + 1:
                raise DataError(f"episode column {name!r} has {len(array)} rows, expected {steps + 1}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"episode column {name!r} contains NaN or infinity")
        if not (np.isfinite(self.action).all() and np.isfinite(self.rewards).all()):
            raise DataError("episode actions or rewards contain NaN or infinity")
        if self.terminated[:-1].any() or self.truncated[:-1].any():
            raise DataError("an episode may end only at its last step")

    def __len__(self) -> int:
        return len(self.action)

    @property
    def success(self) -> bool:
        """True if the task was solved; sparse tasks end the episode then."""
        return bool(self.info.get("success", self.terminated[-1]))

    @property
    def paced(self) -> bool:
        """True if its times should be those of the control rate.

        Those of a robot in lockstep are not, for its time stands still between commands; what control loops recorded before
        they said so may be of either kind.
        """
        return not self.info.get("lockstep", self.info.get("clock") == LOOP_CLOCK)

    def cut(self, first: int, stop: int) -> "Episode":
        """Steps first to stop - 1 as an episode of their own, truncated unless the task ended with the last of them."""
        columns: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray):  # those of observations have a row more than those of steps
                columns[f.name] = value[first : stop + len(value) - len(self)]
        observations = {key: rows[first : stop + 1] for key, rows in self.observations.items()}
        truncated = columns.pop("truncated").copy()
        truncated[-1] |= not columns["terminated"][-1]
        return replace(self, observations=observations, truncated=truncated, **columns)

    def check_fits(self, robot: RobotSpec, origin: str) -> None:
        """Raise DataError, naming ``origin``, unless the arrays have the robot's keys, shapes and action dimension."""
        if self.action.shape[1:] != (robot.action_dim,):
            raise DataError(
                f"{origin}: actions have {self.action.shape[1]} dimensions, task {robot.task!r} takes {robot.action_dim}"
            )
        for spec in robot.observations:
            if spec.key not in self.observations:
                raise DataError(f"{origin}: no observation {spec.key!r}, which task {robot.task!r} needs")
            if self.observations[spec.key].shape[1:] != spec.shape:
                found = self.observations[spec.key].shape[1:]
                raise DataError(f"{origin}: observation {spec.key!r} has shape {found}, expected {spec.shape}")


class EpisodeBuilder:
    """Collects one episode step by step.

    Args:
        time_ns: Capture time of its observation.
        period_ns: Time between observations, for robots whose time is nominal; else every step brings its own time.
    """

    def __init__(self, start: StepResult, time_ns: int = 0, period_ns: int | None = None) -> None:
        self._observations = {key: [value] for key, value in start.observation.items()}
        self._states = None if start.state is None else [start.state]
        self._times = [time_ns]
        self._period_ns = period_ns
        self._steps: list[Step] = []
        self._solved = False

    def __len__(self) -> int:
        return len(self._steps)

    def actions(self, action_dim: int) -> FloatArray:
        """Actions sent so far (T, A)."""
        return np.array([step.action for step in self._steps], np.float32).reshape(-1, action_dim)

    def add(
        self,
        result: StepResult,
        action: FloatArray,
        *,
        policy_action: FloatArray | None = None,
        source: Source = Source.POLICY,
        time_ns: int | None = None,
    ) -> None:
        """Add one step: the action sent, what it led to, who chose it, and the capture time of what it led to."""
        if time_ns is None:
            if self._period_ns is None:
                raise DataError("a step of a robot with a clock came without a time")
            time_ns = self._times[-1] + self._period_ns
        self.append(Step(result, action, time_ns, policy_action, source))

    def append(self, step: Step) -> None:
        """Add one step with its whole story."""
        for key, column in self._observations.items():
            column.append(step.result.observation[key])
        if self._states is not None:
            if step.result.state is None:
                raise DataError("this episode records simulator states, and a step came without one")
            self._states.append(step.result.state)
        self._times.append(step.time_ns)
        self._solved |= step.result.terminated if step.result.success is None else step.result.success
        self._steps.append(step)

    def build(self, first: int = 0, **info: Any) -> Episode:
        """The episode so far, from step ``first``; without an end of its own, its last step is marked truncated.

        Raises:
            DataError: No step was added.
        """
        steps = self._steps[first:]
        if not steps:
            raise DataError("an episode without steps cannot be used; skip it")
        results = [step.result for step in steps]
        truncated = np.array([r.truncated for r in results], bool)
        truncated[-1] |= not results[-1].terminated
        nothing = np.full_like(steps[0].action, np.nan)
        times = {name: np.array([getattr(s, name) for s in steps], np.int64) for name in STEP_TIMES}
        flags = np.array([s.flags for s in steps], np.uint8)
        by_policy = [s.action if s.policy_action is None else s.policy_action for s in steps]
        by_person = [nothing if s.intervention_action is None else s.intervention_action for s in steps]
        intervened = np.stack(by_person).astype(np.float32)
        seen = {key: np.stack(rows[first:]) for key, rows in self._observations.items()}
        return Episode(
            # Measurements are float32 wherever they come from; counts and pixels stay what they are.
            observations={k: rows.astype(np.float32) if rows.dtype.kind == "f" else rows for k, rows in seen.items()},
            action=np.stack([s.action for s in steps]).astype(np.float32),
            policy_action=np.stack(by_policy).astype(np.float32),
            measured=np.stack([nothing if r.measured is None else r.measured for r in results]).astype(np.float32),
            source=np.array([s.source for s in steps], np.uint8),
            rewards=np.array([r.reward for r in results], np.float32),
            terminated=np.array([r.terminated for r in results], bool),
            truncated=truncated,
            time_ns=np.array(self._times[first:], np.int64),
            states=None if self._states is None else np.stack(self._states[first:]).astype(np.float64),
            info={"success": self._solved, **info},
            **known_columns({**times, "flags": flags, "intervention_action": intervened}),
        )


def known_columns(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The optional columns, by attribute of :class:`Episode`, without those of which nothing is known."""
    unknown = {"flags": StepFlag.UNKNOWN}

    def known(name: str, rows: npt.NDArray[Any]) -> bool:
        if name == "intervention_action":
            return not np.isnan(rows).all()
        return bool((rows != unknown.get(name, UNKNOWN_TIME)).any())

    return {name: rows for name, rows in columns.items() if known(name, rows)}
