"""The safety filter: what stands between whoever chooses an action (policy, person, replay) and the arm.

What it promises, of the commands that leave it, whatever comes in:

- speed, acceleration and jerk of every axis are within the limits, and so is the gripper's command;
- there is always a stop within those limits that stays in the workspace, out of what is to be kept out of, and within the
  tool's cone. A command is let through only if the stop after it has been looked at; where it fails, the filter gives as
  much of it as does not, down to the stop that was looked at one period before;
- without a fresh action it stops. It does not go anywhere to do so.

The poses are those of an arm that follows its commands, however late within ``max_command_delay_s``, to within the tracking
margins, and whose observations are true at their capture time; they are commanded from the last observation on. All arithmetic
is double precision; what is sent is rounded to the nearest float32.

States are latched: ``armed`` → ``hold`` (stopping or at rest, what is proposed is ignored) → ``stopped`` (nothing is sent). The
only way back is :meth:`SafetyFilter.arm`, which nothing in this package calls on its own once an arm has moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError, RobotError
from sacflow_robot.robot import stopping
from sacflow_robot.robot.poses import Pose, hull, tilt_along, tool_axis
from sacflow_robot.safetylimits import Array, SafetyLimits, action_axes
from sacflow_robot.spec import ArmSpec, ArraySpec, FloatArray

_SHARES = np.linspace(0, 1, 17)[:, None]
_SHARES_TOGETHER = 1.0, 0.75, 0.5, 0.25, 0.0
_EPS = 1e-9
_LARGEST = float(np.finfo(np.float32).max)
_GAP_PERIODS = 2.5  # a filter not asked for this long finds an arm that has held by itself


class State(StrEnum):
    """What the filter lets through."""

    ARMED = "armed"
    HOLD = "hold"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be sent in one control period.

    Attributes:
        action: The action (A,), float32; None: send nothing; if the state is stopped, stop the arm.
        state: The filter's state.
        changed: Whether it differs from what was proposed, or nothing was.
        held: Whether it is a stop, or standing still, for want of an action that may be followed.
        reason: Why the filter holds or has stopped; empty while it is armed.
    """

    action: FloatArray | None
    state: State
    changed: bool
    held: bool
    reason: str = ""


