"""The losses of SAC Flow (arXiv 2509.25756, section 4.3), top to bottom as the paper has them.

Shapes: observation (B, O) normalised where a critic takes it, raw where the policy does; chunk (B, D), D = H * A;
mask (B, D), 1 where the chunk's row belongs to the episode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacflow_robot.learn.flow import FlowPolicy, unsquash


def flow_matching_loss(
    policy: FlowPolicy, observation: Tensor, chunk: Tensor, mask: Tensor, generator: torch.Generator
) -> Tensor:
    """|| v(t, (1 - t) A_0 + t u) - (u - A_0) ||^2 with u the latent of the data, averaged over valid entries."""
    target = unsquash(chunk)
    noise = torch.randn(target.shape, generator=generator, device=target.device)
    time = torch.rand(len(target), 1, generator=generator, device=target.device)
    velocity = policy.velocity(
        time, (1 - time) * noise + time * target, policy.velocity.encode(policy.normalise(observation))
    )
    return masked_mean((velocity - (target - noise)).square(), mask)


def critic_target(reward: Tensor, discount: Tensor, next_value: Tensor, next_penalty: Tensor) -> Tensor:
    """sum_{j<H} gamma^j r_j + gamma^H mask (Q'(s', a') - alpha log p(a')), all (B,).

    ``reward`` already is the discounted sum and ``discount`` gamma^H times the mask; the discount is applied nowhere
    else. ``next_penalty`` is alpha log p, measured from the path entropy.
    """
    return reward + discount * (next_value - next_penalty)


def critic_loss(values: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared error of each critic (E, B) to the target (B,), averaged over windows that have a return."""
    error = (values - target).square() * valid
    return error.sum() / (valid.sum().clamp_min(1) * len(values))


def actor_loss(value: Tensor, penalty: Tensor, distance: Tensor, regularisation: float) -> Tensor:
    """alpha log p - Q(s, a) + beta R, averaged over the batch; all arguments (B,), or () for an R that is a mean already.

    R is ||a - a_data||^2 in the paper.
    """
    return (penalty - value + regularisation * distance).mean()


def chunk_distance(chunk: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """||a - b||^2 (B,): a sum over the chunk's dimensions, as in the paper, of its valid rows only."""
    return ((chunk - other).square() * mask).sum(-1)


def temperature_loss(log_temperature: Tensor, excess_log_prob: Tensor, target_entropy: float) -> Tensor:
    """alpha (H - H_target) by its gradient: entropy below the target raises alpha.

    ``excess_log_prob`` (B,) is log p plus the path entropy, and ``target_entropy`` is measured from that too.
    """
    entropy = -excess_log_prob.detach().mean()
    return log_temperature.exp() * (entropy - target_entropy)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the entries where mask is 1."""
    return (x * mask).sum() / mask.sum().clamp_min(1)
