"""Robots around other robots: with the last commands in the observations, or with a clock of their own."""

from dataclasses import replace
from typing import Any, cast

from sacflow_robot.episode import StepResult
from sacflow_robot.interfaces import Robot
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.action_history import KEY, push, robot_with_history, start_history


class RobotWrapper:
    """A ``Robot`` that passes on whatever it does not change."""

    def __init__(self, robot: Robot) -> None:
        self._robot = robot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    def begin(self, seed: int) -> StepResult:
        return self._changed(self._robot.begin(seed))

    def observe(self) -> StepResult:
        return self._changed(self._robot.observe())

    def _changed(self, result: StepResult) -> StepResult:
        return result


def unwrapped(robot: Robot) -> Robot:
    """The innermost robot: the one to ask what it is, for a wrapper passes on more than its class says."""
    while isinstance(robot, RobotWrapper):
        robot = robot._robot
    return robot


class HistoryRobot(RobotWrapper):
    """Any robot with the K actions last commanded in its observations, newest last, for policies that were trained with them
    (``DRIVER:...?history=K``); zeros before an episode's first.
    """

    def __init__(self, robot: Robot, history: int) -> None:
        super().__init__(robot)
        self._length = history
        self.spec = robot_with_history(robot.spec, history)
        self._actions = start_history(robot.spec, history)

    def begin(self, seed: int) -> StepResult:
        self._actions = start_history(self.spec, self._length)
        return super().begin(seed)

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._robot.command(action, valid_until_ns)
        self._actions = push(self._actions, self._robot.spec.check_action(action))

    def _changed(self, result: StepResult) -> StepResult:
        return replace(result, observation={**result.observation, KEY: self._actions.copy()})


def bare(robot: Robot) -> Robot:
    """The robot without its last commands in its observations: what a replay moves, for it sends what was commanded."""
    return robot._robot if isinstance(robot, HistoryRobot) else robot


class OtherClockRobot(RobotWrapper):
    """Any robot whose observations are stamped by a clock of its own, with its measured offset taken off.

    Commands' validity is by the loop's clock already: drivers judge it on this side.

    Args:
        offset_ns: The robot's clock minus the loop's.
    """

    def __init__(self, robot: Robot, offset_ns: int) -> None:
        super().__init__(robot)
        self._offset_ns = offset_ns

    def _changed(self, result: StepResult) -> StepResult:
        return result if result.time_ns is None else replace(result, time_ns=result.time_ns - self._offset_ns)


def by_loop_clock(robot: Robot, offset_ms: float) -> Robot:
    """The robot itself where the clocks do not differ."""
    return cast(Robot, OtherClockRobot(robot, round(1e6 * offset_ms))) if offset_ms else robot
