"""SAC with a policy that has a density: on a flow (SAC Flow, arXiv 2509.25756), and on a Gaussian (SAC, RLPD)."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sacflow_robot.learn import losses
from sacflow_robot.learn.algorithms.agent import Agent, Batch, Metrics, take_over
from sacflow_robot.learn.algorithms.temperature import Temperature
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.networks.policies import GaussianPolicy
from sacflow_robot.learn.networks.policy import PolicyNetwork, Rollout
from sacflow_robot.spec import RobotSpec


class _ActorLoss(NamedTuple):
    """The actor's loss (), and what it is made of: value (B,), excess log p (B,), distance to the data (B,) or ()."""

    loss: Tensor
    value: Tensor
    excess: Tensor
    distance: Tensor


class Sac(Agent):
    """Soft actor-critic: critic, actor and temperature losses of the paper, section 4.3.

    Excess is log p measured from the policy's reference entropy, in the critic's target as in the actor's loss.
    """

    def __init__(self, robot: RobotSpec, config: TrainConfig, device: torch.device) -> None:
        super().__init__(robot, config, device)
        self._temperature = Temperature(config.learner, self.action_dim, device)
        self._compiled_actor_loss = self.compute.prepare(self._actor_loss)

    @property
    def temperature(self) -> Tensor:
        """alpha, a scalar without gradient."""
        return self._temperature.value

    @property
    def log_temperature(self) -> Tensor:
        """log alpha, the learned parameter."""
        return self._temperature.log

    def _next_value(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        after = self.policy.rollout(batch.next_observation, noise)
        value = self._value(self.target_critic, batch.next_observation, after.action)
        return value, self.temperature * (after.log_prob + self.policy.reference_entropy)

    def _actor_loss(
        self, batch: Batch, noise: Tensor, drawn: tuple[Tensor, Tensor] | None, weight: Tensor
    ) -> _ActorLoss:
        rollout = self.policy.rollout(batch.observation, noise)
        excess = rollout.log_prob + self.policy.reference_entropy
        value = self._value(self.critic, batch.observation, rollout.action)
        distance = self._distance(batch, rollout, noise, drawn)
        scaled = losses.normalize_q(value) if self.config.learner.normalize_q else value
        loss = losses.actor_loss(scaled, self.temperature * excess, distance, weight)
        return _ActorLoss(loss, value.detach(), excess.detach(), distance.detach())

    def _draw_regularizer(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Noise for :meth:`_distance` beyond that of the rollout."""
        return None

    def _distance(self, batch: Batch, rollout: Rollout, noise: Tensor, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
        """||a - a_data||^2 over the chunk's valid rows."""
        return losses.chunk_distance(rollout.action, batch.chunk, batch.mask)

    def _update_policy(self, batch: Batch) -> Metrics:
        self.critic.requires_grad_(False)
        noise = self.policy.draw(len(batch.chunk), self.generator)
        weight = torch.full((), self.bc_coef, device=self.device)  # unlike torch.tensor it does not wait for a GPU
        actor = self._compiled_actor_loss(batch, noise, self._draw_regularizer(batch), weight)
        self._step_policy(actor.loss)
        self.critic.requires_grad_(True)
        self._temperature.update(actor.excess)
        return {
            "loss/actor": actor.loss.detach(),
            "value/policy": actor.value.mean(),
            "policy/distance_to_data": actor.distance.mean(),
            "policy/excess_entropy": -actor.excess.mean(),
            "policy/temperature": self.temperature,
            "policy/regularization": weight,
        }

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "temperature": self._temperature}


class SacFlow(Sac):
    """Offline the flow clones (flow matching); online it is SAC's actor, held near the data by a regularizer.

    ``reference`` is the policy as cloning left it, for the regularizer ``same-noise``; it goes on cloning where the
    configuration says so.
    """

    policy: Any  # a FlowPolicy

    def __init__(self, robot: RobotSpec, config: TrainConfig, device: torch.device) -> None:
        super().__init__(robot, config, device)
        self.reference = copy.deepcopy(self.policy)
        self.reference_optimizer = self._adam(self.reference, config.learner.policy_lr)
        self._compiled_flow_matching = self.compute.prepare(self._flow_matching)

    def begin_online(self) -> None:
        """Cloning is over: the reference is what the policy is now."""
        take_over(self.reference, self.policy.state_dict())
        take_over(self.reference_optimizer, self.policy_optimizer.state_dict())

    def _update_policy_offline(self, batch: Batch) -> Metrics:
        drawn = losses.draw_flow_matching(batch.chunk, self.generator)
        loss = self._compiled_flow_matching(self.policy, batch, drawn)
        self._step_policy(loss)
        return {"loss/flow_matching": loss.detach()}

    def _update_policy(self, batch: Batch) -> Metrics:
        metrics = super()._update_policy(batch)
        learner = self.config.learner
        if learner.bc_loss == "same-noise" and learner.reference == "cloning":
            drawn = losses.draw_flow_matching(batch.chunk, self.generator)
            losses.step(self.reference_optimizer, self._compiled_flow_matching(self.reference, batch, drawn))
        return metrics

    def _draw_regularizer(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        if self.config.learner.bc_loss == "flow-matching":
            return losses.draw_flow_matching(batch.chunk, self.generator)
        return None

    def _distance(self, batch: Batch, rollout: Rollout, noise: Tensor, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
        """The configured regularizer: the paper's, or one of the two that keep modes apart."""
        if self.config.learner.bc_loss == "action":
            return super()._distance(batch, rollout, noise, drawn)
        if drawn is not None:
            return self._flow_matching(self.policy, batch, drawn)
        with torch.no_grad():
            reference = self.reference.rollout(batch.observation, noise)
        return losses.chunk_distance(rollout.action, reference.action, torch.ones_like(batch.mask))


class GaussianSac(Sac):
    """SAC on a Gaussian."""

    def _make_policy(self) -> PolicyNetwork:
        return GaussianPolicy(self.robot.observation_dim, self.action_dim, self.config.flow, self.robot.quaternions)

    def _update_policy_offline(self, batch: Batch) -> Metrics:
        """Offline it does what it does online."""
        return self._update_policy(batch)


class Rlpd(GaussianSac):
    """SAC on a Gaussian with half of each batch from demonstrations and many critics (RLPD, arXiv 2302.02948).

    Its targets leave the entropy out, as the authors' do for sparse rewards: what a chunk of 35 dimensions earns in entropy,
    discounted over the rest of an episode, is many times the one reward at its end.
    """

    def _next_value(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        value, entropy = super()._next_value(batch, noise)
        return value, torch.zeros_like(entropy)
