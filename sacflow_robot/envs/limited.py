"""The safety filter around a training environment, so that a policy learns under the limits that it will meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.spec import FloatArray


class Judged(Protocol):
    """What a filter says of an action."""

    @property
    def action(self) -> FloatArray | None: ...

    @property
    def changed(self) -> bool: ...


class Limiter(Protocol):
    """What is needed of a filter; ``sacflow_robot.robot.safety.SafetyFilter`` is one."""

    def begin(self) -> None: ...
    def see(self, observation: Mapping[str, Any], captured_ns: int) -> bool: ...
    def arm(self, now_ns: int) -> None: ...
    def step(self, proposed: npt.ArrayLike | None, now_ns: int) -> Judged: ...


class LimitedEnv(gymnasium.Wrapper[dict[str, FloatArray], FloatArray, dict[str, FloatArray], FloatArray]):
    """A robosuite task whose actions pass a safety filter, on the environment's nominal time.

    ``info`` of every step says what was ``commanded`` (7,), which is what a learner has to learn from, and whether the filter
    ``limited`` it.

    Args:
        env: The environment.
        limiter: The filter, made for ``env.arm``.
    """

    def __init__(self, env: RobosuiteEnv, limiter: Limiter) -> None:
        super().__init__(env)
        self.arm, self._limiter, self._steps = env.arm, limiter, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._limiter.begin()
        self._limiter.see(observation, 0)
        self._limiter.arm(0)
        return observation, info

    def step(self, action: FloatArray) -> tuple[dict[str, FloatArray], Any, bool, bool, dict[str, Any]]:
        """Execute what the filter lets through of one action (7,).

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity.
        """
        self.arm.check_action(action)
        verdict = self._limiter.step(action, self._steps * self.arm.period_ns)
        commanded = np.zeros(self.arm.action_dim, np.float32) if verdict.action is None else verdict.action
        observation, reward, terminated, truncated, info = self.env.step(commanded)
        self._steps += 1
        self._limiter.see(observation, self._steps * self.arm.period_ns)
        return observation, reward, terminated, truncated, {**info, "commanded": commanded, "limited": verdict.changed}
