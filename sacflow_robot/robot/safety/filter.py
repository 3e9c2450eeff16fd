"""The safety filter between the source of actions (policy, person, replay) and the robot.

It guarantees for every command that it sends, whatever is proposed:

- speed, acceleration and jerk of every axis are within the limits, and so is the gripper's command;
- there is always a stop within those limits that stays in the workspace, out of what is to be kept out of, and within the
  tool's cone. A command passes only if the stop that would follow it has been checked. If that check fails, the command is
  scaled back until it passes; the last resort is the stop checked one period earlier;
- without a fresh action it stops. It does not go anywhere to do so.

These guarantees assume that the robot follows commands within `max_command_delay_s` and the tracking margins, and that capture
times are true. Poses are extrapolated from the last observation with the commands sent since. All arithmetic is double
precision; what is sent is rounded to the nearest float32.

States are latched, see :mod:`~sacflow_robot.robot.safety.latch`: after a hold or a stop, what is proposed is ignored until
:meth:`SafetyFilter.enable`, which nothing in this package calls on its own once a robot has moved.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError, RobotError
from sacflow_robot.robot.safety import braking as stopping
from sacflow_robot.robot.safety.latch import Latch, State, Verdict
from sacflow_robot.robot.safety.safety_limits import Array, SafetyLimits, action_axes
from sacflow_robot.robot.safety.workspace import Places, UnshownMotion, hull
from sacflow_robot.spec import FloatArray, RobotSpec

__all__ = ["SafetyFilter", "State", "Verdict"]

_SHARES = np.linspace(0, 1, 17)[:, None]
_SHARES_TOGETHER = 1.0, 0.75, 0.5, 0.25, 0.0
_EPS = 1e-9
_LARGEST = float(np.finfo(np.float32).max)
_GAP_PERIODS = 2.5  # after a gap this long between two steps the robot has held by itself

LEAST_SPACING = 0.99
"""Share of a control period that has to pass between two commands."""


class SafetyFilter(Latch):
    """Turns proposed actions into ones that may be sent; call :meth:`see` and :meth:`step` once in each control period.

    Args:
        robot: The robot. Axes are the entries of its action whose unit is a length or an angle; its own bounds always
            hold.
        limits: What to enforce on top of them.

    Raises:
        InvalidValueError: The limits do not fit the robot, or need an observation that it does not make.
    """

    def __init__(self, robot: RobotSpec, limits: SafetyLimits | None = None) -> None:
        super().__init__()
        self.robot_spec, self.limits = robot, limits or SafetyLimits()
        self.axes = axes = action_axes(robot, self.limits)
        self._period_ns = robot.period_ns
        self._motion = stopping.Motion.of(1 / robot.control_rate_hz, axes.speed, axes.acceleration, axes.jerk)
        self._places = Places(robot, self.limits, axes)
        # These outlive an episode: limits hold over wall time, and a motion that nothing has shown may have happened.
        self._moved_ns: int | None = None
        self._unshown = UnshownMotion(axes, self.limits, self._period_ns)
        self.begin()

    def begin(self, measured: FloatArray | None = None) -> None:
        """Forget what was seen and sent: the robot is at rest, at a place not yet seen. The state stays what it is.

        Args:
            measured: Where the robot stands, in action units (A,), if it tells. The gripper of a robot that is
                commanded in positions stays there until an action comes; any other gets zeros.
        """
        n = len(self.axes.index)
        self._velocity, self._change = np.zeros(n), np.zeros(n)
        self._unshown.begin()
        self._places.forget()
        self._target: Array | None = None
        self._captured_ns = self._last_ns = self._due_ns = self._missing_ns = self._held_ns = None  # type: int | None
        self._from_future, self._stale_reason = False, ""
        self._reseat = False
        gripper: Array | FloatArray = np.zeros(len(self.axes.gripper))
        if self.axes.absolute and measured is not None and np.isfinite(measured[self.axes.gripper]).all():
            gripper = measured[self.axes.gripper]
        self._gripper = np.clip(gripper, self.axes.gripper_low, self.axes.gripper_high).astype(np.float64)

    @property
    def at_rest(self) -> bool:
        return not (self._velocity.any() or self._change.any())

    @property
    def stop_s(self) -> float:
        """Time within which the robot is at rest from any motion within the limits."""
        return self._motion.stop_periods / self.robot_spec.control_rate_hz

    @property
    def earliest_ns(self) -> int:
        """Earliest time of the next motion, by the time that :meth:`step` is given; the last one has its period until then."""
        return 0 if self._moved_ns is None else self._moved_ns + round(LEAST_SPACING * self._period_ns)

    # ---- the state machine

    def enable(self, now_ns: int) -> None:
        """Let actions through from now on: a deliberate act of a person, or of the program that a person started.

        Raises:
            RobotError: The robot still moves, has not been seen lately, or stands where it must not be.
        """
        super().enable(now_ns)
        if self.axes.absolute:
            self._target = self._joints_now()  # it may have been moved by hand
        self._missing_ns = self._held_ns = self._due_ns = self._last_ns = None
        if self._captured_ns is not None:
            self._unshown.restart_age(self._captured_ns)
        self._places.release_joints()

    def _check_enabling(self, now_ns: int) -> None:
        super()._check_enabling(now_ns)
        stale = self._stale(now_ns)
        if stale:
            raise RobotError(f"cannot enable: {stale}")
        if self._places.pose is None:
            return
        inside = self._places.keep_out_at(self._places.pose.position)
        if inside:
            raise RobotError(f"cannot enable: the robot is inside {inside}, which it must keep out of; move it by hand")

    def stop(self, reason: str) -> None:
        super().stop(reason)
        self._velocity, self._change = np.zeros_like(self._velocity), np.zeros_like(self._change)

    def rest(self) -> None:
        self._velocity, self._change = np.zeros_like(self._velocity), np.zeros_like(self._change)
        super().rest()

    # ---- once in each control period

    def see(self, observation: Mapping[str, Any], captured_ns: int, stale_reason: str = "") -> bool:
        """Take note of an observation; whether it can be used. One that is older than the last, or is broken, is not.

        ``stale_reason`` says why there is none that is newer, where the robot knows.
        """
        self._stale_reason = f": {stale_reason}" if stale_reason else ""
        if self._captured_ns is not None and captured_ns < self._captured_ns and not self._from_future:
            return False
        try:
            seen = self.robot_spec.check_observation(observation)
        except (InvalidValueError, TypeError, ValueError):
            return False
        again = captured_ns == self._captured_ns
        self._captured_ns, self._from_future = captured_ns, False
        same = self._places.read(seen)
        if not again:
            self._unshown.see(same, captured_ns)
        if self.axes.absolute and (self._target is None or self._reseat):
            self._target, self._reseat = self._joints_now(), False
        return True

    def _joints_now(self) -> Array | None:
        """Positions (N,) of the joints: as seen, and further by what no observation has shown."""
        return None if self._places.joints is None else self._places.joints + self._unshown.total()

    def step(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int | None = None) -> Verdict:
        """Decide on the action to send in place of a proposed one.

        Args:
            proposed: The action (A,); None where there is none.
            now_ns: The time, by the clock of the observations.
            due_ns: The moment that the action is for; now if None. Actions for an earlier moment than the last one's are
                dropped, and so are those that are too late.
        """
        self._check_pace(now_ns)
        wanted = self._wanted(proposed, now_ns, now_ns if due_ns is None else due_ns)
        if self.state is State.STOPPED:
            return Verdict(None, self.state, True, True, self.reason)
        change = self._next_change(wanted)
        self._velocity = self._velocity + change
        small = np.abs(self._velocity) < 1e-12 * self._motion.speed
        self._velocity, self._change = np.where(small, 0.0, self._velocity), change
        motion = self._velocity * self._motion.period_s
        if self._moved_ns is not None and self._moved_ns <= now_ns < self.earliest_ns:
            # A caller that sends two commands within one period would move the robot at twice its speed limit. (The control loop
            # waits, so that nothing is lost; a time before the last motion's is that of a clock that has started anew.)
            motion = np.zeros_like(motion)
        if motion.any():
            self._unshown.send(motion, now_ns)
            self._moved_ns = now_ns
        if self.axes.absolute:
            if self._target is None:  # zeros would be a place to go to
                return Verdict(None, self.state, True, True, self.reason)
            self._target = self._target + motion
        action = np.zeros(self.robot_spec.action_dim)
        place = motion if self._target is None else self._target
        action[self.axes.index] = (place - self.axes.offset) / self.axes.scale
        action[self.axes.gripper] = self._gripper
        return self._verdict(action, proposed, wanted is None)

    def _verdict(self, action: Array, proposed: npt.ArrayLike | None, held: bool) -> Verdict:
        sent = action.astype(np.float32)
        if held:
            return Verdict(sent, self.state, True, True, self.reason)
        asked = np.asarray(proposed, np.float32)
        close = np.abs(action - asked) <= 1e-9 + 1e-7 * np.abs(asked)
        sent = np.where(close, asked, sent)  # what is let through is let through to the last bit
        return Verdict(sent, self.state, not np.array_equal(sent, asked), False, self.reason)

    # ---- what is wanted

    def _check_pace(self, now_ns: int) -> None:
        """Notice a loop that was silent for so long that the robot has held by itself, and time spent holding."""
        last, self._last_ns = self._last_ns, now_ns
        if last is not None and now_ns < last:  # says nothing about the robot, which has to come to rest as ever
            self.hold(f"the clock went back by {(last - now_ns) / 1e6:.0f} ms")
        elif last is not None and now_ns - last > _GAP_PERIODS * self._period_ns:
            self.hold(f"the control loop was silent for {(now_ns - last) / 1e6:.0f} ms")
            self._velocity, self._change = np.zeros_like(self._velocity), np.zeros_like(self._change)
            if self.axes.absolute:  # it holds where it is, which need not be where it was last told to be
                self._target, self._reseat = self._joints_now(), True
        if self.at_rest:
            self.rest()
        if self.state is not State.HOLD:
            self._held_ns = None
            return
        if self._held_ns is None:
            self._held_ns = now_ns
        if self.at_rest and now_ns - self._held_ns >= self.limits.hold_to_stop_s * 1e9:
            self.stop(f"held for {self.limits.hold_to_stop_s:g} s: {self.reason}")

    def _wanted(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int) -> Array | None:
        """The action (A,) to follow as far as the limits let; None to stop."""
        action, problem, grave = None, self._stale(now_ns), False
        if not problem:
            problem = self._unshown.frozen or self._places.beyond()
            grave = bool(problem)
        if not problem:
            action, problem, grave = self._read(proposed, now_ns, due_ns)
        if not problem:
            self._missing_ns = None
        elif grave:
            self.hold(problem)
        else:
            # As if missing since its period began, so that the hold comes within the patience, not a period after it.
            self._missing_ns = now_ns if self._missing_ns is None else self._missing_ns
            if now_ns - self._missing_ns + self._period_ns > self.limits.patience_s * 1e9 + _EPS:
                self.hold(problem)
        return None if problem or self.state is not State.RUNNING else action

    def _read(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int) -> tuple[Array | None, str, bool]:
        """The action, or what is wrong with it and whether that can't be waited out."""
        if proposed is None:
            return None, "no action came", False
        try:
            action = np.asarray(proposed, np.float64)
        except (TypeError, ValueError):
            return None, "what was proposed is not an action", True
        if action.shape != (self.robot_spec.action_dim,):
            return None, f"the action has shape {action.shape}, expected ({self.robot_spec.action_dim},)", True
        if not (np.abs(action) <= _LARGEST).all():
            return None, "the action contains NaN or infinity", True
        if now_ns - due_ns > self.limits.max_action_age_s * 1e9:
            return None, f"the action is {(now_ns - due_ns) / 1e6:.0f} ms too late", False
        if self._due_ns is not None and due_ns < self._due_ns:
            return None, "the action is older than the one before it", False
        self._due_ns = due_ns
        return action, "", False

    def _stale(self, now_ns: int) -> str:
        if self._captured_ns is None:
            return "the robot has not been seen yet"
        age_ns = now_ns - self._captured_ns
        if age_ns < -self._period_ns:
            self._from_future = True  # or every later observation would count as old
            return f"the last observation is {-age_ns / 1e6:.0f} ms in the future; is its clock another one?"
        if age_ns > self.limits.max_observation_age_s * 1e9:
            return f"the last observation is {age_ns / 1e6:.0f} ms old{self._stale_reason}"
        return ""

    # ---- what is allowed of it

    def _next_change(self, action: Array | None) -> Array:
        """The velocities' next change (N,)."""
        axes, motion = self.axes, self._motion
        stop = stopping.stop_change(motion, self._velocity, self._change)
        if action is None:
            return stop
        self._gripper = np.clip(action[axes.gripper], axes.gripper_low, axes.gripper_high)
        want = action[axes.index] * axes.scale + axes.offset
        if axes.absolute and self._target is not None:
            want = np.clip(want, axes.low, axes.high) - self._target
        velocity = np.clip(want / motion.period_s, -motion.speed, motion.speed)
        change = np.clip(velocity - self._velocity, *stopping.allowed(motion, self._velocity, self._change))
        start_low, start_high = self._start()
        low, high = self._places.room(start_low, start_high, want)
        reach = stopping.reach(motion, self._velocity + change, change)
        if (start_high + reach > high).any() or (start_low - reach < low).any():
            change = self._fit(change, stop, low - start_low, high - start_high)
        pending, maybe_shown = self._unshown.pending(self._captured_ns or 0)
        if self._places.clear(start_low, start_high, reach, pending):
            return change
        for share in _SHARES_TOGETHER:
            less = stop + share * (change - stop)
            path = stopping.stop_path(motion, self._velocity + less, less)
            if share == 0 or self._places.path_clear(start_low, start_high, path, pending, maybe_shown):
                return less
        return stop

    def _start(self) -> tuple[Array, Array]:
        """Least and greatest place (N,) of the axes when the next command is acted on."""
        n = len(self.axes.index)
        if self.axes.absolute and self._target is not None:
            return self._target, self._target
        low, high = np.zeros(n), np.zeros(n)
        pending, maybe_shown = self._unshown.pending(self._captured_ns or 0)
        if pending:
            low, high = hull(np.stack(pending), maybe_shown)
        base = np.zeros(n)
        if self._places.pose is not None and self._places.translation is not None:
            base[self._places.translation] = self._places.pose.position
        return base + low, base + high

    def _fit(self, change: Array, stop: Array, low: Array, high: Array) -> Array:
        """As much of the change, axis by axis, as leaves a stop within low and high, or else the stop."""
        tried = stop + _SHARES * (change - stop)
        places = np.cumsum(stopping.stop_path(self._motion, self._velocity + tried, tried), axis=0)
        fits = (np.maximum(places.max(0), 0) <= high + _EPS) & (np.minimum(places.min(0), 0) >= low - _EPS)
        fits[0] = True
        best = len(_SHARES) - 1 - np.argmax(fits[::-1], axis=0)
        return np.asarray(tried[best, np.arange(len(change))])
