"""The flow policy: rollout of K Euler steps, its noise-augmented path density, and the squashing to action bounds.

Flow time runs from t = 0 (Gaussian noise) to t = 1 (action). The flow lives in latent space u = atanh(RHO * a): what is
fitted in pretraining is atanh(RHO * a_data), and what is played is tanh(u) / RHO, so the two agree exactly, also at the
bounds (a = 1 is u = 1.83; without RHO it would be infinite). A policy fitted to raw actions and played through tanh
would turn a gripper command of 1 into 0.76.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.velocity import NoiseScale, make_velocity, normalise_weights

RHO = 0.95
_STD_FLOOR = 1e-2
_NORMALISED_LIMIT = 10.0


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


def path_entropy(dim: int, euler_steps: int, noise_scale: float) -> float:
    """Differential entropy (nats) of the noise path, before squashing.

    D/2 log(2 pi e) (1 + K) + K D log(sigma sqrt(1/K)): with a fixed sigma this does not depend on the policy. It is
    the reference that log-probabilities are measured from; the absolute number (below -170 nats at D = 35, K = 4,
    sigma = 0.1) would act as a constant penalty on every step and no target entropy near 0 could be reached. With a
    learned sigma it is the entropy that a rollout with a fixed one of ``noise_scale`` would have, and so says in terms of
    a noise scale how much entropy is asked for; at K = 4 a sigma of 0.34 makes it 0, the published target.
    """
    gaussian = 0.5 * dim * math.log(2 * math.pi * math.e) * (1 + euler_steps)
    return gaussian + euler_steps * dim * math.log(noise_scale / math.sqrt(euler_steps))


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
    """Result of a noise-augmented rollout.

    Attributes:
        action: Squashed chunk (B, D).
        latent: Chunk before squashing (B, D).
        log_prob: log p of the whole path and the squashing (B,).
    """

    action: Tensor
    latent: Tensor
    log_prob: Tensor


class FlowPolicy(nn.Module):
    """Flow policy with its observation normaliser inside.

    Args:
        velocity: Name of the velocity network.
        observation_dim: O, flattened.
        action_dim: D = H * A.
        config: Sizes, K and sigma.
        quaternions: Where in the observation a unit quaternion x y z w starts. The networks see its rotation matrix: q and
            -q are one rotation, and a sensor that changes between them would tear what lies close together apart.
    """

    observation_mean: Tensor
    observation_std: Tensor

    def __init__(
        self,
        velocity: str,
        observation_dim: int,
        action_dim: int,
        config: FlowConfig,
        quaternions: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._quaternions = [[start + i for i in range(4)] for start in quaternions]
        rotations = {index for four in self._quaternions for index in four}
        self._others = [i for i in range(observation_dim) if i not in rotations]
        self.feature_dim = len(self._others) + 9 * len(self._quaternions)
        self.velocity = make_velocity(velocity, self.feature_dim, action_dim, config)
        self.action_dim, self.euler_steps, self.noise_scale = action_dim, config.euler_steps, config.noise_scale
        self._drift = config.drift
        self.learned_noise: NoiseScale | None = None
        if config.noise == "learned":
            self.learned_noise = NoiseScale(self.feature_dim, action_dim, config.gate_width, config.noise_scale)
        if config.weight_norm:
            normalise_weights(self.velocity)
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))

    def fit_normaliser(self, observations: Tensor) -> None:
        """Set mean and standard deviation from observations (N, O); dimensions that hardly vary keep a floor."""
        self.observation_mean.copy_(observations.mean(0))
        self.observation_std.copy_(observations.std(0, unbiased=False).clamp_min(_STD_FLOOR))

    def normalise(self, observation: Tensor) -> Tensor:
        """What the networks see (B, F): the observation (B, O) normalised, with rotation matrices for quaternions."""
        scaled = (observation - self.observation_mean) / self.observation_std
        scaled = scaled.clamp(-_NORMALISED_LIMIT, _NORMALISED_LIMIT)
        if not self._quaternions:
            return scaled
        return torch.cat([scaled[:, self._others], rotation_matrix(observation[:, self._quaternions]).flatten(1)], -1)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Deterministic rollout: actions (B, D) for raw observations (B, O) and noise A_0 (B, D)."""
        context = self.velocity.encode(self.normalise(observation))
        latent, dt = noise, 1.0 / self.euler_steps
        for i in range(self.euler_steps):
            latent = latent + self.velocity(_time(i * dt, latent), latent, context) * dt
        return squash(latent)

    def sample(self, observation: Tensor, generator: torch.Generator, start: Tensor | None = None) -> Rollout:
        """Noise-augmented rollout with its path density (paper, section 4.2).

        A_{i+1} = A_i + b dt + sigma sqrt(dt) eps,  b = v + (sigma^2 / 2) (t v - A) / (1 - t).
        The drift keeps the marginals of the deterministic flow while v is a true flow-matching velocity; without the
        correction b = v.
        log p = log N(A_0; 0, I) + sum_i log N(A_{i+1}; A_i + b dt, sigma^2 dt I) - log |da/du|.
        Noise is drawn anew for every step, sample and dimension; A_0 too unless ``start`` (B, D) gives it.

        With sigma fixed, the Gaussian terms do not depend on the policy: the gradient of log p reaches the velocity
        through the squashing alone, where it penalises saturation. With sigma(t, A, s) learned, -log p is an entropy that
        the policy can raise and lower by its noise.
        """
        features = self.normalise(observation)
        context = self.velocity.encode(features)
        noise_context = None if self.learned_noise is None else self.learned_noise.encode(features)
        batch, dt = len(observation), 1.0 / self.euler_steps

        def draw() -> Tensor:
            return torch.randn(batch, self.action_dim, generator=generator, device=observation.device)

        latent = draw() if start is None else start
        log_prob = _standard_normal_log_prob(latent)
        for i in range(self.euler_steps):
            t = i * dt
            time = _time(t, latent)
            v = self.velocity(time, latent, context)
            eps = draw()
            if self.learned_noise is None:
                variance: float | Tensor = self.noise_scale**2
                step = self.noise_scale * math.sqrt(dt) * eps
                log_scale: float | Tensor = self.action_dim * math.log(self.noise_scale * math.sqrt(dt))
            else:
                log_sigma = self.learned_noise(time, latent, noise_context)
                variance = (2 * log_sigma).exp()
                step = log_sigma.exp() * math.sqrt(dt) * eps
                log_scale = (log_sigma + 0.5 * math.log(dt)).sum(-1)
            drift = v + 0.5 * variance * (t * v - latent) / (1 - t) if self._drift else v
            latent = latent + drift * dt + step
            log_prob = log_prob + _standard_normal_log_prob(eps) - log_scale
        return Rollout(squash_through(latent), latent, log_prob - squash_log_det(latent))


def _time(value: float, like: Tensor) -> Tensor:
    return torch.full((1, 1), value, dtype=like.dtype, device=like.device)


def _standard_normal_log_prob(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)
