"""A made-up robot that follows its commands, and who and what acts on it: a policy, a disk, people."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import LogWriteError, ServerError, StoppedError
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from sacflow_robot.robot.teleop.intervention import Label, TeleopSignal
from sacflow_robot.spec import ArraySpec, FloatArray, Observation, PolicySpec, RobotSpec

PERIOD = 50_000_000
MS = 1_000_000
SPEED, ACCELERATION = 0.5, 4.0
TURN, TURN_ACCELERATION = 1.0, 8.0
LIMITS = SafetyLimits(
    speed_m_per_s=(SPEED,) * 3,
    acceleration_m_per_s2=(ACCELERATION,) * 3,
    turn_rad_per_s=(TURN,) * 3,
    turn_acceleration_rad_per_s2=(TURN_ACCELERATION,) * 3,
    workspace=Box((-0.3, -0.3, 0.7), (0.3, 0.3, 1.3)),
    hold_to_stop_s=1.0,
)
POSITION_LIMITS = replace(LIMITS, workspace=None)
MOTIONS = RobotSpec(
    robot="made up",
    task="none",
    controller="OSC_POSE delta",
    control_rate_hz=20.0,
    observations=(
        ArraySpec("robot0_eef_pos", (3,), "m", "world"),
        ArraySpec("robot0_eef_quat", (4,), "unit quaternion xyzw", "world", quaternions=(0,)),
    ),
    action_names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
    action_units=("0.05 m",) * 3 + ("0.5 rad",) * 3 + ("closing",),
    action_low=(-1.0,) * 7,
    action_high=(1.0,) * 7,
)
POSITIONS = RobotSpec(
    robot="made up",
    task="none",
    controller="joint position",
    control_rate_hz=20.0,
    observations=(ArraySpec("joints", (3,), "rad"),),
    action_names=("j0", "j1", "j2"),
    action_units=("-2 to 2 rad",) * 3,
    action_low=(-1.0,) * 3,
    action_high=(1.0,) * 3,
)


class VirtualClock:
    def __init__(self) -> None:
        self.time_ns = 10**9

    def now_ns(self) -> int:
        self.time_ns += 1_000  # looking takes a while
        return self.time_ns

    def sleep_until(self, time_ns: int) -> None:
        self.time_ns = max(self.time_ns, time_ns)


class FollowingRobot:
    """Moves as commanded, at once; its senses can fail, while what it does is kept with its time."""

    def __init__(self, spec: RobotSpec, lockstep: bool) -> None:
        self.spec, self.lockstep, self.clock = spec, lockstep, VirtualClock()
        self.positions = spec is POSITIONS
        self.place = np.array([0.1, -0.2, 0.3]) if self.positions else np.array([0.0, 0.0, 1.0])
        self.target = self.place.copy()
        self.commands: list[tuple[int, FloatArray]] = []  # time, motion of the three axes
        self.stopped = True
        self.fault = ""
        self.turns = 0
        self.extra: dict[str, FloatArray] = {}
        self.last = self._seen()

    def connect(self) -> None:
        self.stopped = False

    def begin(self, seed: int) -> StepResult:
        self.commands.append((-1, np.zeros(3)))  # an episode begins here
        return self.observe()

    def observe(self) -> StepResult:
        now = self.clock.now_ns()
        if self.fault == "nan":
            broken = {key: np.full_like(value, np.nan) for key, value in self._seen().items()}
            return StepResult(broken, time_ns=now)
        if self.fault == "stale":
            return StepResult(dict(self.last), time_ns=now - 10**9)
        if self.fault != "frozen":
            self.last = self._seen()
        return StepResult(dict(self.last), time_ns=None if self.lockstep else now)

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        if self.stopped:
            raise StoppedError("stopped")
        assert valid_until_ns > self.clock.time_ns
        if self.positions:
            target = np.asarray(action[:3], np.float64) * 2
            motion, self.target = target - self.target, target
            self.place = target
        else:
            motion = np.asarray(action[:3], np.float64) * 0.05
            self.place = self.place + motion
            if np.any(action[3:6]):
                self.turns += 1  # how far does not matter here, but that the values change
        self.commands.append((self.clock.time_ns, motion))

    def hold(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass

    def _seen(self) -> dict[str, FloatArray]:
        place = self.place.astype(np.float32)
        if self.positions:
            return {"joints": place}
        return {
            **self.extra,
            "robot0_eef_pos": place,
            "robot0_eef_quat": np.array([1, 1e-5 * self.turns, 0, 0], np.float32),
        }


@dataclass
class ActionStep:
    action: FloatArray | None
    joined: bool = False


class Policy:
    """Chooses as it is told to."""

    def __init__(self, robot: FollowingRobot) -> None:
        n = sum(a.size for a in robot.spec.observations)
        self.spec = PolicySpec(robot.spec, 5, 4, "flow-g", (0.0,) * n, (1.0,) * n)
        self.clock, self.action, self.dead, self.late_ms = (
            robot.clock,
            np.zeros(robot.spec.action_dim, np.float32),
            False,
            0,
        )
        self.nothing = False

    def begin(self) -> None:
        pass

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        self.clock.time_ns += self.late_ms * MS
        self.late_ms = 0
        if self.dead:
            raise ServerError("the server is gone")
        return ActionStep(None if self.nothing else self.action.copy())

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        raise AssertionError("the chooser chooses")


class Disk:
    """A recorder that can be full."""

    def __init__(self) -> None:
        self.full = False

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        pass

    def append(self, step: Any) -> None:
        self.mend()

    def end(self, info: Mapping[str, Any]) -> None:
        pass

    def mend(self) -> None:
        if self.full:
            raise LogWriteError("the disk is full")


class Person:
    def __init__(self) -> None:
        self.next = TeleopSignal()
        self.action: FloatArray | None = None

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        signal, self.next = self.next, TeleopSignal()
        return replace(signal, action=self.action)

    def close(self) -> None:
        pass


class Labels:
    """Ends each episode after so many looks in a row in which the robot was not held."""

    def __init__(self, looks: int) -> None:
        self.looks, self.left = looks, looks

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        self.left -= bool(commanded.any())
        return TeleopSignal(label=None if self.left > 1 else Label.SUCCESS)

    def close(self) -> None:
        pass


def made(spec: RobotSpec = MOTIONS, lockstep: bool = False) -> FollowingRobot:
    robot = FollowingRobot(spec, lockstep)
    robot.connect()
    return robot


def run(robot: FollowingRobot, action: list[float], at: dict[int, Callable[[], None]], **options: Any) -> list[str]:
    """Run an episode that always proposes one action, and does something at some steps; what was said."""
    policy, said = Policy(robot), []  # type: ignore[var-annotated]
    policy.action[: len(action)] = action
    count = iter(range(10_000))
    step = policy.step

    def stepping(observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        at.get(next(count), lambda: None)()
        return step(observation, noise)

    policy.step = stepping  # type: ignore[method-assign]
    options = {"max_steps": 60, "actions": policy, "tell": said.append} | options
    run_episode(robot, policy, 0, RunConfig(policy_version="v1", **options))
    return said


def moving(robot: FollowingRobot) -> list[int]:
    return [i for i, (time_ns, motion) in enumerate(robot.commands) if time_ns >= 0 and np.abs(motion).max() > 1e-6]