class SafetyFilter:
    """Turns proposed actions into ones that may be sent; call :meth:`see` and :meth:`step` once in each control period.

    Args:
        arm: The arm. Axes are the entries of its action whose unit is a length or an angle; its own bounds always hold.
        limits: What to enforce on top of them.

    Attributes:
        state: Begins as hold.
        reason: Why it holds or has stopped.

    Raises:
        InvalidValueError: The limits do not fit the arm, or need an observation that it does not make.
    """

    def __init__(self, arm: ArmSpec, limits: SafetyLimits | None = None) -> None:
        self.arm_spec, self.limits = arm, limits or SafetyLimits()
        self.axes = axes = action_axes(arm, self.limits)
        self._period_ns = arm.period_ns
        self._motion = stopping.Motion.of(1 / arm.control_rate_hz, axes.speed, axes.acceleration, axes.jerk)
        self._places = _Places(arm, self)
        self.state, self.reason = State.HOLD, "not armed yet"
        self.begin()

    def begin(self, gripper: FloatArray | None = None) -> None:
        """Forget what was seen and sent: the arm is at rest, at a place not yet seen. The state stays what it is.

        Args:
            gripper: What the gripper's entries (M,) of the action are while nothing is asked for: zeros if None, which on
                an arm that is commanded in positions is a place to go to.
        """
        n = len(self.axes.index)
        self._velocity, self._change = np.zeros(n), np.zeros(n)
        self._sent: deque[tuple[int, Array]] = deque()
        self._pose: Pose | None = None
        self._target: Array | None = None
        self._captured_ns = self._last_ns = self._due_ns = self._missing_ns = self._held_ns = None  # type: int | None
        self._from_future, self._stale_reason = False, ""
        self._joint_room: Array | None = None
        self._halting = self._reseat = False
        asked = np.zeros(len(self.axes.gripper)) if gripper is None else gripper
        self._gripper = np.clip(asked, self.axes.gripper_low, self.axes.gripper_high).astype(np.float64)

    @property
    def at_rest(self) -> bool:
        """Whether no motion is commanded."""
        return not (self._velocity.any() or self._change.any())

    @property
    def stop_s(self) -> float:
        """Time within which the arm is at rest from any motion within the limits."""
        return self._motion.stop_periods / self.arm_spec.control_rate_hz

    # ---- the state machine

    def arm(self, now_ns: int) -> None:
        """Let actions through from now on: a deliberate act of a person, or of the program that a person started.

        Raises:
            RobotError: The arm still moves, has not been seen lately, or stands where it must not be.
        """
        if not self.at_rest:
            raise RobotError("cannot arm: the arm is still coming to rest; try again in a moment")
        stale = self._stale(now_ns)
        if stale:
            raise RobotError(f"cannot arm: {stale}")
        if self._pose is not None:
            inside = self._places.keep_out_at(self._pose.position)
            if inside:
                raise RobotError(f"cannot arm: the arm is inside {inside}, which it must keep out of; move it by hand")
        if self.axes.absolute:
            self._target = self._places.joints  # it may have been moved by hand
        self.state, self.reason, self._halting = State.ARMED, "", False
        self._missing_ns = self._held_ns = self._due_ns = self._last_ns = None
        self._joint_room = None

    def hold(self, reason: str) -> None:
        """Stop within the limits, and stay so until armed anew. Does nothing to an arm that holds or is stopped."""
        if self.state is State.ARMED:
            self.state, self.reason = State.HOLD, reason

    def halt(self, reason: str) -> None:
        """An emergency stop: hold, and be stopped as soon as the arm is at rest, which is within ``stop_s``."""
        self.hold(reason)
        if self.state is State.HOLD:
            self.reason, self._halting = reason, True

    def stop(self, reason: str) -> None:
        """Send nothing any more, at once, until armed anew."""
        if self.state is not State.STOPPED:
            self.state, self.reason = State.STOPPED, reason
            self._velocity, self._change = np.zeros_like(self._velocity), np.zeros_like(self._change)

    # ---- once in each control period

    def see(self, observation: Mapping[str, Any], captured_ns: int, stale_reason: str = "") -> bool:
        """Take note of an observation; whether it can be used. One that is older than the last, or is broken, is not.

        ``stale_reason`` says why there is none that is newer, where the arm knows.
        """
        self._stale_reason = f": {stale_reason}" if stale_reason else ""
        if self._captured_ns is not None and captured_ns < self._captured_ns and not self._from_future:
            return False
        try:
            seen = self.arm_spec.check_observation(observation)
        except (InvalidValueError, TypeError, ValueError):
            return False
        self._captured_ns, self._from_future = captured_ns, False
        self._places.read(seen)
        self._pose = self._places.pose
        if self.axes.absolute and (self._target is None or self._reseat):
            self._target, self._reseat = self._places.joints, False
        span = self._period_ns + round(self.limits.max_command_delay_s * 1e9)
        while self._sent and self._sent[0][0] + span <= captured_ns:
            self._sent.popleft()
        return True

    def step(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int | None = None) -> Verdict:
        """What may be sent in place of a proposed action.

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
        if motion.any():
            self._sent.append((now_ns, motion))
        if self.axes.absolute:
            if self._target is None:  # zeros would be a place to go to
                return Verdict(None, self.state, True, True, self.reason)
            self._target = self._target + motion
        action = np.zeros(self.arm_spec.action_dim)
        action[self.axes.index] = (
            (motion if self._target is None else self._target) - self.axes.offset
        ) / self.axes.scale
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
        """Notice a loop that was silent for so long that the arm has held by itself, and time spent holding."""
        last, self._last_ns = self._last_ns, now_ns
        if last is not None and now_ns < last:  # says nothing about the arm, which has to come to rest as ever
            self.hold(f"the clock went back by {(last - now_ns) / 1e6:.0f} ms")
        elif last is not None and now_ns - last > _GAP_PERIODS * self._period_ns:
            self.hold(f"the control loop was silent for {(now_ns - last) / 1e6:.0f} ms")
            self._velocity, self._change = np.zeros_like(self._velocity), np.zeros_like(self._change)
            if self.axes.absolute:  # it holds where it is, which need not be where it was last told to be
                self._target, self._reseat = self._places.joints, True
        if self.state is not State.HOLD:
            self._held_ns = None
            return
        if self._held_ns is None:
            self._held_ns = now_ns
        if self._halting and self.at_rest:
            self.stop(self.reason)
        elif self.at_rest and now_ns - self._held_ns >= self.limits.hold_to_stop_s * 1e9:
            self.stop(f"held for {self.limits.hold_to_stop_s:g} s: {self.reason}")

    def _wanted(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int) -> Array | None:
        """The action (A,) to follow as far as the limits let; None to stop."""
        action, problem, grave = None, self._stale(now_ns), False
        if not problem:
            problem = self._places.beyond(self)
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
        return None if problem or self.state is not State.ARMED else action

    def _read(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int) -> tuple[Array | None, str, bool]:
        """The action, or what is wrong with it and whether that can't be waited out."""
        if proposed is None:
            return None, "no action came", False
        try:
            action = np.asarray(proposed, np.float64)
        except (TypeError, ValueError):
            return None, "what was proposed is no action", True
        if action.shape != (self.arm_spec.action_dim,):
            return None, f"the action has shape {action.shape}, expected ({self.arm_spec.action_dim},)", True
        if not (np.abs(action) <= _LARGEST).all():
            return None, "the action holds NaN or infinity", True
        if now_ns - due_ns > self.limits.max_action_age_s * 1e9:
            return None, f"the action is {(now_ns - due_ns) / 1e6:.0f} ms too late", False
        if self._due_ns is not None and due_ns < self._due_ns:
            return None, "the action is older than the one before it", False
        self._due_ns = due_ns
        return action, "", False

    def _stale(self, now_ns: int) -> str:
        if self._captured_ns is None:
            return "the arm has not been seen yet"
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
        low, high = self._places.room(self, want)
        start_low, start_high = self._start()
        reach = stopping.reach(motion, self._velocity + change, change)
        if (start_high + reach > high).any() or (start_low - reach < low).any():
            change = self._fit(change, stop, low - start_low, high - start_high)
        if self._places.clear(self, start_low, start_high, reach):
            return change
        for share in _SHARES_TOGETHER:
            less = stop + share * (change - stop)
            path = stopping.stop_path(motion, self._velocity + less, less)
            if share == 0 or self._places.path_clear(self, start_low, start_high, path):
                return less
        return stop

    def _start(self) -> tuple[Array, Array]:
        """Least and greatest place (N,) of the axes when the next command is acted on."""
        n = len(self.axes.index)
        if self.axes.absolute and self._target is not None:
            return self._target, self._target
        low, high = np.zeros(n), np.zeros(n)
        if self._sent and self._captured_ns is not None:
            low, high = hull(np.stack([motion for _, motion in self._sent]), self._maybe_shown())
        base = np.zeros(n)
        if self._pose is not None and self._places.translation is not None:
            base[self._places.translation] = self._pose.position
        return base + low, base + high

    def _maybe_shown(self) -> int:
        """How many of the commands sent the last observation may show the effect of: those sent before it was captured."""
        return sum(sent < self._captured_ns for sent, _ in self._sent) if self._captured_ns is not None else 0

    def _fit(self, change: Array, stop: Array, low: Array, high: Array) -> Array:
        """As much of the change, axis by axis, as leaves a stop within low and high, or else the stop."""
        tried = stop + _SHARES * (change - stop)
        places = np.cumsum(stopping.stop_path(self._motion, self._velocity + tried, tried), axis=0)
        fits = (np.maximum(places.max(0), 0) <= high + _EPS) & (np.minimum(places.min(0), 0) >= low - _EPS)
        fits[0] = True
        best = len(_SHARES) - 1 - np.argmax(fits[::-1], axis=0)
        return np.asarray(tried[best, np.arange(len(change))])


