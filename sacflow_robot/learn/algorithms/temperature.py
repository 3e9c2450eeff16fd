"""SAC's temperature alpha: learned within bounds, fixed, or zero."""

import math
from typing import Any

import torch
from torch import Tensor

from sacflow_robot.learn import losses
from sacflow_robot.learn.config import LearnerConfig


class Temperature:
    """alpha, and the rule by which it is learned.

    The target entropy is ``-target_entropy_per_dim`` nats per action dimension, measured from the policy's reference entropy
    (``path_entropy``). For a flow with fixed noise the difference between the two is what tanh costs. For one with a
    learned noise scale, and for a Gaussian (whose reference is 0, so that the target is SAC's -dim), it is an entropy.

    Args:
        config: Mode, start, bounds, target and step size.
        action_dim: D.
        device: Where it lives.
    """

    def __init__(self, config: LearnerConfig, action_dim: int, device: torch.device) -> None:
        self._config = config
        self._target = -config.target_entropy_per_dim * action_dim
        self.log = torch.tensor(math.log(config.initial_temperature), device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.log], config.alpha_lr, betas=(config.adam_beta1, 0.999))

    @property
    def value(self) -> Tensor:
        """alpha, a scalar without gradient."""
        if self._config.temperature == "zero":
            return torch.zeros_like(self.log, requires_grad=False)
        return self.log.detach().exp()

    def update(self, excess: Tensor) -> None:
        """One step where it is learned; ``excess`` (B,) is log p plus the reference entropy."""
        if self._config.temperature != "learned":
            return
        losses.step(self._optimizer, losses.temperature_loss(self.log, excess, self._target))
        low, high = (math.log(bound) for bound in self._config.temperature_bounds)
        with torch.no_grad():
            self.log.clamp_(low, high)

    def state_dict(self) -> dict[str, Any]:
        return {"log": self.log.detach(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.log.copy_(state["log"])
        self._optimizer.load_state_dict(state["optimizer"])
