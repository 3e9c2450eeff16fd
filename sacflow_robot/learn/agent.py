"""SAC Flow agent: networks, optimisers and the two kinds of update."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sacflow_robot.data.replay import ChunkBatch
from sacflow_robot.errors import UsageError
from sacflow_robot.learn import losses
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.critic import Critic
from sacflow_robot.learn.flow import FlowPolicy, path_entropy
from sacflow_robot.spec import ArmSpec, FloatArray

Metrics = dict[str, Tensor]

_SMALLEST_VALUE = 1e-2


@dataclass(frozen=True)
class _Batch:
    """A ``ChunkBatch`` on the device, chunks flattened to (B, D)."""

    observation: Tensor
    chunk: Tensor
    mask: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    critic_valid: Tensor
    cloned: Tensor


class Agent:
    """Policy, critics and temperature, updated from chunk batches.

    Two policies are kept: the one that is trained, and its running average, which acts and is exported.

    Args:
        arm: The arm.
        config: The run's configuration.
        device: Where to compute.

    Raises:
        UsageError: The arm's actions are not bounded by -1 and 1, which is what the policy puts out.
    """

    def __init__(self, arm: ArmSpec, config: TrainConfig, device: torch.device) -> None:
        if set(arm.action_low) != {-1.0} or set(arm.action_high) != {1.0}:
            raise UsageError(f"arm {arm.robot!r} takes actions beyond -1 to 1; give it a driver that scales them")
        self.arm, self.config, self.device = arm, config, device
        learner = config.learner
        action_dim = config.chunk_length * arm.action_dim
        self.generator = torch.Generator(device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            policy = FlowPolicy(config.velocity, arm.observation_dim, action_dim, config.flow, arm.quaternions)
            self.policy = policy.to(device)
            self.critic = Critic(
                self.policy.feature_dim, action_dim, learner.critic_width, learner.critic_depth, learner.critics
            ).to(device)
        self.average_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.reference = copy.deepcopy(self.policy)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = torch.tensor(math.log(learner.initial_temperature), device=device, requires_grad=True)
        self.policy_optimiser = torch.optim.Adam(self.policy.parameters(), learner.policy_rate, fused=True)
        self.reference_optimiser = torch.optim.Adam(self.reference.parameters(), learner.policy_rate, fused=True)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), learner.critic_rate, fused=True)
        self.temperature_optimiser = torch.optim.Adam([self.log_temperature], learner.policy_rate)
        self._reference_entropy = path_entropy(action_dim, config.flow.euler_steps, config.flow.noise_scale)
        self._target_entropy = -learner.saturation_target * action_dim
        self.updates = 0

    def fit_normaliser(self, observations: FloatArray) -> None:
        """Set the observation normaliser from observations (N, O), once, before training."""
        for policy in (self.policy, self.average_policy, self.reference):
            policy.fit_normaliser(torch.from_numpy(observations).to(self.device))

    @torch.no_grad()
    def act(self, observation: FloatArray, noise: FloatArray) -> FloatArray:
        """Deterministic chunks (B, H, A) of the averaged policy for raw observations (B, O) and noise (B, H, A)."""
        actions: Tensor = self.average_policy(
            torch.from_numpy(observation).to(self.device), torch.from_numpy(noise).to(self.device).flatten(1)
        )
        chunks: FloatArray = actions.cpu().numpy().reshape(noise.shape)
        return chunks

    def explore(self, observation: FloatArray, noise: FloatArray) -> FloatArray:
        """Chunks (B, H, A) of the noise-augmented rollout of the trained policy, for collecting experience.

        ``noise`` (B, H, A) is A_0; the noise of the steps comes from the agent's generator.
        """
        start = torch.from_numpy(noise).to(self.device).flatten(1)
        with torch.no_grad():
            rollout = self.policy.sample(torch.from_numpy(observation).to(self.device), self.generator, start)
        chunks: FloatArray = rollout.action.cpu().numpy().reshape(noise.shape)
        return chunks

    def update_offline(self, chunks: ChunkBatch) -> Metrics:
        """One flow-matching step of the policy, one step of the critic on the policy so far."""
        batch = self._on_device(chunks)
        loss = self._flow_matching(self.policy, batch)
        _step(self.policy_optimiser, loss)
        self._average()
        self.updates += 1
        return {"loss/flow_matching": loss.detach(), **self._update_critic(batch)}

    def update_online(self, chunks: ChunkBatch, *, critic_only: bool = False) -> Metrics:
        """One step of the critic; every ``policy_delay`` of them, unless ``critic_only``, one of policy and temperature."""
        batch = self._on_device(chunks)
        metrics = self._update_critic(batch)
        self.updates += 1
        if not critic_only and self.updates % self.config.learner.policy_delay == 0:
            metrics |= self._update_policy(batch)
        return metrics

    @property
    def temperature(self) -> Tensor:
        """alpha, a scalar without gradient."""
        if self.config.learner.temperature == "zero":
            return torch.zeros((), device=self.device)
        return self.log_temperature.detach().exp()

    def _update_critic(self, batch: _Batch) -> Metrics:
        policy, learner = self.policy, self.config.learner
        with torch.no_grad():
            after = policy.sample(batch.next_observation, self.generator)
            next_value = self._value(self.target_critic, policy.normalise(batch.next_observation), after.action)
            penalty = self.temperature * (after.log_prob + self._reference_entropy)
            target = losses.critic_target(batch.reward, batch.discount, next_value, penalty)
        values = self.critic(policy.normalise(batch.observation), batch.chunk)
        loss = losses.critic_loss(values, target, batch.critic_valid)
        _step(self.critic_optimiser, loss)
        _blend(self.target_critic, self.critic, learner.target_rate)
        return {"loss/critic": loss.detach(), "value/data": values.detach().mean()}

    def _update_policy(self, batch: _Batch) -> Metrics:
        learner = self.config.learner
        noise = self.generator.get_state()
        rollout = self.policy.sample(batch.observation, self.generator)
        excess = rollout.log_prob + self._reference_entropy
        value = self._value(self.critic.requires_grad_(False), self.policy.normalise(batch.observation), rollout.action)
        if learner.regulariser == "action":
            distance = losses.chunk_distance(rollout.action, batch.chunk, batch.mask)
        elif learner.regulariser == "flow-matching":
            distance = self._flow_matching(self.policy, batch)
        else:
            self.generator.set_state(noise)
            with torch.no_grad():
                reference = self.reference.sample(batch.observation, self.generator)
            distance = losses.chunk_distance(rollout.action, reference.action, torch.ones_like(batch.mask))
        if learner.value_scale:
            value = value / value.detach().abs().mean().clamp_min(_SMALLEST_VALUE)
        loss = losses.actor_loss(value, self.temperature * excess, distance, learner.regularisation)
        _step(self.policy_optimiser, loss)
        self.critic.requires_grad_(True)
        self._average()
        if learner.regulariser == "same-noise":
            _step(self.reference_optimiser, self._flow_matching(self.reference, batch))
        if learner.temperature == "learned":
            _step(
                self.temperature_optimiser, losses.temperature_loss(self.log_temperature, excess, self._target_entropy)
            )
            low, high = (math.log(bound) for bound in learner.temperature_bounds)
            with torch.no_grad():
                self.log_temperature.clamp_(low, high)
        return {
            "loss/actor": loss.detach(),
            "value/policy": value.detach().mean(),
            "policy/distance_to_data": distance.detach().mean(),
            "policy/excess_entropy": -excess.detach().mean(),
            "policy/temperature": self.temperature,
        }

    def begin_online(self) -> None:
        """Cloning is over: the reference goes on from where the policy is, and stays a clone."""
        self.reference.load_state_dict(self.policy.state_dict())
        self.reference_optimiser.load_state_dict(self.policy_optimiser.state_dict())

    def _flow_matching(self, policy: FlowPolicy, batch: _Batch) -> Tensor:
        mask = batch.mask * batch.cloned.unsqueeze(-1)
        return losses.flow_matching_loss(policy, batch.observation, batch.chunk, mask, self.generator)

    def _value(self, critic: Critic, observation: Tensor, chunk: Tensor) -> Tensor:
        values: Tensor = critic(observation, chunk)
        return values.amin(0) if self.config.learner.critic_aggregate == "min" else values.mean(0)

    def _average(self) -> None:
        _blend(self.average_policy, self.policy, self.config.learner.policy_average_rate)

    def _on_device(self, chunks: ChunkBatch) -> _Batch:
        def tensor(array: Any) -> Tensor:
            return torch.from_numpy(array).to(self.device, torch.float32)

        every = self.config.learner.clone == "all" or not chunks.solved.any()
        mask = tensor(chunks.valid).unsqueeze(-1).expand(chunks.actions.shape)
        return _Batch(
            observation=tensor(chunks.observation),
            chunk=tensor(chunks.actions).flatten(1),
            mask=mask.flatten(1),
            reward=tensor(chunks.reward),
            discount=tensor(chunks.discount),
            next_observation=tensor(chunks.next_observation),
            critic_valid=tensor(chunks.critic_valid),
            cloned=tensor(np.ones_like(chunks.solved) if every else chunks.solved),
        )

    @property
    def is_finite(self) -> bool:
        """Whether every weight is a finite number; false once training has diverged."""
        weights = (*self.policy.parameters(), *self.critic.parameters())
        return all(bool(weight.isfinite().all()) for weight in weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        return {
            "policy": self.policy.state_dict(),
            "average_policy": self.average_policy.state_dict(),
            "reference": self.reference.state_dict(),
            "critic": self.critic.state_dict(),
            "target_critic": self.target_critic.state_dict(),
            "log_temperature": self.log_temperature.detach(),
            "policy_optimiser": self.policy_optimiser.state_dict(),
            "reference_optimiser": self.reference_optimiser.state_dict(),
            "critic_optimiser": self.critic_optimiser.state_dict(),
            "temperature_optimiser": self.temperature_optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for name in ("policy", "average_policy", "reference", "critic", "target_critic"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        for name in ("policy_optimiser", "reference_optimiser", "critic_optimiser", "temperature_optimiser"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.updates = int(state["updates"])


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


@torch.no_grad()
def _blend(average: nn.Module, latest: nn.Module, rate: float) -> None:
    """average += rate * (latest - average), parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(latest.parameters()), rate)
