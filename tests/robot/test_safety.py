"""Whatever comes in, what leaves the filter is within the limits; the arm is a simulated follower with delays."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.envs.tasks import get_task
from sacflow_robot.errors import RobotError
from sacflow_robot.robot.safety import SafetyFilter, State
from sacflow_robot.safetylimits import Box, Cone, SafetyLimits

CASES = int(os.environ.get("SACFLOW_SAFETY_CASES", "500"))
ARM = get_task("lift").arm
PERIOD = ARM.period_ns
GENTLE = SafetyLimits(
    speed_m_per_s=(0.6, 0.8, 0.4),
    acceleration_m_per_s2=(4, 3, 6),
    jerk_m_per_s3=(60, 100, 40),
    turn_rad_per_s=(2, 2, 3),
    turn_acceleration_rad_per_s2=(10, 20, 15),
    turn_jerk_rad_per_s3=(200, 300, 400),
    workspace=Box((-0.25, -0.3, 0.0), (0.25, 0.3, 0.4)),
    keep_out=(Box((0.1, -0.1, 0.0), (0.2, 0.1, 0.2), "the post"),),
    cone=Cone((0, 0, -1), 0.6),
    max_observation_age_s=0.15,
    max_action_age_s=0.1,
)
DOWN = np.array([1.0, 0, 0, 0])


def turned(quat: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The orientation x y z w after a rotation vector in the base's axes."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return quat
    axis = vector / angle * np.sin(angle / 2)
    w, (bx, by, bz, bw) = np.cos(angle / 2), quat
    out = np.array([*(w * quat[:3] + bw * axis + np.cross(axis, [bx, by, bz])), w * bw - axis @ [bx, by, bz]])
    return out / np.linalg.norm(out)


class Follower:
    """An arm that does what it is told a while later, and is seen a while later still."""

    def __init__(self, command_delay: int, sight_delay: int) -> None:
        self.position, self.quat = np.array([0.0, 0.0, 0.2]), DOWN
        self._queue: deque[np.ndarray] = deque([np.zeros(6)] * command_delay)
        self._seen: deque[tuple[dict[str, np.ndarray], int]] = deque(maxlen=sight_delay + 1)

    def look(self, now_ns: int) -> tuple[dict[str, np.ndarray], int]:
        seen = {
            "robot0_eef_pos": self.position.astype(np.float32),
            "robot0_eef_quat": self.quat.astype(np.float32),
            "robot0_gripper_qpos": np.zeros(2, np.float32),
            "object": np.zeros(10, np.float32),
        }
        self._seen.append((seen, now_ns))
        return self._seen[0]

    def move(self, action: np.ndarray) -> np.ndarray:
        """One period; returns the positions that it went through."""
        self._queue.append(action[:6].astype(np.float64) * ([0.05] * 3 + [0.5] * 3))
        motion = self._queue.popleft()
        way = self.position + np.linspace(0, 1, 5)[:, None] * motion[:3]
        self.position, self.quat = self.position + motion[:3], turned(self.quat, motion[3:])
        return way

    @property
    def tilt(self) -> float:
        x, y = self.quat[:2]
        return float(np.arccos(np.clip(-(1 - 2 * (x * x + y * y)), -1, 1)))


class Watch:
    """Holds every command against the limits, on its own terms: differences of what was sent, not the filter's state."""

    def __init__(self, limits: SafetyLimits = GENTLE) -> None:
        self.limits, self._sent = limits, [np.zeros(6)] * 3
        self.bounds = [
            np.array(per_m + per_rad)
            for per_m, per_rad in (
                (limits.speed_m_per_s, limits.turn_rad_per_s),
                (limits.acceleration_m_per_s2, limits.turn_acceleration_rad_per_s2),
                (limits.jerk_m_per_s3, limits.turn_jerk_rad_per_s3),
            )
        ]

    def check(self, action: np.ndarray) -> None:
        assert action.shape == (7,) and action.dtype == np.float32 and np.isfinite(action).all()
        assert (np.abs(action) <= 1).all()
        t = PERIOD / 1e9
        self._sent = [*self._sent[1:], action[:6].astype(np.float64) * ([0.05] * 3 + [0.5] * 3) / t]
        old, last, new = self._sent
        found = new, (new - last) / t, (new - 2 * last + old) / t**2
        for order, (value, bound) in enumerate(zip(found, self.bounds, strict=True)):
            rounding = 4e-7 * np.array([1.0] * 3 + [10.0] * 3) / t**order  # of float32 actions
            assert (np.abs(value) <= bound * (1 + 1e-6) + rounding).all(), (order, value, bound)

    def check_place(self, way: np.ndarray, tilt: float) -> None:
        box, (post,) = self.limits.workspace, self.limits.keep_out
        assert box is not None and self.limits.cone is not None
        assert (way >= np.array(box.low) - 1e-6).all() and (way <= np.array(box.high) + 1e-6).all()
        assert not ((way > np.array(post.low) + 1e-6) & (way < np.array(post.high) - 1e-6)).all(axis=1).any()
        assert tilt <= self.limits.cone.angle_rad + 1e-5

    @property
    def at_rest(self) -> bool:
        return not self._sent[-1].any()


