"""Baselines on a flow that only clones: cloning alone, the best of several (QC), and one-step distillation (QC-FQL)."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from sacflow_robot.data.replay_buffer import ChunkBatch
from sacflow_robot.learn import losses
from sacflow_robot.learn.algorithms.agent import Agent, Batch, Metrics
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.networks.policies import OneStepPolicy, pick_best, repeat_rows
from sacflow_robot.learn.networks.policy import PolicyNetwork
from sacflow_robot.spec import RobotSpec


class BehaviorCloning(Agent):
    """Flow matching, offline and online; what is collected is cloned too, as ``clone`` says. No critic is learned."""

    policy: Any  # a FlowPolicy

    def __init__(self, robot: RobotSpec, config: TrainConfig, device: torch.device) -> None:
        super().__init__(robot, config, device)
        self._compiled_flow_matching = self.compute.prepare(self._flow_matching)

    def _explored(self, observation: Tensor, start: Tensor | None = None) -> Tensor:
        """Samples of the plain flow: a clone's own noise A_0 is all that it explores with."""
        noise = self.policy.draw(len(observation), self.generator, start)[0]
        return cast(Tensor, self.policy(observation, noise))

    def update_offline(self, chunks: ChunkBatch) -> Metrics:
        """One flow-matching step."""
        self.updates += 1
        return self._update_policy(self._on_device(chunks))

    def update_online(self, chunks: ChunkBatch, *, critic_only: bool = False) -> Metrics:
        """One flow-matching step, unless ``critic_only``."""
        return {} if critic_only else self.update_offline(chunks)

    def _update_policy(self, batch: Batch) -> Metrics:
        drawn = losses.draw_flow_matching(batch.chunk, self.generator)
        loss = self._compiled_flow_matching(self.policy, batch, drawn)
        self._step_policy(loss)
        return {"loss/flow_matching": loss.detach()}


class BestOfN(BehaviorCloning):
    """QC (arXiv 2507.07969): the flow clones; of N of its chunks the critic picks one, in targets and when acting.

    Q(s, a) = sum gamma^j r_j + gamma^H Q'(s', a*),  a* = argmax over N samples of Q(s', a).
    """

    update_offline, update_online = Agent.update_offline, Agent.update_online

    def _update_policy_offline(self, batch: Batch) -> Metrics:
        return self._update_policy(batch)

    def _draw_next(self, batch: Batch) -> Tensor:
        rows = len(batch.chunk) * self.config.learner.best_of
        return torch.randn(rows, self.action_dim, generator=self.generator, device=self.device)

    def _next_value(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        count = self.config.learner.best_of
        many = repeat_rows(batch.next_observation, count)
        chunks = self.policy(many, noise)
        values = self._value(self.critic, many, chunks).reshape(-1, count)
        best = pick_best(chunks.reshape(-1, count, self.action_dim), values)
        value = self._value(self.target_critic, batch.next_observation, best)
        return value, torch.zeros_like(value)


class QCFQL(Agent):
    """QC-FQL (arXiv 2507.07969 on 2502.02538): a flow clones; a one-step policy follows the critic and stays near it.

    Actor: -Q(s, mu(s, z)) + beta ||mu(s, z) - flow(s, z)||^2, the same noise z; the distance is a sum over the chunk's
    dimensions. Critic: the target policy is mu. Offline and online are the same.
    """

    def __init__(self, robot: RobotSpec, config: TrainConfig, device: torch.device) -> None:
        super().__init__(robot, config, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.flow = self._make_flow().to(device)
        self.flow_optimizer = self._adam(self.flow, config.learner.policy_lr)
        self._compiled_flow_matching = self.compute.prepare(self._flow_matching)
        self._compiled_actor_loss = self.compute.prepare(self._actor_loss)

    def _make_policy(self) -> PolicyNetwork:
        learner = self.config.learner  # its sizes are the critic's: those of the flow may be a token's
        sizes = replace(self.config.flow, width=learner.critic_width, depth=learner.critic_depth)
        return OneStepPolicy(self.robot.observation_dim, self.action_dim, sizes, self.robot.quaternions)

    def _update_policy_offline(self, batch: Batch) -> Metrics:
        return self._update_policy(batch)

    def _actor_loss(self, batch: Batch, noise: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action = self.policy.rollout(batch.observation, noise).action
        with torch.no_grad():
            cloned = self.flow(batch.observation, noise[0])
        value = self._value(self.critic, batch.observation, action)
        scaled = losses.normalize_q(value) if self.config.learner.normalize_q else value
        distance = losses.chunk_distance(action, cloned, torch.ones_like(batch.mask))
        loss = losses.actor_loss(scaled, torch.zeros_like(value), distance, weight)
        return loss, value.detach().mean(), distance.detach().mean()

    def _update_policy(self, batch: Batch) -> Metrics:
        drawn = losses.draw_flow_matching(batch.chunk, self.generator)
        cloning = self._compiled_flow_matching(self.flow, batch, drawn)
        losses.step(self.flow_optimizer, cloning, self.config.learner.max_grad_norm)
        self.critic.requires_grad_(False)
        noise = self.policy.draw(len(batch.chunk), self.generator)
        weight = torch.full((), self.bc_coef, device=self.device)  # unlike torch.tensor it does not wait for a GPU
        loss, value, distance = self._compiled_actor_loss(batch, noise, weight)
        self._step_policy(loss)
        self.critic.requires_grad_(True)
        return {
            "loss/flow_matching": cloning.detach(),
            "loss/actor": loss.detach(),
            "value/policy": value,
            "policy/distance_to_data": distance,
            "policy/regularization": weight,
        }
