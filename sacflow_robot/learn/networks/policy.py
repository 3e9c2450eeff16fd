"""Base of all policies: squashing to action bounds, the observation normalizer, and the interface to learner and export.

A policy's own variable is the latent u = atanh(RHO * a): what is fitted in pretraining is atanh(RHO * a_data), and what
is played is tanh(u) / RHO, so the two agree exactly, also at the bounds (a = 1 is u = 1.83; without RHO it would be
infinite). A policy fitted to raw actions and played through tanh would turn a gripper command of 1 into 0.76.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sacflow_robot.export.graph import ExportablePolicy
from sacflow_robot.spec import PolicySpec, RobotSpec

RHO = 0.95
_STD_FLOOR, _LIMIT = 1e-2, 10.0
# From scratch the normalizer is fitted to random actions, which show little of where a policy will go: Hopper's falls last some
# 20 steps, and with the values above half of a learning Hopper's observations were beyond the limit.
_EARLY_STD_FLOOR, _EARLY_LIMIT = 0.1, 100.0


def squash(latent: Tensor) -> Tensor:
    """Action in [-1, 1] of a latent, same shape."""
    return (latent.tanh() / RHO).clamp(-1, 1)


def squash_through(latent: Tensor) -> Tensor:
    """:func:`squash` with the gradient of the unclipped tanh, so that a clipped action can still be pulled back."""
    action = latent.tanh() / RHO
    return action + (squash(latent) - action).detach()


def unsquash(action: Tensor) -> Tensor:
    """Latent of an action in [-1, 1]; inverse of :func:`squash`."""
    return torch.atanh(RHO * action)


def squash_log_det(latent: Tensor) -> Tensor:
    """Sum over the last axis of log |da/du|, (...,); negative where tanh saturates."""
    # log(1 - tanh(u)^2) = 2 * (log 2 - u - softplus(-2u)), exact also for large |u|
    return (2 * (math.log(2) - latent - nn.functional.softplus(-2 * latent)) - math.log(RHO)).sum(-1)


def rotation_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices, row by row (..., 9), of quaternions x y z w (..., 4) of any length but 0."""
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True).clamp_min(1e-6)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([entry for row in rows for entry in row], -1)


@dataclass(frozen=True)
class Rollout:
    """Result of sampling a policy.

    Attributes:
        action: Squashed chunk (B, D).
        latent: Chunk before squashing (B, D).
        log_prob: log p (B,) of the action; for a flow of the whole path, or of its last step; 0 of a policy that has no
            density.
    """

    action: Tensor
    latent: Tensor
    log_prob: Tensor


class PolicyNetwork(ExportablePolicy):
    """Base of all policies: chunks from observations and noise, with the observation normalizer inside.

    Attributes:
        name: What kind it is; written into the policy file.
        quaternions: Indices of the four entries of each quaternion in the observation.
        others: Indices of all other entries.
        euler_steps: K of a flow, 1 for others.
        reference_entropy: What log-probabilities are measured from (nats).

    Args:
        observation_dim: O, flattened.
        action_dim: D = H * A.
        quaternions: Where in the observation a unit quaternion x y z w starts. The networks see its rotation matrix: q and
            -q are one rotation, and a sensor that changes between them would tear what lies close together apart.
    """

    observation_mean: Tensor
    observation_std: Tensor
    observation_limit: Tensor
    name: str
    euler_steps = 1
    reference_entropy = 0.0

    def __init__(self, observation_dim: int, action_dim: int, quaternions: Sequence[int] = ()) -> None:
        super().__init__()
        self.quaternions = [[start + i for i in range(4)] for start in quaternions]
        rotations = {index for four in self.quaternions for index in four}
        self.others = [i for i in range(observation_dim) if i not in rotations]
        self.feature_dim = len(self.others) + 9 * len(self.quaternions)
        self.action_dim = action_dim
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("observation_limit", torch.tensor(_LIMIT))

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, D) as evaluated and exported, for raw observations (B, O) and noise (B, D)."""
        raise NotImplementedError

    def make_spec(self, robot: RobotSpec, notes: Mapping[str, Any] | None = None) -> PolicySpec:
        """The contract of this policy on a robot."""
        return PolicySpec(
            robot=robot,
            chunk_length=self.action_dim // robot.action_dim,
            euler_steps=self.euler_steps,
            velocity=self.name,
            observation_mean=tuple(self.observation_mean.tolist()),
            observation_std=tuple(self.observation_std.tolist()),
            notes=notes or {},
        )

    def rollout(self, observation: Tensor, noise: Tensor) -> Rollout:
        """Sample of the policy as trained, for raw observations (B, O) and what :meth:`draw` drew."""
        raise NotImplementedError

    @property
    def noise_count(self) -> int:
        """Vectors of noise (B, D) that a sample takes."""
        return 1

    def draw(self, batch: int, generator: torch.Generator, start: Tensor | None = None) -> Tensor:
        """Standard normal noise (:attr:`noise_count`, B, D), the first vector of which ``start`` (B, D) may give."""
        device = self.observation_mean.device
        given = [] if start is None else [start]
        count = self.noise_count - len(given)
        drawn = [torch.randn(batch, self.action_dim, generator=generator, device=device) for _ in range(count)]
        return torch.stack([*given, *drawn])

    def sample(self, observation: Tensor, generator: torch.Generator, start: Tensor | None = None) -> Rollout:
        """:meth:`rollout` with noise of the generator's, fresh for every step, row and dimension."""
        return self.rollout(observation, self.draw(len(observation), generator, start))

    def fit_normalizer(self, observations: Tensor, *, early: bool = False) -> None:
        """Set mean and standard deviation from observations (N, O); dimensions that hardly vary keep a floor.

        ``early``: they are of random actions, and far less than a policy will see.
        """
        floor, limit = (_EARLY_STD_FLOOR, _EARLY_LIMIT) if early else (_STD_FLOOR, _LIMIT)
        self.observation_mean.copy_(observations.mean(0))
        self.observation_std.copy_(observations.std(0, unbiased=False).clamp_min(floor))
        self.observation_limit.fill_(limit)

    def normalize(self, observation: Tensor) -> Tensor:
        """Features (B, F) of an observation (B, O): normalized, with rotation matrices for quaternions."""
        scaled = (observation - self.observation_mean) / self.observation_std
        scaled = scaled.clamp(-self.observation_limit, self.observation_limit)
        if not self.quaternions:
            return scaled
        return torch.cat([scaled[:, self.others], rotation_matrix(observation[:, self.quaternions]).flatten(1)], -1)
