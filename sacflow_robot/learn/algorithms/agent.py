"""Base of all algorithms: networks, optimizers, averages, the critic's update, acting, and saving.

An algorithm is a subclass (sac_flow.py, baselines.py; by name in registry.py) that says which policy it has, what a state
is worth to it, and how the policy is updated.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sacflow_robot.data.replay_buffer import ChunkBatch
from sacflow_robot.errors import UsageError
from sacflow_robot.learn import losses
from sacflow_robot.learn.compile import Compute
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.critic import Critic, aggregate
from sacflow_robot.learn.networks.policies import QC, pick_best, repeat_rows
from sacflow_robot.learn.networks.policy import PolicyNetwork
from sacflow_robot.spec import FloatArray, RobotSpec

Metrics = dict[str, Tensor]


class Batch(NamedTuple):
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
    """Policy and critics, updated from chunk batches; the base of all algorithms.

    Two policies are kept: the one that is trained, and its running average, which acts and is exported.

    Args:
        robot: The robot.
        config: The run's configuration.
        device: Where to compute.

    Raises:
        UsageError: The robot's actions are not bounded by -1 and 1, which is what the policy puts out.
    """

    def __init__(self, robot: RobotSpec, config: TrainConfig, device: torch.device) -> None:
        if set(robot.action_low) != {-1.0} or set(robot.action_high) != {1.0}:
            raise UsageError(f"robot {robot.robot!r} takes actions beyond -1 to 1; give it a driver that scales them")
        self.robot = robot
        self.config = config
        self.device = device
        self.commanded_robot = robot  # the one that is commanded, whose actions may have bounds of their own
        learner = config.learner
        self.action_dim = config.chunk_length * robot.action_dim
        self.generator = torch.Generator(device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = self._make_policy().to(device)
            self.critic = Critic(
                self.policy.feature_dim,
                self.action_dim,
                learner.critic_width,
                learner.critic_depth,
                learner.num_critics,
            ).to(device)
        self.average_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.policy_optimizer = self._adam(self.policy, learner.policy_lr)
        self.critic_optimizer = self._adam(self.critic, learner.critic_lr)
        self.bc_coef = learner.bc_coef
        self.updates = 0
        self.compute = Compute(config, device)
        self._compiled_critic_loss = self.compute.prepare(self._critic_loss)
        self.exported: nn.Module = self.average_policy
        if learner.best_of > 1:
            self.exported = QC(self.average_policy, self.target_critic, learner.best_of, learner.critic_aggregate)

    def _make_policy(self) -> PolicyNetwork:
        """The policy to train; a flow unless a subclass says otherwise."""
        return self._make_flow()

    def _update_policy_offline(self, batch: Batch) -> Metrics:
        """One step of the policy on demonstrations."""
        raise NotImplementedError

    def _update_policy(self, batch: Batch) -> Metrics:
        """One step of the policy online."""
        raise NotImplementedError

    def _draw_next(self, batch: Batch) -> Tensor:
        """Noise for :meth:`_next_value`."""
        return self.policy.draw(len(batch.chunk), self.generator)

    def _next_value(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Value of the state after each window (B,), and what is to be deducted from it (B,)."""
        action = self.policy.rollout(batch.next_observation, noise).action
        value = self._value(self.target_critic, batch.next_observation, action)
        return value, torch.zeros_like(value)

    def fit_normalizer(self, observations: FloatArray) -> None:
        """Set the observation normalizer from observations (N, O), once, before training."""
        for policy in self._networks().values():
            if isinstance(policy, PolicyNetwork):
                seen = torch.from_numpy(observations).to(self.device)
                policy.fit_normalizer(seen, early=self.config.from_scratch)

    @torch.no_grad()
    def act(self, observation: FloatArray, noise: FloatArray) -> FloatArray:
        """Chunks (B, H, A) as exported, for raw observations (B, O) and noise (B, H, A)."""
        actions: Tensor = self.exported(
            torch.from_numpy(observation).to(self.device), torch.from_numpy(noise).to(self.device).flatten(1)
        )
        chunks: FloatArray = actions.cpu().numpy().reshape(noise.shape)
        return chunks

    @torch.no_grad()
    def explore(self, observation: FloatArray, noise: FloatArray) -> FloatArray:
        """Chunks (B, H, A) sampled from the trained policy, for collecting experience; the best of N where N is given.

        ``noise`` (B, H, A) starts the first sample; other noise comes from the agent's generator.
        """
        seen = torch.from_numpy(observation).to(self.device)
        start = torch.from_numpy(noise).to(self.device).flatten(1)
        action = self._explored(seen, start)
        others = self.config.learner.best_of - 1
        if others:
            more = self._explored(repeat_rows(seen, others))
            action = torch.cat([action.unsqueeze(1), more.reshape(len(seen), others, -1)], 1)
            many = repeat_rows(seen, others + 1)
            values = self._value(self.target_critic, many, action.flatten(0, 1))
            action = pick_best(action, values.reshape(len(seen), -1))
        chunks: FloatArray = action.cpu().numpy().reshape(noise.shape)
        return chunks

    def _explored(self, observation: Tensor, start: Tensor | None = None) -> Tensor:
        """Samples (B, D) for collecting experience; ``start`` (B, D) is their first noise where given."""
        return self.policy.sample(observation, self.generator, start).action

    def update_offline(self, chunks: ChunkBatch) -> Metrics:
        """One step of the policy on demonstrations, one step of the critic on the policy so far."""
        batch = self._on_device(chunks)
        metrics = self._update_policy_offline(batch)
        self.updates += 1
        return {**metrics, **self._update_critic(batch)}

    def update_online(self, chunks: ChunkBatch, *, critic_only: bool = False) -> Metrics:
        """One step of the critic; every ``policy_delay`` of them, unless ``critic_only``, one of the policy."""
        batch = self._on_device(chunks)
        metrics = self._update_critic(batch)
        self.updates += 1
        if not critic_only and self.updates % self.config.learner.policy_delay == 0:
            metrics |= self._update_policy(batch)
        return metrics

    def begin_online(self) -> None:
        """The offline phase is over."""

    def start_from_average(self) -> None:
        """Have the policy go on from the averaged one, which is what was exported and has acted."""
        self.policy.load_state_dict(self.average_policy.state_dict())

    def _update_critic(self, batch: Batch) -> Metrics:
        loss, value = self._compiled_critic_loss(batch, self._draw_next(batch))
        losses.step(self.critic_optimizer, loss)
        blend(self.target_critic, self.critic, self.config.learner.tau)
        return {"loss/critic": loss.detach(), "value/data": value}

    def _critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = losses.td_target(batch.reward, batch.discount, *self._next_value(batch, noise))
        values = self.critic(self.policy.normalize(batch.observation), batch.chunk)
        return losses.critic_loss(values, target, batch.critic_valid), values.detach().mean()

    def _value(self, critic: Critic, observation: Tensor, chunk: Tensor) -> Tensor:
        """Value (B,) of raw observations and chunks, the members combined."""
        return aggregate(critic(self.policy.normalize(observation), chunk), self.config.learner.critic_aggregate)

    def _flow_matching(self, policy: FlowPolicy, batch: Batch, drawn: tuple[Tensor, Tensor]) -> Tensor:
        """Flow-matching loss on the rows that are to be cloned."""
        mask = batch.mask * batch.cloned.unsqueeze(-1)
        return losses.flow_matching_loss(policy, batch.observation, batch.chunk, mask, *drawn)

    def _step_policy(self, loss: Tensor) -> None:
        losses.step(self.policy_optimizer, loss, self.config.learner.max_grad_norm)
        self._average()

    def _average(self) -> None:
        blend(self.average_policy, self.policy, self.config.learner.ema_rate)

    def _make_flow(self) -> FlowPolicy:
        config, robot = self.config, self.robot
        return FlowPolicy(config.velocity, robot.observation_dim, self.action_dim, config.flow, robot.quaternions)

    def _adam(self, network: nn.Module, rate: float) -> torch.optim.Adam:
        betas = self.config.learner.adam_beta1, 0.999
        return torch.optim.Adam(network.parameters(), rate, betas, fused=True)

    def _on_device(self, chunks: ChunkBatch) -> Batch:
        def tensor(array: Any) -> Tensor:
            host = torch.from_numpy(array).to(torch.float32)
            if self.device.type == "cuda":  # from pinned memory it is copied while the next batch is being drawn
                host = host.pin_memory()
            return host.to(self.device, non_blocking=True)

        every = self.config.learner.clone == "all" or not chunks.any_solved
        mask = tensor(chunks.valid).unsqueeze(-1).expand(chunks.actions.shape)
        return Batch(
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
        """True while every weight is a finite number; false once training has diverged."""
        weights = (weight for network in self._networks().values() for weight in network.parameters())
        return all(bool(weight.isfinite().all()) for weight in weights)

    def _networks(self) -> dict[str, nn.Module]:
        """All networks, by name."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, nn.Module) and name != "exported"
        }

    def _state(self) -> dict[str, Any]:
        """Everything with a state of its own, by name."""
        optimizers = {n: v for n, v in vars(self).items() if isinstance(v, torch.optim.Optimizer)}
        return {**self._networks(), **optimizers}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        parts = {name: part.state_dict() for name, part in self._state().items()}
        return {**parts, "generator": self.generator.get_state(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for name, part in self._state().items():
            take_over(part, state[name])
        self.generator.set_state(state["generator"].cpu())
        self.updates = int(state["updates"])


def take_over(part: Any, state: Mapping[str, Any]) -> None:
    """Load a state into a network, an optimizer or a temperature, as a copy and without its step sizes.

    torch's optimizers keep the tensors that they are given: two that load one state would go on updating the same moments.
    Step sizes are the configuration's, which may have changed since the state was saved.
    """
    groups = part.param_groups if isinstance(part, torch.optim.Optimizer) else []
    rates = [group["lr"] for group in groups]
    part.load_state_dict(copy.deepcopy(dict(state)))
    groups = part.param_groups if isinstance(part, torch.optim.Optimizer) else []
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def blend(average: nn.Module, latest: nn.Module, rate: float) -> None:
    """average += rate * (latest - average), parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(latest.parameters()), rate)
