"""The flow policy: rollout of K Euler steps, and its noise-augmented path density.

Flow time runs from t = 0 (Gaussian noise) to t = 1 (action). The flow lives in the latent space of learn/networks/policy.py.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.networks.folded import FoldedFlow
from sacflow_robot.learn.networks.policy import PolicyNetwork, Rollout, squash, squash_log_det, squash_through
from sacflow_robot.learn.networks.velocity import NoiseScale, make_velocity, normalize_weights


def path_entropy(dim: int, euler_steps: int, noise_scale: float) -> float:
    """Differential entropy (nats) of the noise path, before squashing.

    D/2 log(2 pi e) (1 + K) + K D log(sigma sqrt(1/K)): with a fixed sigma this does not depend on the policy. It is
    the reference that log-probabilities are measured from; the absolute number (below -170 nats at D = 35, K = 4,
    sigma = 0.1) would act as a constant penalty on every step and no target entropy near 0 could be reached. With a
    learned sigma it is the entropy that a rollout with a fixed one of ``noise_scale`` would have, and so says in terms of
    a noise scale how much entropy is asked for; at K = 4 a sigma of 0.34 makes it 0, the published target.
    """
    start = 0.5 * dim * math.log(2 * math.pi * math.e)
    return start + euler_steps * step_entropy(dim, euler_steps, noise_scale)


def step_entropy(dim: int, euler_steps: int, noise_scale: float) -> float:
    """Differential entropy (nats) of the noise of one Euler step, D/2 log(2 pi e) + D log(sigma sqrt(1/K))."""
    return dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(noise_scale / math.sqrt(euler_steps)))


class FlowPolicy(PolicyNetwork):
    """Flow policy: K Euler steps from noise to action.

    Args:
        velocity: Name of the velocity network.
        observation_dim: O, flattened.
        action_dim: D = H * A.
        config: Sizes, K and sigma.
        quaternions: Where in the observation a unit quaternion starts.
    """

    def __init__(
        self,
        velocity: str,
        observation_dim: int,
        action_dim: int,
        config: FlowConfig,
        quaternions: Sequence[int] = (),
    ) -> None:
        super().__init__(observation_dim, action_dim, quaternions)
        self.velocity = make_velocity(velocity, self.feature_dim, action_dim, config)
        self.name = velocity
        self.euler_steps = config.euler_steps
        self.noise_scale = config.noise_scale
        self._last_step_only = config.entropy == "last-step"
        reference = step_entropy if self._last_step_only else path_entropy
        self.reference_entropy = reference(action_dim, config.euler_steps, config.noise_scale)
        self._drift = config.drift
        self.learned_noise: NoiseScale | None = None
        if config.noise == "learned":
            self.learned_noise = NoiseScale(self.feature_dim, action_dim, config.gate_width, config.noise_scale)
        if config.weight_norm:
            normalize_weights(self.velocity)

    @property
    def noise_count(self) -> int:
        return 1 + self.euler_steps

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Deterministic rollout: actions (B, D) for raw observations (B, O) and noise A_0 (B, D)."""
        context = self.velocity.encode(self.normalize(observation))
        latent, dt = noise, 1.0 / self.euler_steps
        for i in range(self.euler_steps):
            latent = latent + self.velocity(_time(i * dt, latent), latent, context) * dt
        return squash(latent)

    def twin(self, *, prefix: bool) -> FoldedFlow:
        return FoldedFlow(self, self.velocity, with_prefix=prefix)

    def rollout(self, observation: Tensor, noise: Tensor) -> Rollout:
        """Noise-augmented rollout with its path density (paper, section 4.2).

        A_{i+1} = A_i + b dt + sigma sqrt(dt) eps,  b = v + (sigma^2 / 2) (t v - A) / (1 - t).
        The drift keeps the marginals of the deterministic flow while v is a true flow-matching velocity and sigma does not
        depend on A; for a learned sigma(t, A, s) this is the published formula, which leaves out the term
        1/2 d(sigma^2)/dA that exact marginals need (Fokker-Planck). Without the correction b = v.
        log p = log N(A_0; 0, I) + sum_i log N(A_{i+1}; A_i + b dt, sigma^2 dt I) - log |da/du|.
        ``noise`` (1 + K, B, D) holds A_0 and one eps a step.

        With sigma fixed, the Gaussian terms do not depend on the policy: the gradient of log p reaches the velocity
        through the squashing alone, where it penalizes saturation. With sigma(t, A, s) learned, -log p is an entropy that
        the policy can raise and lower by its noise. That of the path bounds the action's from neither side: noise of the
        first steps counts in full however little of it the velocity passes on. With ``entropy`` "last-step" log p is
        log p(a | A_{K-1}, s), the last term of the sum and the squashing: on average -log p is then the conditional
        entropy H(a | A_{K-1}, s), which is at most H(a | s), for conditioning takes entropy away.
        """
        features = self.normalize(observation)
        context = self.velocity.encode(features)
        noise_context = None if self.learned_noise is None else self.learned_noise.encode(features)
        dt = 1.0 / self.euler_steps
        latent, *steps = noise.unbind(0)
        log_prob = _standard_normal_log_prob(latent)
        for i, eps in enumerate(steps):
            t = i * dt
            time = _time(t, latent)
            v = self.velocity(time, latent, context)
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
            step_log_prob = _standard_normal_log_prob(eps) - log_scale
            log_prob = step_log_prob if self._last_step_only else log_prob + step_log_prob
        return Rollout(squash_through(latent), latent, log_prob - squash_log_det(latent))


def _time(value: float, like: Tensor) -> Tensor:
    return torch.full((1, 1), value, dtype=like.dtype, device=like.device)


def _standard_normal_log_prob(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)
