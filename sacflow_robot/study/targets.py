"""Targets whose flow is known in closed form, and a flow policy that follows it exactly apart from its K Euler steps.

A target is a product over D dimensions of one mixture of Gaussians, sum_j w_j N(m_j, s_j^2). Between noise x_0 ~ N(0, 1)
and data x_1, x_t = (1 - t) x_0 + t x_1 is again such a mixture, of N(t m_j, c_j^2) with c_j^2 = (1 - t)^2 + t^2 s_j^2, and
the velocity that flow matching looks for, E[x_1 - x_0 | x_t = x], is the mean over components, by their responsibilities
r_j(t, x), of m_j + (t s_j^2 - (1 - t)) / c_j^2 * (x - t m_j). Checks of the path density are made of a rollout's path, and of
the noise that makes a given path.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import Rollout
from sacflow_robot.learn.networks.velocity import Velocity

Array = npt.NDArray[np.float64]


class Mixture(NamedTuple):
    """sum_j w_j N(m_j, s_j^2), one dimension: what figures call it, w_j (of sum 1), m_j and s_j."""

    name: str
    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def density(self, x: Array) -> Array:
        """p(x), of any shape."""
        z = (x[..., None] - np.array(self.means)) / np.array(self.stds)
        terms = np.array(self.weights) * np.exp(-0.5 * z**2) / (np.array(self.stds) * math.sqrt(2 * math.pi))
        total: Array = terms.sum(-1)
        return total

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), of any shape, also where p(x) is too small for a number."""
        weights, means, stds = self._tensors(x)
        z = (x.unsqueeze(-1) - means) / stds
        return (weights.log() - 0.5 * z.square() - stds.log() - 0.5 * math.log(2 * math.pi)).logsumexp(-1)

    def quantiles(self, shares: Array) -> Array:
        """Inverse of the distribution function, by interpolation on a fine grid; shares (N,) in (0, 1)."""
        reach = 8 * max(self.stds)
        x = np.linspace(min(self.means) - reach, max(self.means) + reach, 40_001)
        total = np.cumsum(self.density(x)) * (x[1] - x[0])
        inverse: Array = np.interp(shares, total / total[-1], x)
        return inverse

    def velocity(self, time: Tensor, x: Tensor) -> Tensor:
        """E[x_1 - x_0 | x_t = x] at flow time (B, 1) or (1, 1), x (B, D)."""
        weights, means, stds = self._tensors(x)
        t = time.unsqueeze(-1)
        spread = (1 - t).square() + (t * stds).square()
        offset = x.unsqueeze(-1) - t * means
        share = (weights.log() - 0.5 * offset.square() / spread - 0.5 * spread.log()).softmax(-1)
        return (share * (means + (t * stds.square() - (1 - t)) / spread * offset)).sum(-1)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def tensor(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=like.dtype)

        return tensor(self.weights), tensor(self.means), tensor(self.stds)


GAUSSIAN = Mixture("Gaussian", (1.0,), (0.4,), (0.35,))
MIXTURE = Mixture("mixture", (0.35, 0.65), (-0.8, 0.6), (0.15, 0.25))


class ExactVelocity(Velocity):
    """The velocity of a target, whatever the observation."""

    def __init__(self, target: Mixture) -> None:
        super().__init__()
        self._target = target

    def encode(self, observation: Tensor) -> Tensor:
        """Nothing (B, 0)."""
        return observation[:, :0]

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return self._target.velocity(time, action)


def exact_policy(target: Mixture, dim: int, euler_steps: int, noise_scale: float, *, drift: bool = True) -> FlowPolicy:
    """A flow policy in double precision with a target's own velocity, and no observation to speak of (B, 1)."""
    config = FlowConfig(width=1, depth=1, gate_width=1, euler_steps=euler_steps, noise_scale=noise_scale, drift=drift)
    policy = FlowPolicy("mlp", 1, dim, config).double()
    policy.velocity = ExactVelocity(target)
    return policy.requires_grad_(False)


def latents_of(policy: FlowPolicy, observation: Tensor, noise: Tensor) -> tuple[list[Tensor], Rollout]:
    """Latents A_0 ... A_K, each (B, D), of the rollout that noise (1 + K, B, D) drives at observations (B, O), and the rollout."""
    latents: list[Tensor] = []
    hook = policy.velocity.register_forward_pre_hook(lambda _, args: latents.append(args[1]))
    try:
        rollout = policy.rollout(observation, noise)
    finally:
        hook.remove()
    return [*latents, rollout.latent], rollout


def follow(policy: FlowPolicy, noise: Tensor) -> tuple[Tensor, Rollout]:
    """The same, stacked (K + 1, B, D), where there is no observation to speak of."""
    latents, rollout = latents_of(policy, noise.new_zeros(noise.shape[1], 1), noise)
    return torch.stack(latents), rollout


