"""Density of the deterministic flow by change of variables: an independent check of the noise-augmented one."""

import math

import torch
from torch import Tensor

from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash_log_det


def exact_log_density(policy: FlowPolicy, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, D) that K deterministic Euler steps make of noise A_0 (B, D), and log p of their actions (B,).

    log p(a) = log N(A_0; 0, I) - sum_i log |det(I + dt dv/dA at step i)| - log |da/du|, where the squashing's part
    holds inside the action bounds. Each step has to be invertible, which an Euler step of a smooth velocity is if K is
    large enough; the Jacobians cost D backward passes a step, fine up to some tens of dimensions.
    """
    context = policy.velocity.encode(policy.normalize(observation))
    dt = 1.0 / policy.euler_steps
    latent = noise
    log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
    for i in range(policy.euler_steps):
        time = torch.full((1, 1), i * dt, dtype=noise.dtype, device=noise.device)

        def step(a: Tensor, c: Tensor, time: Tensor = time) -> Tensor:
            out: Tensor = policy.velocity(time, a.unsqueeze(0), c.unsqueeze(0))
            return a + out.squeeze(0) * dt

        jacobian = torch.func.vmap(torch.func.jacrev(step))(latent, context)
        latent = torch.func.vmap(step)(latent, context)
        log_prob = log_prob - torch.linalg.slogdet(jacobian).logabsdet
    return latent, log_prob - squash_log_det(latent)
