"""Logged episodes, sent to a robot again: in lockstep, or at the times at which they were sent first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode, Step, StepFlag, StepResult
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.control.action_queue import ActionStep
from sacflow_robot.robot.control.loop import EpisodeLoop
from sacflow_robot.robot.control.operator import StopOnlyOperator
from sacflow_robot.robot.control.run_config import RunConfig, Safety, default_safety
from sacflow_robot.robot.control.timing import Pacer
from sacflow_robot.robot.drivers.wrappers import bare
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.spec import ArraySpec, FloatArray, Observation, RobotSpec
from sacflow_robot.utils.action_history import without_history


@runtime_checkable
class Restorable(Robot, Protocol):
    """A robot that can start from a logged state, which only a simulated one can."""

    def begin_at(self, state: npt.NDArray[np.float64]) -> StepResult: ...


@dataclass(frozen=True)
class ReplayResult:
    """Comparison of a replayed episode with its log.

    Attributes:
        steps: Steps sent; fewer than logged where a physical robot ended the episode early.
        success: Whether the replay solved the task, as far as the robot can tell.
        commanded: What was sent (steps, A).
        limited_steps: Steps whose command the safety filter or the bounds changed.
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

    That the last commands are among the observations of one and not of the other is not a difference: they follow from the
    commands.

    Raises:
        SpecMismatchError: The log is of another robot; the message names every field that differs.
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
    """Times at which commands were sent (T,), in nanoseconds from the episode's first observation.

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
    offsets_ns: npt.NDArray[np.int64] | None = None,
    safety: Safety | None = None,
    operator: StopOnlyOperator | None = None,
) -> ReplayResult:
    """Send the logged commands again, through the safety filter, and compare what comes of them with the log.

    A simulated robot starts from the logged initial state and plays the episode to its end. A physical robot starts where it
    stands, so bring it near the logged start first; it is sent nothing more once it ends the episode.

    Args:
        robot: The robot; one that :func:`check_replayable` accepts.
        offsets_ns: When to send each command (T,), from the start, by the robot's clock. None sends each as soon as the one
            before is done to a lockstep robot, and at the robot's control rate to any other. Whatever they say, a robot that
            moves on its own time gets its whole period for each command.
        safety: What every command passes; the call enables it. None for the default of
            :func:`~sacflow_robot.robot.control.run_config.default_safety`.
        operator: A person's requests and input device. A stop or a hold ends the replay: the robot comes to rest within its
            limits, and nothing starts it again.

    Raises:
        DataError: The robot is simulated, and the episode has no states to start from; or nothing was sent.
        InvalidValueError: An observation contains NaN or infinity; nothing was sent on it.
    """
    robot = bare(robot)
    check_replayable(robot, robot.spec, episode, "the episode")
    kept = _Steps()
    config = RunConfig(
        safety=default_safety(robot) if safety is None else safety,
        operator=StopOnlyOperator() if operator is None else operator,
        recorder=kept,
    )
    pacer = None if offsets_ns is None else _LoggedPacer(robot, offsets_ns)
    loop = _Replay(robot, episode, config, pacer)
    loop.run({})
    steps = kept.steps
    while steps and steps[-1].flags & StepFlag.HELD:  # the robot braked
        steps.pop()
    if not steps:
        raise DataError(f"nothing was sent: {loop.safety.reason or 'the episode has ended at its start'}")
    results = [kept.start, *(step.result for step in steps)]
    commanded = np.array([step.action for step in steps], np.float32)
    states = np.stack([r.state for r in results if r.state is not None]) if kept.start.state is not None else None
    lateness_ns = [step.sent_ns - due_ns for step, due_ns in zip(steps, pacer.due_ns if pacer else (), strict=False)]
    return ReplayResult(
        steps=len(steps),
        success=any(r.terminated if r.success is None else r.success for r in results),
        commanded=commanded,
        limited_steps=int((commanded != episode.action[: len(steps)]).any(axis=1).sum()),
        observation_deviation={a.key: _deviation(a, results, episode) for a in robot.spec.observations},
        max_state_deviation=None if states is None or episode.states is None else _furthest(states, episode.states),
        max_lateness_ns=max(0, *lateness_ns) if lateness_ns else None,
        states=states,
        stopped=loop.safety.reason,
    )


class _Steps:
    """A recorder in memory: an :class:`~sacflow_robot.episode.Episode` ends at its end, a replay may go on after it."""

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        self.start = start
        self.steps: list[Step] = []

    def append(self, step: Step) -> None:
        self.steps.append(step)

    def end(self, info: Mapping[str, Any]) -> None:
        pass


class _LoggedActions:
    """The commands of an episode, one after another, each clipped to the robot's bounds."""

    def __init__(self, episode: Episode, clip: ActionClipper) -> None:
        self._rest = iter(episode.action)
        self._clip = clip

    def begin(self) -> None:
        pass

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        action = next(self._rest, None)
        return ActionStep(None if action is None else self._clip(action))


class _LoggedPacer(Pacer):
    """Deadlines at the times at which an episode's commands were sent, after its start."""

    def __init__(self, robot: Robot, offsets_ns: npt.NDArray[np.int64]) -> None:
        super().__init__(robot.clock, robot.spec.period_ns, robot.lockstep)
        self._offsets_ns = np.append(offsets_ns, offsets_ns[-1] + robot.spec.period_ns)
        self.due_ns: list[int] = []

    def begin(self, now_ns: int) -> None:
        self.due_ns = [now_ns + int(offset) for offset in self._offsets_ns]
        self.wait_for_deadline()

    def wait_for_deadline(self) -> None:
        self.deadline_ns = self.due_ns[min(len(self.sent_ns), len(self.due_ns) - 1)]
        self._clock.sleep_until(self.deadline_ns)


class _Replay(EpisodeLoop):
    """An episode that begins where the log did, and that a hold ends as soon as the robot is at rest."""

    def __init__(self, robot: Robot, episode: Episode, config: RunConfig, pacer: Pacer | None) -> None:
        actions = _LoggedActions(episode, ActionClipper(robot.spec))
        super().__init__(robot, actions, config, seed=int(episode.info.get("seed") or 0), pacer=pacer)
        self._episode = episode

    def step(self) -> None:
        super().step()
        if self.safety.state is State.RUNNING:
            self.ended |= self.steps == len(self._episode)
        else:
            self.ended = self.safety.at_rest

    def _start(self) -> StepResult:
        if isinstance(self._robot, Restorable) and self._episode.states is not None:
            return self._robot.begin_at(self._episode.states[0])
        return super()._start()

    def _is_over(self, result: StepResult) -> bool:
        return result.ended and not isinstance(self._robot, Restorable)


def _deviation(spec: ArraySpec, replayed: list[StepResult], episode: Episode) -> float:
    rows = np.stack([result.observation[spec.key] for result in replayed])
    logged = episode.observations[spec.key][: len(rows)]
    if spec.unit.startswith("unit quaternion") and spec.shape == (4,):  # q and -q are the same rotation
        rows = rows * np.where((rows * logged).sum(-1, keepdims=True) < 0, -1, 1)
    return _furthest(rows, logged)


def _furthest(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:  # type: ignore[type-arg]
    return float(np.abs(a.astype(np.float64) - b[: len(a)]).max())
