"""A simulated follower with delays, a filter for it, and a watch over what the filter lets through."""

import os
from collections import deque

import numpy as np

from sacflow_robot.envs.tasks import get_task
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import Box, Cone, SafetyLimits
from sacflow_robot.spec import RobotSpec

CASES = int(os.environ.get("SACFLOW_SAFETY_CASES", "150"))
ROBOT = get_task("lift").robot
PERIOD = ROBOT.period_ns
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
    """A robot that does what it is told a while later, and is seen a while later still."""

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


def enabled(
    limits: SafetyLimits, robot: RobotSpec = ROBOT, position: tuple[float, float, float] = (0, 0, 0.2)
) -> SafetyFilter:
    filter_, body = SafetyFilter(robot, limits), Follower(0, 0)
    body.position = np.array(position)
    filter_.see(*body.look(0))
    filter_.enable(0)
    return filter_
