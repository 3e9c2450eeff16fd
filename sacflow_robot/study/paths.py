"""The rollout's path, and the noise that makes a given path: what checks of the path density are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import Rollout


def follow(policy: FlowPolicy, noise: Tensor) -> tuple[Tensor, Rollout]:
    """Latents A_0 ... A_K (K + 1, B, D) of the rollout that noise (1 + K, B, D) drives, and the rollout."""
    latents: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        latents.append(args[1])

    hook = policy.velocity.register_forward_pre_hook(note)
    try:
        rollout = policy.rollout(noise.new_zeros(noise.shape[1], 1), noise)
    finally:
        hook.remove()
    return torch.stack([*latents, rollout.latent]), rollout


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
