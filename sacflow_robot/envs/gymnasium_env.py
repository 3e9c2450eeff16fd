"""Any Gymnasium environment with continuous observations and actions, as a simulated robot."""

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import UsageError, one_line
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec

_KEY = "observation"
_DEFAULT_RATE_HZ = 20.0


class GymnasiumEnv(SimulatedEnv):
    """A Gymnasium environment by its id, e.g. ``"HalfCheetah-v5"``.

    Its observation is one flat array, ``observation``. Actions are rescaled to [-1, 1]. Success is what the environment's
    ``info`` calls ``is_success`` or ``success``; without either, no episode counts as one, and ``eval`` reports returns.
    There is no simulator state to log or to replay from.

    Args:
        task: Gymnasium's id; ``module:id`` imports the module that registers it.

    Raises:
        UsageError: There is no such environment, or its spaces are not boxes.
    """

    def __init__(self, task: str) -> None:
        try:
            self._env: gymnasium.Env[Any, Any] = gymnasium.make(task)
        except (gymnasium.error.Error, ImportError) as error:
            raise UsageError(f"no environment {task!r}: {one_line(error)}") from None
        seen, acts = self._env.observation_space, self._env.action_space
        if not (isinstance(seen, spaces.Box) and isinstance(acts, spaces.Box) and acts.is_bounded() and acts.shape):
            raise UsageError(f"{task} observes {seen} and takes {acts}; a bounded Box of actions and a Box are needed")
        self._env = gymnasium.wrappers.RescaleAction(self._env, np.float32(-1), np.float32(1))
        self._shape = acts.shape
        low, high = acts.low.reshape(-1), acts.high.reshape(-1)
        actions = len(low)
        self.robot = RobotSpec(
            robot="gymnasium",
            task=task,
            controller="as the environment's, rescaled to [-1, 1]",
            control_rate_hz=_rate(self._env),
            observations=(ArraySpec(_KEY, (int(np.prod(seen.shape)),), "as the environment's"),),
            action_names=tuple(f"action {i}" for i in range(actions)),
            action_units=tuple(f"{least:g} to {most:g}" for least, most in zip(low, high, strict=True)),
            action_low=(-1.0,) * actions,
            action_high=(1.0,) * actions,
        )

    def begin(self, seed: int) -> StepResult:
        observation, _ = self._env.reset(seed=seed)
        return StepResult(self._named(observation), success=False)

    def command(self, action: FloatArray) -> StepResult:
        given = self.robot.check_action(action).reshape(self._shape)
        observation, reward, terminated, truncated, info = self._env.step(given)
        success = bool(info.get("is_success", info.get("success", False)))
        ended = terminated or (success and not truncated)
        return StepResult(self._named(observation), float(reward), ended, truncated and not ended, success=success)

    def close(self) -> None:
        self._env.close()

    def _named(self, observation: npt.NDArray[Any]) -> dict[str, FloatArray]:
        return {_KEY: np.asarray(observation, np.float32).reshape(-1)}


def _rate(env: gymnasium.Env[Any, Any]) -> float:
    """Actions per second of simulated time, where the environment says so."""
    period = getattr(env.unwrapped, "dt", None)
    rate = 1 / period if isinstance(period, int | float) and period > 0 else env.metadata.get("render_fps")
    return round(float(rate or _DEFAULT_RATE_HZ), 6)
