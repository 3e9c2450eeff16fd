"""The simulated robot, in lockstep: time stands still between commands."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.registry import UserEnv, make_environment
from sacflow_robot.envs.tasks import METERS_PER_ACTION, RADIANS_PER_ACTION
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import DataError, RobotError, StoppedError, UsageError
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.spec import Engine, FloatArray, RobotSpec
from sacflow_robot.utils.rotations import rotation_between


class SimRobot:
    """A robosuite task, any Gymnasium environment, or one's own, as a ``Robot``.

    Args:
        task: Name of the task, Gymnasium's id, or ``MODULE:CLASS``.
        speed: Times real time that a command takes at least; 0 for as fast as it goes.

    Raises:
        UnknownNameError: No such task.
        UsageError: The Gymnasium environment cannot be made, or does not fit; or the speed is negative.
    """

    lockstep = True

    def __init__(self, task: str, engine: Engine = "compiled", speed: float = 0.0) -> None:
        if not 0 <= speed < math.inf:
            raise UsageError(f"sim: speed is {speed:g}, expected how many times real time, or 0 for no limit")
        self.env = make_environment(task, engine)
        self._seen: StepResult | None = None
        self._stopped = False
        self.clock = MonotonicClock()
        self._least_ns = round(self.spec.period_ns / speed) if speed else 0

    @property
    def spec(self) -> RobotSpec:
        return self.env.robot

    @property
    def engine(self) -> Engine:
        return self.env.engine

    def connect(self) -> None:
        self._stopped = False

    def begin(self, seed: int) -> StepResult:
        self._seen = self.env.begin(seed)
        return self._seen

    def begin_at(self, state: npt.NDArray[np.float64]) -> StepResult:
        if isinstance(self.env, UserEnv):
            raise DataError(f"{self.spec.task} cannot start from a logged state; only robosuite tasks can")
        self._seen = self.env.begin_at(state)
        return self._seen

    def observe(self) -> StepResult:
        if self._seen is None:
            raise RobotError("no episode has begun; begin one first")
        return self._seen

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        """Execute one action (A,); the result's ``measured`` is the motion that came of it, in the same units."""
        if self._stopped:
            raise StoppedError("the robot has been stopped; connect it again")
        begun_ns = self.clock.now_ns()
        before, after = self.observe(), self.env.command(action)
        if "robot0_eef_pos" in after.observation and not isinstance(self.env, UserEnv):
            after = replace(after, measured=measured_action(before.observation, after.observation, float(action[-1])))
        self._seen = after
        self.clock.sleep_until(begun_ns + self._least_ns)

    def hold(self) -> None:
        """Nothing to do: without a command, time stands still."""

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self.env.close()


def measured_action(before: dict[str, FloatArray], after: dict[str, FloatArray], gripper: float) -> FloatArray:
    """Translation and rotation vector of the gripper from one observation to another, as an action (7,) would command them."""
    moved = (after["robot0_eef_pos"] - before["robot0_eef_pos"]) / METERS_PER_ACTION
    quats = (seen["robot0_eef_quat"].astype(np.float64) for seen in (before, after))
    return np.concatenate([moved, rotation_between(*quats) / RADIANS_PER_ACTION, [gripper]]).astype(np.float32)
