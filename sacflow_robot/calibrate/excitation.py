"""Moving a robot so that something can be learnt of it, and recording it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.recording import LOOK_NS, Recording, is_other_clock, validity_ns
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import StoppedError, UsageError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.spec import Observation, RobotSpec
from sacflow_robot.utils.rotations import Array, rotation_between
from sacflow_robot.utils.seeding import Stream, random_stream

LONGEST_S = 120.0
_LATER = 0.2  # share of a period by which a command leaves later than it could, at most
_REST_S, _PAUSE_S, _BURST_S = 3.0, 0.5, 1.1
_NEAR_M, _NEAR_RAD, _TURN_SHARE = 0.04, 0.15, 0.4


class Excitation:
    """Commands of an excitation run: rest, then bursts of steps in random directions with rests in between.

    Steps are drawn back to where the run began, so that the robot stays near it; how far, the safety filter decides.

    Args:
        robot: A robot commanded by motions (delta control).
        size: Largest action.

    Raises:
        UsageError: The robot is commanded in another way, or the run is too long or short.
    """

    def __init__(self, robot: RobotSpec, seconds: float, seed: int, size: float = 0.6) -> None:
        if "delta" not in (controller := robot.controller).lower():
            raise UsageError(f"calibration moves robots under delta control; {robot.robot} is under {controller!r}")
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
        """Distance of the gripper from where it was first seen (6,), in units that a random step is to be stronger than."""
        pose = observation["robot0_eef_pos"].astype(np.float64), observation["robot0_eef_quat"].astype(np.float64)
        if self._pose is None:
            self._pose = pose
        turned = rotation_between(self._pose[1], pose[1])
        return np.concatenate([(pose[0] - self._pose[0]) / _NEAR_M, turned / _NEAR_RAD])


def patient(limits: SafetyLimits) -> SafetyLimits:
    """Limits under which a robot is recorded whose delays are yet to be measured."""
    longest = max(limits.max_observation_age_s, 0.5)
    return replace(limits, max_observation_age_s=longest, max_action_age_s=longest, max_command_delay_s=0.4)


def record(
    robot: Robot,
    safety: SafetyFilter,
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
        safety: Filter that every command passes; the call enables it.
        seed: Decides the moments, and the start on a simulated robot.
        heed: Called once each control period with the last action (A,); holds or stops ``safety`` if a person asks for it.

    Raises:
        StoppedError: The filter held or stopped the robot.
        UsageError: The robot stands still between commands, so that nothing can be learnt of its time.
    """
    if robot.lockstep:
        raise UsageError(
            "this robot's time stands still between commands; calibrate one that moves on its own, e.g. rtsim:"
        )
    clock, spec, rng = robot.clock, robot.spec, random_stream(seed, Stream.EXCITATION, 1)
    seen = _Seen(robot, safety, robot.begin(seed))
    safety.enable(clock.now_ns())
    valid_ns = validity_ns(spec)
    sent: list[tuple[int, Any]] = []
    due_ns = clock.now_ns()
    for period in range(excitation.periods):
        due_ns = max(due_ns, sent[-1][0] + spec.period_ns if sent else 0) + int(rng.uniform(0, _LATER) * spec.period_ns)
        while clock.now_ns() < due_ns:
            clock.sleep_until(min(due_ns, clock.now_ns() + LOOK_NS))
            seen.look()
        heed(sent[-1][1] if sent else np.zeros(spec.action_dim, np.float32))
        verdict = safety.step(excitation.action(period, seen.newest), clock.now_ns())
        if verdict.action is None or verdict.reason:
            _brake(robot, safety, verdict.action)
            raise StoppedError(f"the robot was held or stopped: {verdict.reason}; nothing was measured")
        sent.append((clock.now_ns(), verdict.action))
        robot.command(verdict.action, sent[-1][0] + valid_ns)
        progress((period + 1) / excitation.periods)
    robot.hold()
    times, received, observations = zip(*seen.rows, strict=True)
    columns = {a.key: np.stack([o[a.key] for o in observations]) for a in spec.observations}
    sent_ns, actions = zip(*sent, strict=True)
    valid = np.full(len(sent), valid_ns, np.int64)
    return Recording(
        spec, np.array(times, np.int64), np.array(received, np.int64), columns, np.array(sent_ns, np.int64), valid,
        np.stack(actions),
    )  # fmt: skip


class _Seen:
    """Observations as they arrive, each shown to the safety filter.

    By another clock than the loop's, which is yet to be measured, the age of an observation is taken from the fastest of them.
    """

    def __init__(self, robot: Robot, safety: SafetyFilter, start: StepResult) -> None:
        self._robot = robot
        self._safety = safety
        self.rows: list[tuple[int, int, Observation]] = []  # capture time (ns), arrival (ns) and arrays of each
        self.newest: Observation = start.observation
        now_ns = robot.clock.now_ns()
        time_ns = now_ns if start.time_ns is None else start.time_ns
        self._least_ns = now_ns - time_ns
        self._other = is_other_clock(self._least_ns)
        safety.begin()
        self._show(start.observation, time_ns)

    def look(self) -> None:
        """Take in the robot's newest observation, if it is a new one."""
        result, now_ns = self._robot.observe(), self._robot.clock.now_ns()
        time_ns = now_ns if result.time_ns is None else result.time_ns
        if not self.rows or time_ns > self.rows[-1][0]:
            self.rows.append((time_ns, now_ns, result.observation))
            self.newest = result.observation
            self._show(result.observation, time_ns)

    def _show(self, observation: Observation, time_ns: int) -> None:
        self._least_ns = min(self._least_ns, self._robot.clock.now_ns() - time_ns)
        self._safety.see(observation, time_ns + self._least_ns if self._other else time_ns)


def _brake(robot: Robot, safety: SafetyFilter, action: npt.NDArray[np.float32] | None) -> None:
    """Bring the robot to rest within its limits, and stop it."""
    clock, period_ns = robot.clock, robot.spec.period_ns
    try:
        while action is not None:
            robot.command(action, clock.now_ns() + validity_ns(robot.spec))
            if safety.at_rest:
                break
            clock.sleep_until(clock.now_ns() + period_ns)
            action = safety.step(None, clock.now_ns()).action
    finally:
        robot.stop()
