"""Any robot whose observations are stamped by a clock of its own, with its measured offset taken off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sacflow_robot.episode import StepResult
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.drivers.wrapper import RobotWrapper


class OtherClockRobot(RobotWrapper):
    """A ``Robot`` whose capture times are by the control loop's clock.

    Commands' validity is by the loop's clock already: drivers judge it on this side.

    Args:
        robot: The robot.
        offset_ns: The robot's clock minus the loop's.
    """

    def __init__(self, robot: Robot, offset_ns: int) -> None:
        super().__init__(robot)
        self._offset_ns = offset_ns

    def begin(self, seed: int) -> StepResult:
        return self._by_loop(self._robot.begin(seed))

    def observe(self) -> StepResult:
        return self._by_loop(self._robot.observe())

    def _by_loop(self, result: StepResult) -> StepResult:
        return result if result.time_ns is None else replace(result, time_ns=result.time_ns - self._offset_ns)


def by_loop_clock(robot: Robot, offset_ms: float) -> Robot:
    """The robot itself where the clocks do not differ."""
    wrapped: Any = robot if not offset_ms else OtherClockRobot(robot, round(1e6 * offset_ms))
    made: Robot = wrapped
    return made
