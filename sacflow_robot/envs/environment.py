"""A single simulated robot; one that observes its last actions, and one whose actions pass a safety filter."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array, Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import KEY, push, robot_with_history, start_history


class SimulatedEnv(ABC):
    """One simulated robot."""

    robot: RobotSpec  # its observations and actions
    engine: Engine = "stock"  # code that steps it

    @abstractmethod
    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides."""

    def begin_at(self, state: Array) -> StepResult:
        """Start from a logged simulator state (S,).

        Raises:
            DataError: The environment has no such state.
        """
        raise DataError(f"{self.robot.task} cannot start from a logged state; only robosuite tasks can")

    @abstractmethod
    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (A,) for one control period.

        Raises:
            InvalidValueError: The action has the wrong shape or contains NaN or infinity.
        """

    def execute(self, chunk: FloatArray) -> list[StepResult]:
        """Execute the actions of a chunk (H, A) up to the episode's end; one result for each action executed."""
        results = []
        for action in chunk:
            results.append(self.command(action))
            if results[-1].ended:
                break
        return results

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what it holds."""


class HistoryEnv(SimulatedEnv):
    """An environment that observes its last ``length`` actions too, newest last."""

    def __init__(self, env: SimulatedEnv, length: int) -> None:
        self._env = env
        self._length = length
        self.robot = robot_with_history(env.robot, length)
        self.engine = env.engine

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides; its history is zeros."""
        self._history = start_history(self.robot, self._length)
        return self._with_history(self._env.begin(seed))

    def command(self, action: FloatArray) -> StepResult:
        result = self._env.command(action)
        self._history = push(self._history, self.robot.check_action(action))
        return self._with_history(result)

    def close(self) -> None:
        self._env.close()

    def _with_history(self, result: StepResult) -> StepResult:
        return replace(result, observation={**result.observation, KEY: self._history})


class Verdict(Protocol):
    """Answer of a filter: the action that may be executed (A,); None for none."""

    @property
    def action(self) -> FloatArray | None: ...


class ActionFilter(Protocol):
    """Methods of a safety filter; ``sacflow_robot.robot.safety.filter.SafetyFilter`` is one."""

    def begin(self) -> None: ...
    def see(self, observation: Mapping[str, Any], captured_ns: int) -> bool: ...
    def enable(self, now_ns: int) -> None: ...
    def step(self, proposed: npt.ArrayLike | None, now_ns: int) -> Verdict: ...


Limiter = Callable[[], ActionFilter]  # makes the safety filter of one robot


class LimitedEnv(SimulatedEnv):
    """An environment whose actions pass a safety filter, so that a policy learns under the limits that it will meet.

    Results hold the ``action`` executed, which is what a learner has to learn from.

    Args:
        limiter: The filter, made for ``env.robot``; its time is the environment's nominal time.
    """

    def __init__(self, env: SimulatedEnv, limiter: ActionFilter) -> None:
        self._env = env
        self._limiter = limiter
        self._steps = 0
        self.robot = env.robot
        self.engine = env.engine

    def begin(self, seed: int) -> StepResult:
        start = self._env.begin(seed)
        self._steps = 0
        self._limiter.begin()
        self._limiter.see(start.observation, 0)
        self._limiter.enable(0)
        return start

    def command(self, action: FloatArray) -> StepResult:
        """Execute what the filter lets through of one action (A,)."""
        self.robot.check_action(action)
        allowed = self._limiter.step(action, self._steps * self.robot.period_ns).action
        executed = np.zeros(self.robot.action_dim, np.float32) if allowed is None else allowed
        result = self._env.command(executed)
        self._steps += 1
        self._limiter.see(result.observation, self._steps * self.robot.period_ns)
        return replace(result, action=executed)

    def close(self) -> None:
        self._env.close()
