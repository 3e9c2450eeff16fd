"""Logged episodes, sent to a robot again: in lockstep, or at the times at which they were sent first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode, StepResult
from sacflow_robot.errors import DataError, SpecMismatchError, StoppedError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.control.loop import default_safety
from sacflow_robot.robot.control.operator import Operator, heed, settle
from sacflow_robot.robot.drivers.action_history import bare
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import LEAST_SPACING, SafetyFilter
from sacflow_robot.robot.safety.latch import State, Verdict
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import without_history


@runtime_checkable
class Restorable(Robot, Protocol):
    """A robot that can start from a logged state, which only a simulated one can."""

    def begin_at(self, state: npt.NDArray[np.float64]) -> StepResult:
        """Start from a logged simulator state (S,)."""
        ...


@dataclass(frozen=True)
class ReplayResult:
    """How a replayed episode compares with its log.

    Attributes:
        steps: Steps sent; fewer than logged where a physical robot ended the episode early.
        success: Whether the replay solved the task, as far as the robot can tell.
        commanded: What was sent (steps, A).
        limited_steps: Steps whose logged command the safety filter changed.
        observation_deviation: Per key, the largest absolute difference in any entry of any observation, in its unit.
        max_state_deviation: The same over the simulator states; None on a robot that has none.
        max_lateness_ns: How late the latest command was sent; None in lockstep.
        states: Simulator states of the replay (steps + 1, S), or None.
        stopped: Why it was held or stopped before its end; empty if it was not.
    """

    steps: int
    success: bool
    commanded: FloatArray
    limited_steps: int
    observation_deviation: Mapping[str, float]
    max_state_deviation: float | None = None
    max_lateness_ns: int | None = None
    states: npt.NDArray[np.float64] | None = None
    stopped: str = ""


def check_replayable(robot: Robot, log_robot: RobotSpec, episode: Episode, origin: str) -> None:
    """Refuse an episode that this robot cannot repeat, before anything moves.

    That the last commands are among the observations of one and not of the other is no difference: they follow from the
    commands.

    Args:
        robot: The robot.
        log_robot: Robot that the log is of.
        episode: The episode.
        origin: Name of the log in the error.

    Raises:
        SpecMismatchError: The log is of another robot; names every field that differs.
        DataError: The robot is simulated, and the episode has no states to start from.
    """
    robot = bare(robot)
    different = robot.spec.differences(without_history(log_robot))
    if different:
        raise SpecMismatchError(f"{origin} does not fit the robot (robot, log): {'; '.join(different)}")
    if isinstance(robot, Restorable) and episode.states is None:
        raise DataError(
            "this episode has no simulator states to start from; a simulated robot replays only episodes of simulated robots"
        )


def sending_offsets(episode: Episode) -> npt.NDArray[np.int64]:
    """When each command was sent (T,), in nanoseconds from the episode's first observation.

    Where the log keeps no sending time, or a negative one, the capture time of the observation acted on stands in.

    Raises:
        DataError: The times run backwards.
    """
    sent, times = episode.sent_ns, episode.time_ns[:-1]
    if sent is not None:
        times = np.where(np.asarray(sent) < 0, times, sent)
    offsets: npt.NDArray[np.int64] = times - episode.time_ns[0]
    if offsets[0] < 0 or (np.diff(offsets) < 0).any():
        raise DataError("the episode's times run backwards, it cannot be replayed by them; use --timing lockstep")
    return offsets


def replay_episode(
    robot: Robot,
    episode: Episode,
    *,
    limits: tuple[FloatArray, FloatArray] | None = None,
    offsets_ns: npt.NDArray[np.int64] | None = None,
    safety: SafetyFilter | ActionClipper | None = None,
    operator: Operator | None = None,
) -> ReplayResult:
    """Send the logged commands again, through the safety filter, and compare what comes of them with the log.

    A simulated robot starts from the logged initial state and plays the episode to its end. A physical robot starts where it
    stands, so it is the user's to bring it near the logged start; it is sent nothing more once it ends the episode.

    Args:
        robot: The robot; one that :func:`check_replayable` accepts.
        episode: The episode.
        limits: Lower and upper bound (A,) of the commanded action, within the robot's own.
        offsets_ns: When to send each command (T,), from the start, by the robot's clock. None sends each as soon as the one
            before is done to a lockstep robot, and at the robot's control rate to any other. Whatever they say, a robot that
            moves on its own time gets its whole period for each command.
        safety: What every command passes; the call robots it. None for the default of
            :func:`~sacflow_robot.robot.control.loop.default_safety`.
        operator: A person's requests and input device. A stop or a hold ends the replay: the robot comes to rest within its
            limits, and nothing starts it again.

    Raises:
        DataError: The robot is simulated, and the episode has no states to start from; or nothing was sent.
        InvalidValueError: An observation holds NaN or infinity; nothing was sent on it.
    """
    robot = bare(robot)
    spec, clock = robot.spec, robot.clock
    check_replayable(robot, spec, episode, "the episode")
    limit = ActionClipper(spec, limits)
    safety = default_safety(robot, limits) if safety is None else safety
    sender = _Sender(robot, safety, Operator() if operator is None else operator)
    simulated = isinstance(robot, Restorable)
    sender.refuse_if_stopped()
    if isinstance(robot, Restorable) and episode.states is not None:
        result = robot.begin_at(episode.states[0])
    else:
        result = robot.begin(int(episode.info.get("seed") or 0))
    results, observations = [result], [spec.check_observation(result.observation)]
    sent: list[FloatArray] = []
    start_ns, limited, latest_ns = clock.now_ns(), 0, 0
    due = np.arange(len(episode)) * spec.period_ns if offsets_ns is None else offsets_ns
    due = start_ns + np.append(due, due[-1] + spec.period_ns)
    sender.begin(result, start_ns)
    try:
        for step, logged in enumerate(episode.commanded):
            if result.ended and not simulated:
                break
            if offsets_ns is not None or not robot.lockstep:
                clock.sleep_until(max(int(due[step]), sender.earliest_ns))
                latest_ns = max(latest_ns, clock.now_ns() - int(due[step]))
            verdict = sender.send(limit(logged), step, int(due[step + 1]))
            if safety.state is not State.RUNNING or verdict.action is None:
                break
            limited += not np.array_equal(verdict.action, logged)
            if not robot.lockstep:
                clock.sleep_until(int(due[step + 1]))
            result = robot.observe()
            sender.see(result, step + 1)
            sent.append(verdict.action)
            results.append(result)
            observations.append(spec.check_observation(result.observation))
    finally:
        sender.finish()
    if not sent:
        raise DataError(f"nothing was sent: {safety.reason or 'the episode has ended at its start'}")
    found = [r.state for r in results if r.state is not None]
    states = np.stack(found) if len(found) == len(results) else None
    return ReplayResult(
        steps=len(results) - 1,
        success=any(r.terminated if r.success is None else r.success for r in results),
        commanded=np.array(sent, np.float32).reshape(-1, spec.action_dim),
        limited_steps=limited,
        observation_deviation={
            a.key: _deviation(a, observations, episode.observations[a.key]) for a in spec.observations
        },
        max_state_deviation=None if states is None or episode.states is None else _furthest(states, episode.states),
        max_lateness_ns=None if offsets_ns is None else latest_ns,
        states=states,
        stopped=safety.reason,
    )


class _Sender:
    """Sends commands through the filter, and brings the robot to rest when somebody asks for it."""

    def __init__(self, robot: Robot, safety: SafetyFilter | ActionClipper, operator: Operator) -> None:
        self._robot = robot
        self._safety = safety
        self._operator = operator
        self._clock = robot.clock
        self._period_ns = robot.spec.period_ns
        self._commanded = np.zeros(robot.spec.action_dim, np.float32)
        self._step = 0
        self.earliest_ns = 0

    def refuse_if_stopped(self) -> None:
        heed(self._safety, self._operator, self._commanded)
        if not self._safety.may_start:
            self._robot.stop()
            self._operator.report(self._safety)
            raise StoppedError(f"stopped before the first command: {self._safety.reason}")

    def begin(self, start: StepResult, start_ns: int) -> None:
        self._safety.begin()
        self._safety.see(start.observation, 0 if self._robot.lockstep else start.time_ns or start_ns)
        self._safety.enable(0 if self._robot.lockstep else self._clock.now_ns())

    def see(self, result: StepResult, step: int) -> None:
        nominal = step * self._period_ns
        captured = nominal if self._robot.lockstep else result.time_ns or self._clock.now_ns()
        self._safety.see(result.observation, captured, result.stale_reason)

    def send(self, action: FloatArray | None, step: int, until_ns: int) -> Verdict:
        """Send what the filter lets through of an action (A,); None for none."""
        heed(self._safety, self._operator, self._commanded)
        verdict = self._safety.step(action, step * self._period_ns if self._robot.lockstep else self._clock.now_ns())
        if verdict.action is None:
            return verdict
        now = self._clock.now_ns()
        self._robot.command(verdict.action, max(until_ns, now) + self._period_ns)
        if not self._robot.lockstep:
            self.earliest_ns = now + round(LEAST_SPACING * self._period_ns)
        self._commanded, self._step = verdict.action, step + 1
        self._operator.report(self._safety)
        return verdict

    def finish(self) -> None:
        """Bring a robot that was held or stopped to rest within its limits; hold it, and say what state it is in."""
        try:
            while self._safety.state in (State.HOLD, State.STOPPING) and not self._safety.at_rest:
                if not self._robot.lockstep:
                    self._clock.sleep_until(self.earliest_ns)
                if self.send(None, self._step, self.earliest_ns).action is None:
                    break
        finally:
            settle(self._robot, self._safety, self._operator)


def _deviation(spec: ArraySpec, replayed: list[dict[str, FloatArray]], logged: FloatArray) -> float:
    rows = np.stack([observation[spec.key] for observation in replayed])
    logged = logged[: len(rows)]
    if spec.unit.startswith("unit quaternion") and spec.shape == (4,):  # q and -q are the same rotation
        rows = rows * np.where((rows * logged).sum(-1, keepdims=True) < 0, -1, 1)
    return _furthest(rows, logged)


def _furthest(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:  # type: ignore[type-arg]
    return float(np.abs(a.astype(np.float64) - b[: len(a)]).max())