NUMBERS = st.one_of(
    st.floats(-1.5, 1.5), st.sampled_from([1.0, -1.0, 0.0]), st.floats(allow_nan=True, allow_infinity=True)
)
STEADY = st.builds(lambda row, n: [row] * n, st.lists(st.floats(-1, 1), min_size=7, max_size=7), st.integers(5, 30))
ROW = st.lists(st.floats(-1, 1), min_size=7, max_size=7)
ODD = st.one_of(
    st.lists(NUMBERS, min_size=7, max_size=7),
    st.lists(NUMBERS, max_size=9),
    st.none(),
    st.just("full speed ahead"),
    st.just([[0.0] * 7]),
    st.just([1e30] * 7),
)
STREAM = st.lists(st.one_of(STEADY, st.lists(ROW, max_size=8), st.lists(ODD, max_size=3)), min_size=1, max_size=8)


@given(
    st.data(),
    STREAM,
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=CASES)
def test_whatever_arrives_no_command_breaks_a_limit_and_the_arm_stays_where_it_may_be(
    data: st.DataObject, stream: list[list[Any]], command_delay: int, sight_delay: int, late: bool
) -> None:
    limits = replace(GENTLE, max_command_delay_s=command_delay * PERIOD / 1e9)
    filter_, arm, watch = SafetyFilter(ARM, limits), Follower(command_delay, sight_delay), Watch()
    now = 10**9
    filter_.see(*arm.look(now))
    filter_.arm(now)
    odd = data.draw(st.lists(st.sampled_from(["see", "blind", "nan", "old", "future"]), max_size=6)) if late else []
    for proposed in [row for part in stream for row in part] + [None] * 2:
        seen, captured = arm.look(now)
        sight = odd.pop() if odd else "see"
        if sight == "nan":
            seen = {**seen, "robot0_eef_pos": np.full(3, np.nan, np.float32)}
        if sight == "old":
            captured -= 10**9
        if sight != "blind":
            filter_.see(seen, captured)
        due = now - (data.draw(st.sampled_from([0, 3 * PERIOD, -PERIOD])) if late and sight == "future" else 0)
        verdict = filter_.step(proposed, now, due)
        assert verdict.action is not None, "it stops on its own only after seconds of rest"
        watch.check(verdict.action)
        watch.check_place(arm.move(verdict.action), arm.tilt)
        if filter_.state is State.HOLD and filter_.at_rest and data.draw(st.booleans()):
            filter_.see(*arm.look(now))
            with contextlib.suppress(RobotError):
                filter_.arm(now)
        now += PERIOD
    for _ in range(round(filter_.stop_s * 20) + 1):  # silence
        filter_.see(*arm.look(now))
        verdict = filter_.step(None, now)
        assert verdict.action is not None and verdict.held
        watch.check(verdict.action)
        watch.check_place(arm.move(verdict.action), arm.tilt)
        now += PERIOD
        if watch.at_rest:
            break
    assert watch.at_rest, f"at rest within {filter_.stop_s} s of silence"
