"""The safety filter around a training environment, so that a policy learns under the limits that it will meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import StepResult
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.spec import Engine, FloatArray, RobotSpec


class Judged(Protocol):
    """What a filter says of an action."""

    @property
    def action(self) -> FloatArray | None: ...

    @property
    def changed(self) -> bool: ...

    @property
    def held(self) -> bool: ...

    @property
    def reason(self) -> str: ...


class ActionFilter(Protocol):
    """What is needed of a filter; ``sacflow_robot.robot.safety.filter.SafetyFilter`` is one."""

    def begin(self) -> None: ...
    def see(self, observation: Mapping[str, Any], captured_ns: int) -> bool: ...
    def enable(self, now_ns: int) -> None: ...
    def step(self, proposed: npt.ArrayLike | None, now_ns: int) -> Judged: ...


class LimitedEnv(gymnasium.Wrapper[dict[str, FloatArray], FloatArray, dict[str, FloatArray], FloatArray]):
    """A robosuite task whose actions pass a safety filter, on the environment's nominal time.

    ``info`` of every step says what was ``commanded`` (7,), which is what a learner has to learn from, and whether the filter
    ``limited`` it.

    Args:
        env: The environment.
        limiter: The filter, made for ``env.arm``.
    """

    def __init__(self, env: RobosuiteEnv, limiter: ActionFilter) -> None:
        super().__init__(env)
        self.robot, self._limiter, self._steps = env.robot, limiter, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._limiter.begin()
        self._limiter.see(observation, 0)
        self._limiter.enable(0)
        return observation, info

    def step(self, action: FloatArray) -> tuple[dict[str, FloatArray], Any, bool, bool, dict[str, Any]]:
        """Execute what the filter lets through of one action (7,).

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity.
        """
        self.robot.check_action(action)
        verdict = self._limiter.step(action, self._steps * self.robot.period_ns)
        commanded = np.zeros(self.robot.action_dim, np.float32) if verdict.action is None else verdict.action
        observation, reward, terminated, truncated, info = self.env.step(commanded)
        self._steps += 1
        self._limiter.see(observation, self._steps * self.robot.period_ns)
        return observation, reward, terminated, truncated, {**info, "commanded": commanded, "limited": verdict.changed}


class LimitedVectorEnv:
    """``VectorEnv`` whose actions pass a safety filter each, on the environment's nominal time.

    Args:
        envs: The robots.
        make_limiter: Makes the filter of one robot.

    Attributes:
        commanded: Per robot what was commanded (T, A) in place of the chunk received last, which is what a learner has to
            learn from.
    """

    def __init__(self, envs: VectorEnv, make_limiter: Callable[[], ActionFilter]) -> None:
        self._envs, self._limiters = envs, [make_limiter() for _ in range(len(envs))]
        self._steps = [0] * len(envs)
        self._chunks: dict[int, FloatArray] = {}
        self.commanded: dict[int, FloatArray] = {}

    @property
    def spec(self) -> RobotSpec:
        return self._envs.spec

    @property
    def engine(self) -> Engine:
        return self._envs.engine

    def about(self, index: int) -> dict[str, Any]:
        """What there is to log of a robot's episode."""
        about = getattr(self._envs, "about", None)
        return {} if about is None else about(index)

    def __len__(self) -> int:
        return len(self._envs)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        begun = self._envs.begin(starts)
        for index, start in begun.items():
            self._steps[index] = 0
            self._limiters[index].begin()
            self._limiters[index].see(start.observation, 0)
            self._limiters[index].enable(0)
        return begun

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Take chunks (H, A); the robots move in :meth:`receive`, as each action depends on what came of the one before."""
        self._chunks = dict(chunks)

    def receive(self) -> dict[int, list[StepResult]]:
        """Have the robots execute what their filters let through of what was sent; per robot one result for each action.

        Raises:
            InvalidValueError: An action has the wrong shape or holds NaN or infinity.
        """
        chunks, self._chunks = self._chunks, {}
        results: dict[int, list[StepResult]] = {index: [] for index in chunks}
        commanded: dict[int, list[FloatArray]] = {index: [] for index in chunks}
        for step in range(max(map(len, chunks.values()), default=0)):
            going = [
                i for i, chunk in chunks.items() if step < len(chunk) and not (results[i] and results[i][-1].ended)
            ]
            for i in going:
                commanded[i].append(self._limit(i, chunks[i][step]))
            self._envs.send({i: commanded[i][-1][None] for i in going})
            for i, (result,) in self._envs.receive().items():
                results[i].append(result)
                self._steps[i] += 1
                self._limiters[i].see(result.observation, self._steps[i] * self.spec.period_ns)
        self.commanded = {index: np.stack(actions) for index, actions in commanded.items()}
        return results

    def close(self) -> None:
        self._envs.close()

    def _limit(self, index: int, action: FloatArray) -> FloatArray:
        self.spec.check_action(action)
        verdict = self._limiters[index].step(action, self._steps[index] * self.spec.period_ns)
        return np.zeros(self.spec.action_dim, np.float32) if verdict.action is None else verdict.action
