"""The weight of the regularizer over a run: constant, linear, or adaptive."""

import math
from collections import deque
from typing import Any

import numpy as np

from sacflow_robot.learn.config import TrainConfig

_FEWEST, _RECENT = 10, 20  # episodes
_FACTOR = 0.9  # an episode
_SAME = 1e-6  # returns closer than that are equal apart from rounding


class RegularizationSchedule:
    """Weight beta of the regularizer; the adaptive one lets a policy leave the data while it does better than the clone.

    The adaptive weight compares discounted returns of episodes, so that solving a task sooner counts. What cloning alone
    does is known from the episodes of the warm-up, in which the policy does not change yet and explores with the same
    noise. Each later episode then moves the weight by a tenth: down while the mean of the last 20 is above that of
    cloning by more than its standard error, up while it is below; between the two it stays.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: TrainConfig) -> None:
        learner = config.learner
        self._config = config
        self._kind = learner.bc_schedule
        self._high = learner.bc_coef
        self._low = max(learner.bc_coef_final, learner.bc_coef / 1000)
        self._adaptive = self._high
        self._cloned: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def weight(self, env_steps: int) -> float:
        """beta after that many environment steps online."""
        if self._kind == "adaptive":
            return self._adaptive
        if self._kind == "linear":
            warmup, final = self._config.learner.warmup_steps, self._config.learner.bc_coef_final
            done = (env_steps - warmup) / max(1, self._config.online_steps - warmup)
            return self._high + (final - self._high) * min(1.0, max(0.0, done))
        return self._high

    def observe(self, rewards: Any, *, warming_up: bool) -> None:
        """Note the rewards (T,) of an episode that ended."""
        discount = self._config.learner.discount
        value = float(np.sum(np.asarray(rewards, np.float64) * discount ** np.arange(len(rewards))))
        if warming_up or len(self._cloned) < _FEWEST:
            self._cloned.append(value)
            return
        self._recent.append(value)
        if len(self._recent) < _FEWEST:
            return
        gain = float(np.mean(self._recent) - np.mean(self._cloned))
        error = math.sqrt(np.var(self._recent) / len(self._recent) + np.var(self._cloned) / len(self._cloned))
        if gain > error + _SAME:
            self._adaptive = max(self._low, self._adaptive * _FACTOR)
        elif gain < -_SAME:
            self._adaptive = min(self._high, self._adaptive / _FACTOR)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON."""
        return {"adaptive": self._adaptive, "cloned": self._cloned, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._adaptive = float(state["adaptive"])
        self._cloned = list(state["cloned"])
        self._recent.extend(state["recent"])
