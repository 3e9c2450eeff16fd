"""Moving a robot so that something can be learnt of it, and recording it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.recording import LOOK_NS, Recording, is_other_clock, validity_ns
from sacflow_robot.envs.wrappers import ActionFilter
from sacflow_robot.errors import StoppedError, UsageError
from sacflow_robot.interfaces import Robot
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
        """Distance of the gripper from where it was first seen (6,), in units that a random step is to be stronger than."""
        pose = observation["robot0_eef_pos"].astype(np.float64), observation["robot0_eef_quat"].astype(np.float64)
        if self._pose is None:
            self._pose = pose
        turned = rotation_between(self._pose[1], pose[1])
        return np.concatenate([(pose[0] - self._pose[0]) / _NEAR_M, turned / _NEAR_RAD])


class BrakingLimiter(ActionFilter, Protocol):
    """A filter that tells when the robot is at rest; ``sacflow_robot.robot.safety.filter.SafetyFilter`` is one."""

    @property
    def at_rest(self) -> bool: ...


def patient(limits: SafetyLimits) -> SafetyLimits:
    """Limits under which a robot is recorded whose delays are yet to be measured."""
    longest = max(limits.max_observation_age_s, 0.5)
    return replace(limits, max_observation_age_s=longest, max_action_age_s=longest, max_command_delay_s=0.4)


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
        limiter: Filter that every command passes; the call enables it.
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
        now_ns, valid_ns = clock.now_ns(), validity_ns(spec)
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
            robot.command(action, clock.now_ns() + validity_ns(robot.spec))
            if limiter.at_rest:
                break
            clock.sleep_until(clock.now_ns() + period_ns)
            action = limiter.step(None, clock.now_ns()).action
    finally:
        robot.stop()
