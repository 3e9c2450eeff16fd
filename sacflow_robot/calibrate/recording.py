"""What is calibrated from: everything that a robot was seen to do, and everything that it was told, each with its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.safety_wrapper import ActionFilter
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, StoppedError, UsageError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.spec import Observation, RobotSpec
from sacflow_robot.utils.atomic_files import replacing
from sacflow_robot.utils.rotations import rotation_between
from sacflow_robot.utils.seeding import Stream, random_stream

Array = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]

LOOK_NS = 2_000_000
"""How often an excitation run looks for a new observation."""

VALID_PERIODS = 2  # as in the control loop
_DELAY_NS = 400_000_000  # beyond those, for commands that take long; a robot whose loop dies holds that much later
LONGEST_S = 120.0
AHEAD_NS, LATEST_NS = 2_000_000, 1_000_000_000  # observations out of this range are by another clock than the loop's
_LATER = 0.2  # share of a period by which a command leaves later than it could, at most
_REST_S, _PAUSE_S, _BURST_S = 3.0, 0.5, 1.1
_NEAR_M, _NEAR_RAD, _TURN_SHARE = 0.04, 0.15, 0.4


@dataclass(frozen=True)
class Recording:
    """A robot's observations and commands, by the clock of the control loop (the robot's own for capture times).

    Attributes:
        robot: The robot.
        time_ns: Capture times (M,), increasing.
        received_ns: When each reached the control loop (M,); -1 where nobody knows.
        observations: Per key (M, ...).
        sent_ns: When commands were sent (N,), increasing.
        valid_ns: For how long each was to be acted on (N,).
        actions: The commands (N, A).
    """

    robot: RobotSpec
    time_ns: Times
    received_ns: Times
    observations: Mapping[str, npt.NDArray[np.float32]]
    sent_ns: Times
    valid_ns: Times
    actions: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if len(self.time_ns) < 2 or len(self.sent_ns) < 2:
            raise DataError("the recording holds fewer than two observations or commands; nothing can be told from it")
        if (np.diff(self.time_ns) <= 0).any() or (np.diff(self.sent_ns) <= 0).any():
            raise DataError("the recording's times do not increase; was its clock set back, or are they of two clocks?")

    @property
    def seconds(self) -> float:
        return float(self.time_ns[-1] - self.time_ns[0]) / 1e9

    def save(self, path: Path) -> None:
        """Write it as one .npz file."""
        columns = {f"observation.{key}": rows for key, rows in self.observations.items()}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                robot=np.array(self.robot.to_json()),
                time_ns=self.time_ns,
                received_ns=self.received_ns,
                sent_ns=self.sent_ns,
                valid_ns=self.valid_ns,
                actions=self.actions,
                **columns,
            )

    @staticmethod
    def load(path: Path) -> Recording:
        """Inverse of :meth:`save`.

        Raises:
            DataError: It cannot be read.
        """
        import json

        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            robot = RobotSpec.from_dict(json.loads(str(found.pop("arm"))))
            seen = {n.removeprefix("observation."): found.pop(n) for n in list(found) if n.startswith("observation.")}
            return Recording(robot, observations=seen, **found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"recording {path} cannot be read: {one_line(error)}") from None


def of_episode(robot: RobotSpec, episode: Episode) -> Recording:
    """A logged episode as a recording.

    Raises:
        DataError: It has no times of a robot that moves on its own.
    """
    if episode.sent_ns is None or (episode.sent_ns < 0).any():
        raise DataError("the episode does not say when its actions were sent; log it with 'sacflow-robot run'")
    received = np.append(episode.received_ns, -1) if episode.received_ns is not None else np.full(len(episode) + 1, -1)
    fresh = np.append(True, np.diff(episode.time_ns) > 0)
    return Recording(
        robot,
        episode.time_ns[fresh],
        received[fresh].astype(np.int64),
        {key: rows[fresh] for key, rows in episode.observations.items()},
        episode.sent_ns,
        np.full(len(episode), VALID_PERIODS * robot.period_ns + _DELAY_NS, np.int64),
        episode.commanded,
    )


class Excitation:
    """What an excitation run commands: rest, then bursts of steps in random directions with rests in between.

    Steps are drawn back to where the run began, so that the robot stays near it; how far, the safety filter decides.

    Args:
        robot: A robot commanded by motions (delta control).
        seconds: Length of the run.
        seed: Decides the steps.
        size: Largest action.

    Raises:
        UsageError: The robot is commanded in another way, or the run is too long or short.
    """

    def __init__(self, robot: RobotSpec, seconds: float, seed: int, size: float = 0.6) -> None:
        if "delta" not in robot.controller.lower():
            raise UsageError(
                f"calibration moves robots under delta control; {robot.robot} is under {robot.controller!r}"
            )
        if not _REST_S + 2 * (_PAUSE_S + _BURST_S) <= seconds <= LONGEST_S:
            raise UsageError(f"--seconds is {seconds:g}; it must be from 7 to {LONGEST_S:g}")
        self._robot, self._rng, self._size = robot, random_stream(seed, Stream.EXCITATION), size
        self.periods = round(seconds * robot.control_rate_hz / (1 + _LATER / 2))
        self._moves = [i for i, unit in enumerate(robot.action_units) if unit.endswith((" m", " rad"))]
        self._turns = np.array([robot.action_units[i].endswith(" rad") for i in self._moves])
        self._pose: tuple[Array, Array] | None = None
        self._left, self._step = 0, np.zeros(len(self._moves))

    def action(self, period: int, observation: Observation) -> npt.NDArray[np.float32]:
        """The action (A,) of a control period, from the newest observation."""
        rate = self._robot.control_rate_hz
        second = period / rate - _REST_S
        action = np.zeros(self._robot.action_dim, np.float32)
        if second < 0 or second % (_PAUSE_S + _BURST_S) >= _BURST_S:
            self._left = 0
            return action
        if self._left == 0:
            self._left = int(self._rng.integers(3, 8))
            direction = self._rng.standard_normal(len(self._moves)) - self._away(observation)
            direction[self._turns] *= _TURN_SHARE
            first = second % (_PAUSE_S + _BURST_S) < 1 / rate  # of a burst: clear enough to tell when it takes effect
            size = self._size * self._rng.uniform(0.7 if first else 0.15, 1)
            if first:
                direction[self._turns] = 0.0  # turning moves the gripper as well
            self._step = direction / np.abs(direction).max() * size
        self._left -= 1
        action[self._moves] = self._step
        return action

    def _away(self, observation: Observation) -> Array:
        """How far the gripper is from where it was first seen (6,), in units that a random step is to be stronger than."""
        pose = observation["robot0_eef_pos"].astype(np.float64), observation["robot0_eef_quat"].astype(np.float64)
        if self._pose is None:
            self._pose = pose
        turned = rotation_between(self._pose[1][None], pose[1][None])[0]
        return np.concatenate([(pose[0] - self._pose[0]) / _NEAR_M, turned / _NEAR_RAD])


def is_other_clock(late_ns: int) -> bool:
    """Whether an observation that seems to arrive so late (ns; negative: before its capture) is by another clock than the loop's."""
    return not -AHEAD_NS <= late_ns <= LATEST_NS


