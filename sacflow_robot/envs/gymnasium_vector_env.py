"""Gymnasium vector environment of N simulated robots."""

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from sacflow_robot.envs.compiled_env import CompiledEnv
from sacflow_robot.envs.robosuite_env import make_spaces
from sacflow_robot.envs.tasks import CONTROL_RATE_HZ, get_task
from sacflow_robot.envs.vector import ThreadVectorEnv
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import InvalidValueError
from sacflow_robot.spec import Array, FloatArray

Flags = npt.NDArray[np.bool_]
# Observations, rewards, terminated, truncated and info, each of N robots.
Step = tuple[dict[str, FloatArray], Array, Flags, Flags, dict[str, Any]]


class RobosuiteVectorEnv(gymnasium.vector.VectorEnv[dict[str, FloatArray], FloatArray, npt.NDArray[Any]]):
    """N robots of one robosuite task under the compiled engine, on all cores of one process.

    Observations, actions, rewards and episodes are those of ``SyncVectorEnv`` over N ``RobosuiteEnv``. Autoreset is
    Gymnasium's *next step* mode: the step after an episode's last ignores that robot's action, starts its next episode and
    returns the first observation, with reward 0 and neither terminated nor truncated.

    Raises:
        UnknownNameError: No such task.
        NotCoveredError: The compiled engine does not cover it here.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_fps": int(CONTROL_RATE_HZ)}  # noqa: RUF012

    def __init__(self, task: str = "lift", num_envs: int = 2) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = make_spaces(get_task(task).robot)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._robots = [CompiledEnv(task) for _ in range(num_envs)]
        self._envs = ThreadVectorEnv(self._robots)
        self._rngs = [seeding.np_random()[0] for _ in range(num_envs)]
        self._ended = np.ones(num_envs, np.bool_)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        """Start an episode on every robot; with an integer seed, robot i's is ``seed + i``.

        Returns:
            Observations (N, ...), and ``{"state": (N, S) float64}``.
        """
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        for i, given in enumerate(seeds or []):
            if given is not None:
                self._rngs[i] = seeding.np_random(given)[0]
        observations, *_, info = self._batch(self._begin(range(self.num_envs)))
        self._ended[:] = False
        return observations, info

    def step(self, actions: FloatArray) -> Step:
        """Execute one action per robot (N, 7) for one control period (50 ms).

        Raises:
            InvalidValueError: The actions have the wrong shape or contain NaN or infinity.
        """
        given = np.asarray(actions, np.float32)
        if given.shape != self.action_space.shape:
            raise InvalidValueError(f"actions have shape {given.shape}, expected {self.action_space.shape}")
        self._envs.send({i: given[i : i + 1] for i in np.flatnonzero(~self._ended)})
        results = self._begin(map(int, np.flatnonzero(self._ended)))
        results |= {i: executed[0] for i, executed in self._envs.receive().items()}
        observations, rewards, terminated, truncated, info = self._batch(results)
        self._ended = terminated | truncated
        return observations, rewards, terminated, truncated, info | {"success": terminated.copy()}

    def close_extras(self, **_: Any) -> None:
        self._envs.close()

    def _begin(self, indices: Iterable[int]) -> dict[int, StepResult]:
        return {i: self._robots[i].begin(self._rngs[i]) for i in indices}

    def _batch(self, results: dict[int, StepResult]) -> Step:
        ordered = [results[i] for i in range(self.num_envs)]
        return (
            {a.key: np.stack([r.observation[a.key] for r in ordered]) for a in self._envs.spec.observations},
            np.array([r.reward for r in ordered]),
            np.array([r.terminated for r in ordered]),
            np.array([r.truncated for r in ordered]),
            {"state": np.stack([np.asarray(r.state) for r in ordered])},
        )
