"""Training episodes: the policy with its noise, or random actions first, on robots that training moves."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sacflow_robot.envs.collector import Rollouts
from sacflow_robot.episode import Episode
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.counters import Counters
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.training_guards import diverged
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.seeding import TRAINING_SEED

_SEEDS_PER_RUN = 1_000_000
_PART_STEPS = 50  # of an episode that are learned from before it ends, where it is long


class Exploration:
    """Episodes of the agent that is being trained, a chunk per robot and round.

    Args:
        agent: What explores.
        envs: The robots.
        config: The run's configuration.
        folder: Of the run, for messages.
    """

    def __init__(self, agent: Agent, envs: VectorEnv, config: TrainConfig, folder: RunFolder) -> None:
        self._agent = agent
        self._spec = envs.spec
        self._folder = folder
        self._first_seed = TRAINING_SEED + (1 + config.seed) * _SEEDS_PER_RUN
        self._from_scratch = config.from_scratch
        self._counters = Counters()
        shape = config.chunk_length, envs.spec.action_dim
        self._rollouts = Rollouts(envs, shape, self._seeds(), _PART_STEPS if config.from_scratch else None)

    def send(self, counters: Counters) -> None:
        """Send every robot its next chunk; episodes begun are counted in ``counters``.

        Raises:
            SacflowError: An action is not finite.
        """
        self._counters = counters
        self._rollouts.send(self._choose)

    def receive(self) -> tuple[int, list[Episode], list[Episode]]:
        """Steps executed, episodes that ended, and what is to be learned from: those, or completed parts from scratch."""
        steps, ended = self._rollouts.receive()
        return steps, ended, self._rollouts.take_parts() if self._from_scratch else ended

    def state_dict(self) -> dict[str, Any]:
        """Episodes in progress."""
        return {
            str(i): {**e, "actions": torch.from_numpy(e["actions"])} for i, e in self._rollouts.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._rollouts.load_state_dict({int(i): {**e, "actions": e["actions"].numpy()} for i, e in state.items()})

    def _choose(self, observation: dict[str, FloatArray], noise: FloatArray) -> FloatArray:
        if not self._counters.normalized:
            return self._spec.from_unit(uniform_actions(noise))
        chunks = self._agent.explore(self._spec.flatten(observation), noise)
        if not np.isfinite(chunks).all():
            raise diverged("the policy's action", self._agent.updates, self._folder)
        return self._spec.from_unit(chunks)

    def _seeds(self) -> Iterator[int]:
        while True:
            self._counters.episodes_begun += 1
            yield self._first_seed + self._counters.episodes_begun - 1


def uniform_actions(noise: FloatArray) -> FloatArray:
    """Actions spread evenly over [-1, 1], one for each number of standard normal noise of any shape."""
    spread: FloatArray = torch.erf(torch.from_numpy(noise) / 2**0.5).numpy()
    return spread
