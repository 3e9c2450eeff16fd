"""Any robot with the last commands in its observations, for policies that were trained with them (``DRIVER:...?history=K``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sacflow_robot.episode import StepResult
from sacflow_robot.interfaces import Robot
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.action_history import KEY, push, robot_with_history, start_history


class HistoryRobot:
    """A ``Robot`` whose observations hold the K actions last commanded, newest last; zeros before an episode's first.

    Args:
        robot: The robot.
        history: K.
    """

    def __init__(self, robot: Robot, history: int) -> None:
        self._robot, self._length = robot, history
        self._spec = robot_with_history(robot.spec, history)
        self._actions = start_history(robot.spec, history)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    def begin(self, seed: int) -> StepResult:
        self._actions = start_history(self._spec, self._length)
        return self._with(self._robot.begin(seed))

    def observe(self) -> StepResult:
        return self._with(self._robot.observe())

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._robot.command(action, valid_until_ns)
        self._actions = push(self._actions, self._robot.spec.check_action(action))

    def _with(self, result: StepResult) -> StepResult:
        return replace(result, observation={**result.observation, KEY: self._actions.copy()})


def bare(robot: Robot) -> Robot:
    """The robot without its last commands in its observations: what a replay moves, for it sends what was commanded."""
    return robot._robot if isinstance(robot, HistoryRobot) else robot
