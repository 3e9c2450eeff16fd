"""The policies that are not plain flows: one-step, Gaussian, and the best of several samples of another."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sacflow_robot.export.graph import ExportablePolicy
from sacflow_robot.learn.config import LOG_NOISE_BOUNDS, FlowConfig
from sacflow_robot.learn.networks.critic import Critic, aggregate
from sacflow_robot.learn.networks.folded import FoldedFlow
from sacflow_robot.learn.networks.policy import PolicyNetwork, Rollout, squash, squash_log_det, squash_through


class OneStepPolicy(PolicyNetwork):
    """a = mu(s, z), noise to action in one evaluation of an MLP (FQL, arXiv 2502.02538). It has no density.

    Args: as of ``FlowPolicy``; ``config`` gives width and depth.
    """

    name = "one-step"

    def __init__(
        self, observation_dim: int, action_dim: int, config: FlowConfig, quaternions: Sequence[int] = ()
    ) -> None:
        super().__init__(observation_dim, action_dim, quaternions)
        self.net = _mlp(self.feature_dim + action_dim, config, action_dim)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        return squash(self._latent(observation, noise))

    def rollout(self, observation: Tensor, noise: Tensor) -> Rollout:
        latent = self._latent(observation, noise[0])
        return Rollout(squash_through(latent), latent, torch.zeros_like(latent[:, 0]))

    def _latent(self, observation: Tensor, noise: Tensor) -> Tensor:
        latent: Tensor = self.net(torch.cat([self.normalize(observation), noise], -1))
        return latent.to(noise.dtype)


class GaussianPolicy(PolicyNetwork):
    """u ~ N(mu(s), diag sigma(s)^2), squashed: SAC's policy. Evaluated and exported it plays the mean: noise is ignored.

    Args: as of ``FlowPolicy``; ``config`` gives width and depth.
    """

    name = "gaussian"

    def __init__(
        self, observation_dim: int, action_dim: int, config: FlowConfig, quaternions: Sequence[int] = ()
    ) -> None:
        super().__init__(observation_dim, action_dim, quaternions)
        self.net = _mlp(self.feature_dim, config, 2 * action_dim)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        return squash(self._moments(observation)[0])

    def rollout(self, observation: Tensor, noise: Tensor) -> Rollout:
        """log p = log N(u; mu, sigma^2) - log |da/du|."""
        mean, log_std = self._moments(observation)
        eps = noise[0]
        latent = mean + log_std.exp() * eps
        log_prob = -(0.5 * eps.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
        return Rollout(squash_through(latent), latent, log_prob - squash_log_det(latent))

    def _moments(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.net(self.normalize(observation)).to(observation.dtype).chunk(2, -1)
        low, high = LOG_NOISE_BOUNDS
        return mean, low + 0.5 * (high - low) * (raw.tanh() + 1)


class QC(ExportablePolicy):
    """Of N actions of a policy, the one that the critic values most; called and exported as the policy itself.

    One noise z (B, D) makes all N: candidate n starts from R_n z, with fixed orthogonal matrices R_n drawn at random and
    R_0 = I. Each R_n z is standard normal and uncorrelated to the others on average, so every candidate is a sample of the
    policy, and the contract stays what it is: noise (B, H, A) in, the same action for the same noise on every machine. All
    have the length of z: of an action of one number there are but two, z's and -z's.

    Args:
        policy: The policy.
        critic: What values actions.
        candidates: N.
        how: How its members are combined, ``min`` or ``mean``.
    """

    turns: Tensor
    picks = True

    def __init__(self, policy: PolicyNetwork, critic: Critic, candidates: int, how: str) -> None:
        super().__init__()
        self.policy: PolicyNetwork | FoldedFlow = policy
        self.critic = critic
        self._candidates = candidates
        self._how = how
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(candidates, policy.action_dim, policy.action_dim, generator=generator)
        turns, upper = torch.linalg.qr(drawn)
        # Evenly distributed over all orthogonal matrices only so: the signs that QR leaves open are those of the draw.
        turns = turns * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        turns[0] = torch.eye(policy.action_dim)
        # (D, N * D): one product turns a noise into all its candidates.
        turns = turns.permute(2, 0, 1).reshape(policy.action_dim, -1).to(policy.observation_mean.device)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, observation: Tensor, noise: Tensor, *committed: Tensor) -> Tensor:
        """Actions (B, D) for raw observations (B, O), noise (B, D), and what else the policy takes, each (B, D)."""
        chunks, values = self.candidates(observation, noise, *committed)
        return pick_best(chunks, values)

    @property
    def takes_prefix(self) -> bool:  # type: ignore[override]
        return self.policy.takes_prefix

    def twin(self, *, prefix: bool) -> QC:
        twin = copy.deepcopy(self)
        twin.policy = self.policy.twin(prefix=prefix)  # type: ignore[assignment]
        return twin

    def margin(self, observation: Tensor, noise: Tensor, *committed: Tensor) -> Tensor:
        _, values = self.candidates(observation, noise, *committed)
        best = values.topk(2, -1).values
        return best[:, 0] - best[:, 1]

    def candidates(self, observation: Tensor, noise: Tensor, *committed: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks (B, N, D) and their values (B, N)."""
        starts = (noise @ self.turns).reshape(-1, noise.shape[-1])
        many = repeat_rows(observation, self._candidates)
        # In a file, one row of what is committed may stand for all.
        chunks = self.policy(many, starts, *(repeat_rows(x + 0 * noise, self._candidates) for x in committed))
        values = aggregate(self.critic(self.policy.normalize(many), chunks), self._how)
        return chunks.reshape(-1, self._candidates, noise.shape[-1]), values.reshape(-1, self._candidates)


def repeat_rows(x: Tensor, times: int) -> Tensor:
    """(B, F) -> (B * times, F), each row ``times`` times in succession."""
    return torch.cat([x] * times, -1).reshape(-1, x.shape[-1])


def pick_best(chunks: Tensor, values: Tensor) -> Tensor:
    """Of chunks (B, N, D) those (B, D) whose value (B, N) is largest."""
    best = values.argmax(-1).reshape(-1, 1, 1).expand(-1, 1, chunks.shape[-1])
    return chunks.gather(1, best).squeeze(1)


def _mlp(inputs: int, config: FlowConfig, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(config.depth):
        layers += [nn.Linear(inputs, config.width), nn.SiLU()]
        inputs = config.width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