def noise_of(policy: FlowPolicy, path: Tensor) -> Tensor:
    """The noise (1 + K, B, D) that drives a rollout along a path (K + 1, B, D).

    From the path alone and the rule of a step, A_{i+1} = mean(A_i) + sigma sqrt(1 / K) eps_i: a rollout without eps_i
    ends step i at the mean.
    """
    noise = torch.zeros_like(path)
    noise[0] = path[0]
    scale = policy.noise_scale / math.sqrt(policy.euler_steps)
    for i in range(policy.euler_steps):
        noise[i + 1] = (path[i + 1] - follow(policy, noise)[0][i + 1]) / scale
    return noise


def path_log_density(policy: FlowPolicy, path: Tensor) -> Tensor:
    """log p (B,) of a path (K + 1, B, D), by the policy's own rollout along it."""
    return policy.rollout(path.new_zeros(path.shape[1], 1), noise_of(policy, path)).log_prob


class GaussianSteps(NamedTuple):
    """Marginals of the K + 1 latents of a rollout toward one Gaussian, which stay Gaussian: means and stds (K + 1,)."""

    means: Array
    stds: Array


def gaussian_drift(target: Mixture, t: float, noise_scale: float, *, drift: bool = True) -> tuple[float, float]:
    """b(t, x) = gain * x + offset of the rollout toward a target of one component: (gain, offset)."""
    (mean,), (std,) = target.means, target.stds
    gain = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2)
    offset = mean - gain * t * mean
    if not drift:
        return gain, offset
    pull = 0.5 * noise_scale**2 / (1 - t)
    return gain + pull * (t * gain - 1), offset + pull * t * offset


def gaussian_steps(target: Mixture, euler_steps: int, noise_scale: float, *, drift: bool = True) -> GaussianSteps:
    """Means and standard deviations of A_0 ... A_K by recursion; with a noise scale of 0, of the deterministic flow."""
    dt = 1 / euler_steps
    means, variances = [0.0], [1.0]
    for i in range(euler_steps):
        gain, offset = gaussian_drift(target, i * dt, noise_scale, drift=drift)
        means.append(means[-1] + dt * (gain * means[-1] + offset))
        variances.append((1 + dt * gain) ** 2 * variances[-1] + noise_scale**2 * dt)
    return GaussianSteps(np.array(means), np.sqrt(variances))


def gaussian_divergence(mean: float, std: float, other_mean: float, other_std: float) -> float:
    """KL(N(mean, std^2) || N(other_mean, other_std^2)) in nats."""
    ratio = (std / other_std) ** 2
    return 0.5 * (ratio - 1 - math.log(ratio) + ((mean - other_mean) / other_std) ** 2)


def path_divergence(target: Mixture, other: Mixture, euler_steps: int, noise_scale: float) -> float:
    """KL between the paths of two rollouts toward one Gaussian each, in nats a dimension, in closed form.

    Steps differ in their drifts alone: sum_i E[(b_i - b'_i)^2] dt / (2 sigma^2), the mean over the first one's A_i.
    """
    dt, total = 1 / euler_steps, 0.0
    steps = gaussian_steps(target, euler_steps, noise_scale)
    for i in range(euler_steps):
        gain, offset = gaussian_drift(target, i * dt, noise_scale)
        other_gain, other_offset = gaussian_drift(other, i * dt, noise_scale)
        mean = (gain - other_gain) * steps.means[i] + offset - other_offset
        spread = (gain - other_gain) * steps.stds[i]
        total += (mean**2 + spread**2) * dt / (2 * noise_scale**2)
    return float(total)


def divergence_of_steps(target: Mixture, steps: int) -> float:
    """KL (nats a dimension) from the target of what K deterministic steps make of noise.

    In closed form for a Gaussian; else by quadrature over the noise, for the map of one dimension is increasing and its
    slope is known by differences.
    """
    if len(target.weights) == 1:
        ends = gaussian_steps(target, steps, 0.0)
        return gaussian_divergence(ends.means[-1], ends.stds[-1], target.means[0], target.stds[0])
    start = np.linspace(-7, 7, 200_001)
    noise = torch.zeros(1 + steps, len(start), 1, dtype=torch.float64)
    noise[0, :, 0] = torch.from_numpy(start)
    latents = follow(exact_policy(target, 1, steps, 1.0, drift=False), noise)[1].latent[:, 0]
    slope = np.gradient(latents.numpy(), start)
    mass = np.exp(-0.5 * start**2) / math.sqrt(2 * math.pi)
    own = -0.5 * start**2 - 0.5 * math.log(2 * math.pi) - np.log(np.abs(slope))
    total = np.sum(mass * (own - target.log_density(latents).numpy())) * (start[1] - start[0])
    return float(total)