class _Places:
    """Where the arm is, as far as its observation tells, and where it may be."""

    def __init__(self, arm: ArmSpec, filter_: SafetyFilter) -> None:
        limits, axes = filter_.limits, filter_.axes
        self._position_key = _find(arm, "eef_pos", "m", 3)
        self._quat_key = _find(arm, "eef_quat", "unit quaternion", 4)
        self._joint = _find_joints(arm, len(axes.index) if axes.absolute else max(len(limits.joint_rad), 1))
        self.pose: Pose | None = None
        self.joints: Array | None = None
        # Of an arm commanded in positions: which of the joints it observes, the gripper perhaps among them.
        self._commanded: npt.NDArray[np.intp] | slice = slice(None)
        if axes.absolute and self._joint is not None:
            same = next(a.size for a in arm.observations if a.key == self._joint[0]) == arm.action_dim
            self._commanded = axes.index if same else slice(len(axes.index))
        moved = not axes.absolute and axes.length.sum() == 3
        self.translation = np.flatnonzero(axes.length) if moved and self._position_key else None
        self.rotation = np.flatnonzero(~axes.length) if moved and (~axes.length).sum() == 3 else None
        if (limits.workspace or limits.keep_out) and self.translation is None:
            raise InvalidValueError(
                "the profile has a workspace or keep-out boxes, which need an arm that is commanded in x, y, z and "
                "observes its eef_pos; leave them out for this one"
            )
        if limits.cone is not None and (self.rotation is None or not self._quat_key):
            raise InvalidValueError("the profile has a tool cone, which needs rotations and an eef_quat; leave it out")
        if axes.absolute and self._joint is None:
            raise InvalidValueError("an arm that is commanded in positions has to observe its joints, in rad or deg")
        margin = limits.tracking_margin_m
        box = limits.workspace
        self._low = np.full(3, -np.inf) if box is None else np.asarray(box.low) + margin
        self._high = np.full(3, np.inf) if box is None else np.asarray(box.high) - margin
        if (self._low >= self._high).any():
            raise InvalidValueError("the workspace less its margins has no room left")
        self._names = [b.name or "a keep-out box" for b in limits.keep_out]
        self._out_low = np.array([b.low for b in limits.keep_out]).reshape(-1, 3) - margin
        self._out_high = np.array([b.high for b in limits.keep_out]).reshape(-1, 3) + margin
        self._cone_axis = (
            None if limits.cone is None else np.asarray(limits.cone.axis) / np.linalg.norm(limits.cone.axis)
        )
        self._cone_rad = np.inf if limits.cone is None else limits.cone.angle_rad - limits.tracking_margin_rad

    def read(self, seen: Mapping[str, npt.NDArray[Any]]) -> None:
        if self._joint is not None:
            key, factor = self._joint
            self.joints = seen[key].astype(np.float64).reshape(-1)[self._commanded] * factor
        if self._position_key:
            quat = seen[self._quat_key].astype(np.float64) if self._quat_key else np.array([0.0, 0, 0, 1])
            self.pose = Pose(seen[self._position_key].astype(np.float64), quat)

    def keep_out_at(self, position: Array) -> str:
        """Name of the box, margin included, that the position is in; empty for none."""
        inside = ((position > self._out_low) & (position < self._out_high)).all(axis=1)
        return self._names[int(np.argmax(inside))] if inside.any() else ""

    def beyond(self, filter_: SafetyFilter) -> str:
        """Whether a joint that is seen, not commanded, is at its limit, and further than when the arm was armed."""
        limits = filter_.limits.joint_rad
        if filter_.axes.absolute or self.joints is None or not limits:
            return ""
        low, high = np.array(limits).T
        over = np.maximum(low - self.joints[: len(low)], self.joints[: len(low)] - high)
        if filter_._joint_room is None:
            filter_._joint_room = np.maximum(over, 0)
        worst = int(np.argmax(over - filter_._joint_room))
        if over[worst] <= filter_._joint_room[worst]:
            return ""
        return f"joint {worst + 1} is {over[worst]:.3f} rad beyond its limit"

    def room(self, filter_: SafetyFilter, want: Array) -> tuple[Array, Array]:
        """Between where and where (N,) every axis has to stop. An axis that is out already may only come back."""
        axes = filter_.axes
        start_low, start_high = filter_._start()
        low, high = np.full(len(want), -np.inf), np.full(len(want), np.inf)
        if axes.absolute:
            low, high = np.minimum(start_low, start_low + want), np.maximum(start_high, start_high + want)
        elif self.translation is not None:
            low[self.translation], high[self.translation] = self._low, self._high
        return np.minimum(low, start_low), np.maximum(high, start_high)

    def clear(self, filter_: SafetyFilter, low: Array, high: Array, reach: Array) -> bool:
        """Whether nothing within that reach of those places is in the way, which is quickly seen."""
        if len(self._out_low) and self.translation is not None:
            t = self.translation
            near = ((high + reach)[t] > self._out_low) & ((low - reach)[t] < self._out_high)
            if near.all(axis=1).any():
                return False
        if self._cone_axis is None or self.rotation is None or self.pose is None:
            return True
        pending = sum(float(np.linalg.norm(motion[self.rotation])) for _, motion in filter_._sent)
        turn = pending + float(np.linalg.norm(reach[self.rotation]))
        return self._tilt(tool_axis(self.pose.quat)) + turn <= self._cone_rad

    def path_clear(self, filter_: SafetyFilter, low: Array, high: Array, path: Array) -> bool:
        """Whether the displacements (P, N), from any of the places between low and high, keep out of boxes and in the cone."""
        if len(self._out_low) and self.translation is not None:
            ends = np.cumsum(path[:, self.translation], axis=0)
            ends = np.concatenate([np.zeros((1, 3)), ends])
            least, most = np.minimum(ends[:-1], ends[1:]), np.maximum(ends[:-1], ends[1:])
            least, most = least + low[self.translation], most + high[self.translation]
            hits = (most[:, None] > self._out_low) & (least[:, None] < self._out_high)
            if hits.all(axis=2).any():
                return False
        if self._cone_axis is None or self.rotation is None or self.pose is None:
            return True
        before = np.reshape([motion[self.rotation] for _, motion in filter_._sent], (-1, 3))
        start = tool_axis(self.pose.quat)
        widest = max(self._cone_rad, self._tilt(start))
        # The orientation seen may show the effect of any of the first commands already: each possibility has to be in the cone.
        for shown in range(filter_._maybe_shown() + 1):
            turns = np.concatenate([before[shown:], path[:, self.rotation]])
            if tilt_along(start, turns, self._cone_axis) > widest + _EPS:
                return False
        return True

    def _tilt(self, axis: Array) -> float:
        assert self._cone_axis is not None
        return float(np.arccos(np.clip(axis @ self._cone_axis, -1, 1)))


def _find(arm: ArmSpec, ending: str, unit: str, size: int) -> str | None:
    return next(
        (a.key for a in arm.observations if a.key.endswith(ending) and a.unit.startswith(unit) and a.size == size), None
    )


def _find_joints(arm: ArmSpec, least: int) -> tuple[str, float] | None:
    def fits(a: ArraySpec) -> bool:
        return a.unit in ("rad", "deg") and a.size >= least and a.dtype.startswith("float")

    found = next((a for a in arm.observations if fits(a)), None)
    return None if found is None else (found.key, np.pi / 180 if found.unit == "deg" else 1.0)