class BrakingLimiter(ActionFilter, Protocol):
    """A filter that tells when the robot is at rest; ``sacflow_robot.robot.safety.filter.SafetyFilter`` is one."""

    @property
    def at_rest(self) -> bool: ...


def record(
    robot: Robot,
    limiter: BrakingLimiter,
    excitation: Excitation,
    seed: int,
    progress: Callable[[float], None] = lambda share: None,
    heed: Callable[[npt.NDArray[np.float32]], None] = lambda commanded: None,
) -> Recording:
    """Move a robot through the safety filter, and look at it as often as it is seen.

    Commands leave up to a fifth of a period later than they could, each anew, so that the robot's own cycle does not hide how
    late they are.

    Args:
        robot: The robot, connected.
        limiter: What every command passes; the call enables it.
        excitation: What is commanded.
        seed: Decides the moments, and the start on a simulated robot.
        progress: Gets the share that is done.
        heed: Called once each control period with the last action (A,); holds or stops ``limiter`` if a person asks for it.

    Raises:
        StoppedError: The filter held or stopped the robot.
        UsageError: The robot stands still between commands, so that nothing can be learnt of its time.
    """
    if robot.lockstep:
        raise UsageError(
            "this robot's time stands still between commands; calibrate one that moves on its own, e.g. rtsim:"
        )
    clock, spec, rng = robot.clock, robot.spec, random_stream(seed, Stream.EXCITATION, 1)
    start = robot.begin(seed)
    seen: list[tuple[int, int, Mapping[str, Any]]] = []
    late_ns = clock.now_ns() - (clock.now_ns() if start.time_ns is None else start.time_ns)
    # By another clock than the loop's, which is yet to be measured, an observation's age is told by the fastest of them.
    other, least_ns = is_other_clock(late_ns), late_ns

    def see(observation: Observation, time_ns: int) -> None:
        nonlocal least_ns
        least_ns = min(least_ns, clock.now_ns() - time_ns)
        limiter.see(observation, time_ns + least_ns if other else time_ns)

    def look() -> None:
        result = robot.observe()
        time_ns = clock.now_ns() if result.time_ns is None else result.time_ns
        if not seen or time_ns > seen[-1][0]:
            seen.append((time_ns, clock.now_ns(), result.observation))
            see(result.observation, time_ns)

    limiter.begin()
    see(start.observation, clock.now_ns() if start.time_ns is None else start.time_ns)
    limiter.enable(clock.now_ns())
    sent: list[tuple[int, int, Any]] = []
    due_ns = clock.now_ns()
    for period in range(excitation.periods):
        due_ns = max(due_ns, sent[-1][0] + spec.period_ns if sent else 0) + int(rng.uniform(0, _LATER) * spec.period_ns)
        while clock.now_ns() < due_ns:
            clock.sleep_until(min(due_ns, clock.now_ns() + LOOK_NS))
            look()
        heed(sent[-1][2] if sent else np.zeros(spec.action_dim, np.float32))
        verdict = limiter.step(excitation.action(period, seen[-1][2] if seen else start.observation), clock.now_ns())
        if verdict.action is None or verdict.reason:
            _brake(robot, limiter, verdict.action)
            raise StoppedError(f"the robot was held or stopped: {verdict.reason}; nothing was measured")
        now_ns, valid_ns = clock.now_ns(), VALID_PERIODS * spec.period_ns + _DELAY_NS
        robot.command(verdict.action, now_ns + valid_ns)
        sent.append((now_ns, valid_ns, verdict.action))
        progress((period + 1) / excitation.periods)
    robot.hold()
    times, received, observations = zip(*seen, strict=True)
    return Recording(
        spec,
        np.array(times, np.int64),
        np.array(received, np.int64),
        {a.key: np.stack([o[a.key] for o in observations]) for a in spec.observations},
        np.array([s[0] for s in sent], np.int64),
        np.array([s[1] for s in sent], np.int64),
        np.stack([s[2] for s in sent]),
    )


