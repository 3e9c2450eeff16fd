"""Robots around other robots."""

from __future__ import annotations

from typing import Any

from sacflow_robot.interfaces import Robot


class RobotWrapper:
    """A ``Robot`` that passes on whatever it does not change.

    Args:
        robot: The robot inside.
    """

    def __init__(self, robot: Robot) -> None:
        self._robot = robot

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)


def unwrapped(robot: Robot) -> Robot:
    """The innermost robot: the one to ask what it is, for a wrapper passes on more than its class says."""
    while isinstance(robot, RobotWrapper):
        robot = robot._robot
    return robot
