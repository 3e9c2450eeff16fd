"""Any arm with the last commands in its observations, for policies that were trained with them (``DRIVER:...?history=K``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sacflow_robot.spec import ArmSpec, ArraySpec, FloatArray, Robot, StepResult

KEY = "action_history"


class HistoryRobot:
    """A ``Robot`` whose observations hold the K actions last commanded, newest last; zeros before an episode's first.

    Args:
        robot: The arm.
        history: K.
    """

    def __init__(self, robot: Robot, history: int) -> None:
        self._robot, self._length = robot, history
        array = ArraySpec(KEY, (history, robot.spec.action_dim), "action")
        self._spec = replace(robot.spec, observations=(*robot.spec.observations, array))
        self._actions = np.zeros(array.shape, np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    @property
    def spec(self) -> ArmSpec:
        return self._spec

    @property
    def lockstep(self) -> bool:
        return self._robot.lockstep

    def begin(self, seed: int) -> StepResult:
        self._actions = np.zeros_like(self._actions)
        return self._with(self._robot.begin(seed))

    def observe(self) -> StepResult:
        return self._with(self._robot.observe())

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._robot.command(action, valid_until_ns)
        self._actions = np.concatenate([self._actions[1:], self._robot.spec.check_action(action)[None]])

    def _with(self, result: StepResult) -> StepResult:
        return replace(result, observation={**result.observation, KEY: self._actions.copy()})
