"""A robot's place, commanded motions that no observation of it has shown yet, and the places where it may be: workspace,
keep-out boxes, tool cone, joint limits."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.robot.safety.safety_limits import Array, Axes, SafetyLimits
from sacflow_robot.spec import ArraySpec, RobotSpec
from sacflow_robot.utils.rotations import tilt_along, tool_axis

_EPS = 1e-9
# A commanded motion this large has to change what is observed.
_NOTICEABLE_M = 1e-3
_NOTICEABLE_RAD = 2e-3
# The most that may be commanded while what is observed does not change.
_BLIND_M = 0.02
_BLIND_RAD = 0.1


class Pose(NamedTuple):
    """Pose of the end effector, in the frame of its observation.

    Attributes:
        position: Position (3,), in meters.
        quat: Unit quaternion (4,), x y z w.
    """

    position: Array
    quat: Array


class Places:
    """The robot's place, as far as its observation tells, and the places where it may be.

    Attributes:
        pose: The end effector's pose; None before it was seen, or where it is not observed.
        joints: Positions (N,) of the joints, those that are commanded if any are; rad.
        translation: The axes (3,) that move the end effector's position; None if none do.
        rotation: The axes (3,) that turn it; None if none do.

    Raises:
        InvalidValueError: The limits need an observation that the robot does not make.
    """

    def __init__(self, robot: RobotSpec, limits: SafetyLimits, axes: Axes) -> None:
        self._axes = axes
        self._joint_limits = limits.joint_rad
        self._joint_room: Array | None = None
        self._seen: Mapping[str, npt.NDArray[Any]] | None = None
        self._position_key = _find(robot, "eef_pos", "m", 3)
        self._quat_key = _find(robot, "eef_quat", "unit quaternion", 4)
        self._joint = _find_joints(robot, len(axes.index) if axes.absolute else max(len(limits.joint_rad), 1))
        self.pose: Pose | None = None
        self.joints: Array | None = None
        # Of a robot commanded in positions: which of the joints it observes, the gripper perhaps among them.
        self._commanded: npt.NDArray[np.intp] | slice = slice(None)
        if axes.absolute and self._joint is not None:
            same = next(a.size for a in robot.observations if a.key == self._joint[0]) == robot.action_dim
            self._commanded = axes.index if same else slice(len(axes.index))
        moved = not axes.absolute and axes.length.sum() == 3
        self.translation = np.flatnonzero(axes.length) if moved and self._position_key else None
        self.rotation = np.flatnonzero(~axes.length) if moved and (~axes.length).sum() == 3 else None
        if (limits.workspace or limits.keep_out) and self.translation is None:
            raise InvalidValueError(
                "the profile has a workspace or keep-out boxes, which need a robot that is commanded in x, y, z and "
                "observes its eef_pos; leave them out for this one"
            )
        if limits.cone is not None and (self.rotation is None or not self._quat_key):
            raise InvalidValueError("the profile has a tool cone, which needs rotations and an eef_quat; leave it out")
        if axes.absolute and self._joint is None:
            raise InvalidValueError("a robot that is commanded in positions has to observe its joints, in rad or deg")
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

    def read(self, seen: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
        """Take an observation; which axes (N,) read bit for bit what they did in the observation before.

        An axis that no observation tells by itself counts as unchanged where every observed number is.
        """
        same = self._unchanged(seen)
        self._seen = seen
        if self._joint is not None:
            key, factor = self._joint
            self.joints = seen[key].astype(np.float64).reshape(-1)[self._commanded] * factor
        if self._position_key:
            quat = seen[self._quat_key].astype(np.float64) if self._quat_key else np.array([0.0, 0, 0, 1])
            self.pose = Pose(seen[self._position_key].astype(np.float64), quat)
        return same

    def forget(self) -> None:
        """Forget where the robot is: it may have been moved meanwhile. What was read last stays, to tell what repeats."""
        self.pose = self.joints = self._joint_room = None

    def release_joints(self) -> None:
        """Take the joints as they stand: one that is beyond its limit may come back."""
        self._joint_room = None

    def _unchanged(self, seen: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
        before, n = self._seen, len(self._axes.index)
        if before is None:
            return np.zeros(n, bool)
        if self._axes.absolute and self._joint is not None:
            key = self._joint[0]
            return np.asarray((seen[key] == before[key]).reshape(-1)[self._commanded])
        if self.translation is None:
            return np.full(n, all(np.array_equal(array, before[key]) for key, array in seen.items()))
        same = np.zeros(n, bool)
        assert self._position_key is not None
        same[self.translation] = np.array_equal(seen[self._position_key], before[self._position_key])
        if self.rotation is not None and self._quat_key:
            same[self.rotation] = np.array_equal(seen[self._quat_key], before[self._quat_key])
        return same

    def keep_out_at(self, position: Array) -> str:
        """Name of the box, margin included, that the position is in; empty for none."""
        inside = ((position > self._out_low) & (position < self._out_high)).all(axis=1)
        return self._names[int(np.argmax(inside))] if inside.any() else ""

    def beyond(self) -> str:
        """Name a joint that is seen, not commanded, and further beyond its limit than when the robot was enabled; else empty."""
        limits = self._joint_limits
        if self._axes.absolute or self.joints is None or not limits:
            return ""
        low, high = np.array(limits).T
        over = np.maximum(low - self.joints[: len(low)], self.joints[: len(low)] - high)
        if self._joint_room is None:
            self._joint_room = np.maximum(over, 0)
        worst = int(np.argmax(over - self._joint_room))
        if over[worst] <= self._joint_room[worst]:
            return ""
        return f"joint {worst + 1} is {over[worst]:.3f} rad beyond its limit"

    def room(self, start_low: Array, start_high: Array, want: Array) -> tuple[Array, Array]:
        """Between where and where (N,) every axis has to stop. An axis that is out already may only come back."""
        low, high = np.full(len(want), -np.inf), np.full(len(want), np.inf)
        if self._axes.absolute:
            low, high = np.minimum(start_low, start_low + want), np.maximum(start_high, start_high + want)
        elif self.translation is not None:
            low[self.translation], high[self.translation] = self._low, self._high
        return np.minimum(low, start_low), np.maximum(high, start_high)

    def clear(self, low: Array, high: Array, reach: Array, pending: Sequence[Array]) -> bool:
        """Check quickly that nothing is in the way within that reach of those places.

        Args:
            low: Least place (N,) of the axes when the next command is acted on.
            high: Greatest place (N,).
            reach: A distance (N,) that the motion and the stop after it do not exceed.
            pending: Motions (N,) that the last observation may not show.
        """
        if len(self._out_low) and self.translation is not None:
            t = self.translation
            near = ((high + reach)[t] > self._out_low) & ((low - reach)[t] < self._out_high)
            if near.all(axis=1).any():
                return False
        if self._cone_axis is None or self.rotation is None or self.pose is None:
            return True
        turned = sum(float(np.linalg.norm(motion[self.rotation])) for motion in pending)
        turn = turned + float(np.linalg.norm(reach[self.rotation]))
        return self._tilt(tool_axis(self.pose.quat)) + turn <= self._cone_rad

    def path_clear(self, low: Array, high: Array, path: Array, pending: Sequence[Array], maybe_shown: int) -> bool:
        """Check that the displacements (P, N), from any of the places between low and high, keep out of boxes and in
        the cone.

        Args:
            low: Least place (N,) of the axes when the next command is acted on.
            high: Greatest place (N,).
            path: Displacements (P, N), one a period.
            pending: Commanded motions that the last observation may not show yet, oldest first.
            maybe_shown: How many of the first `pending` motions that observation may already show.
        """
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
        before = np.reshape([motion[self.rotation] for motion in pending], (-1, 3))
        start = tool_axis(self.pose.quat)
        widest = max(self._cone_rad, self._tilt(start))
        # The orientation seen may show the effect of any of the first commands already: each possibility has to be in the cone.
        for shown in range(maybe_shown + 1):
            turns = np.concatenate([before[shown:], path[:, self.rotation]])
            if tilt_along(start, turns, self._cone_axis) > widest + _EPS:
                return False
        return True

    def _tilt(self, axis: Array) -> float:
        assert self._cone_axis is not None
        return float(np.arccos(np.clip(axis @ self._cone_axis, -1, 1)))


def _find(robot: RobotSpec, ending: str, unit: str, size: int) -> str | None:
    return next(
        (a.key for a in robot.observations if a.key.endswith(ending) and a.unit.startswith(unit) and a.size == size),
        None,
    )


def _find_joints(robot: RobotSpec, least: int) -> tuple[str, float] | None:
    def fits(a: ArraySpec) -> bool:
        return a.unit in ("rad", "deg") and a.size >= least and a.dtype.startswith("float")

    found = next((a for a in robot.observations if fits(a)), None)
    return None if found is None else (found.key, np.pi / 180 if found.unit == "deg" else 1.0)


def hull(motions: Array, reflected: int) -> tuple[Array, Array]:
    """Smallest and largest displacement (N,) since an observation.

    Args:
        motions: Commanded displacements (M, N), oldest first. Each may have been acted on already, or not yet.
        reflected: How many of the first `motions` the observation may already show, fully or in part; it shows none of
            the others.
    """
    after = np.concatenate([np.zeros((1, motions.shape[1])), np.cumsum(motions, axis=0)])
    shown, done = after[: reflected + 1], after[reflected:]
    return done.min(0) - shown.max(0), done.max(0) - shown.min(0)


class UnshownMotion:
    """Sums up the motions (N,) of the axes since the last change of what is observed of them.

    Values that freeze while their time stamps stay fresh (a tracker, a driver's thread) would else let the robot drift without
    bound: each observation would seem to say that nothing moved. A measured value repeats to the last bit only by chance.

    Attributes:
        frozen: Why the observed values count as frozen; empty while they do not.
    """

    def __init__(self, axes: Axes, limits: SafetyLimits, period_ns: int) -> None:
        self._axes = axes
        self._max_age_s = limits.max_observation_age_s
        self._span_ns = period_ns + round(limits.max_command_delay_s * 1e9)
        self._noticeable = np.where(axes.length, _NOTICEABLE_M, _NOTICEABLE_RAD)
        self._blind_path = np.where(axes.length, _BLIND_M, _BLIND_RAD)
        self._sent: deque[tuple[int, Array]] = deque()  # motions that an observation need not show by now
        self._overdue = np.zeros(len(axes.index))  # the sum of those before
        self._changed_ns = np.zeros(len(axes.index), np.int64)
        self._shown_ns = np.zeros(len(axes.index), np.int64)
        self.frozen = ""

    def begin(self) -> None:
        """Begin an episode, whose clock may start anew. What no observation has shown stays: frozen values may still be."""
        self._overdue = self.total()
        self._sent.clear()
        self._changed_ns = np.zeros_like(self._changed_ns)
        self._shown_ns = np.zeros_like(self._shown_ns)
        self.frozen = ""

    def restart_age(self, captured_ns: int) -> None:
        """Begin the frozen values' age anew; what is not shown stays: it may be where the robot is."""
        self._shown_ns = np.full_like(self._shown_ns, captured_ns)
        self.frozen = ""

    def send(self, motion: Array, now_ns: int) -> None:
        """Note a commanded motion (N,)."""
        self._sent.append((now_ns, motion))

    def total(self) -> Array:
        """Sum (N,) of the motions since the last change of what is observed of their axes."""
        total = self._overdue
        for sent_ns, motion in self._sent:
            total = total + np.where(self._changed_ns > sent_ns, 0.0, motion)
        return total

    def pending(self, captured_ns: int) -> tuple[list[Array], int]:
        """Motions (N,) that the last observation may not show, and how many of them, from the first on, it may show."""
        overdue = [self._overdue] if self._overdue.any() else []
        maybe_shown = len(overdue) + sum(sent_ns < captured_ns for sent_ns, _ in self._sent)
        return [*overdue, *(motion for _, motion in self._sent)], maybe_shown

    def see(self, same: npt.NDArray[np.bool_], captured_ns: int) -> None:
        """Drop the motions that an observation has to show by now, and add up those of axes that read as they did
        before.

        Args:
            same: Which axes (N,) read bit for bit what they did in the observation before.
        """
        self._changed_ns = np.where(same, self._changed_ns, captured_ns)
        self._overdue = np.where(same, self._overdue, 0.0)
        while self._sent and self._sent[0][0] + self._span_ns <= captured_ns:
            sent_ns, motion = self._sent.popleft()
            self._overdue = self._overdue + np.where(self._changed_ns > sent_ns, 0.0, motion)
        size = np.abs(self._overdue)
        self._shown_ns = np.where(size > self._noticeable, self._shown_ns, captured_ns)
        age_s = (captured_ns - self._shown_ns) / 1e9
        frozen = (size > self._blind_path) & (age_s > self._max_age_s)
        self.frozen = ""
        if frozen.any():
            axis = int(np.argmax(np.where(frozen, size / self._blind_path, 0)))
            unit = "m" if self._axes.length[axis] else "rad"
            self.frozen = (
                f"the observed values have not changed for {age_s[axis]:.2f} s, in which {size[axis]:.2f} {unit} of "
                f"{self._axes.names[axis]!r} were commanded: they are frozen, or the robot is blocked"
            )