def _brake(robot: Robot, limiter: BrakingLimiter, action: npt.NDArray[np.float32] | None) -> None:
    """Bring the robot to rest within its limits, and stop it."""
    clock, period_ns = robot.clock, robot.spec.period_ns
    try:
        while action is not None:
            robot.command(action, clock.now_ns() + VALID_PERIODS * period_ns + _DELAY_NS)
            if limiter.at_rest:
                break
            clock.sleep_until(clock.now_ns() + period_ns)
            action = limiter.step(None, clock.now_ns()).action
    finally:
        robot.stop()


def bursts(recording: Recording) -> list[tuple[int, int]]:
    """First and one past the last command of each motion after a rest, with one command of the rest before it."""
    moving = (np.abs(recording.actions[:, :6]) > 1e-6).any(axis=1)
    starts = [i for i in range(1, len(moving)) if moving[i] and not moving[i - 1]]
    ends = [*starts[1:], len(moving) + 1] if starts else []
    return [(s - 1, min(e - 1, len(moving))) for s, e in zip(starts, ends, strict=True)]


def read_log(path: Path) -> list[Recording]:
    """The episodes of an episode log, or the one recording of an .npz file.

    Raises:
        DataError: It cannot be read, or no episode says when its actions were sent.
    """
    if path.suffix == ".npz":
        return [Recording.load(path)]
    from sacflow_robot.data.log.reader import EpisodeLog

    log = EpisodeLog.open(path)
    found, reason = [], "it is empty"
    for episode in log.episodes():
        try:
            found.append(of_episode(log.robot, episode))
        except DataError as error:
            reason = str(error)
    if not found:
        raise DataError(f"{path}: nothing to compare: {reason}")
    return found
