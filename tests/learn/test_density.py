import math

import pytest
import torch
from torch import Tensor

from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.density import exact_log_density
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash, squash_log_det
from sacflow_robot.learn.networks.velocity import VELOCITIES, Velocity


class Linear(Velocity):
    """v = M A."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return action @ self.matrix.T


def test_a_linear_flow_makes_the_gaussian_that_it_should() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64) / 2
    policy = FlowPolicy("mlp", 2, 3, FlowConfig(width=8, depth=1, euler_steps=4)).double()
    policy.velocity = Linear(matrix)
    latent, log_prob = exact_log_density(policy, torch.zeros(10, 2), torch.randn(10, 3, dtype=torch.float64))
    whole = torch.linalg.matrix_power(torch.eye(3) + matrix / 4, 4)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), whole @ whole.T)
    torch.testing.assert_close(log_prob, gaussian.log_prob(latent) - squash_log_det(latent))


@pytest.mark.parametrize("name", sorted(VELOCITIES))
def test_the_density_of_every_velocity_sums_to_one(name: str) -> None:
    """In one dimension: the latents of a fine grid of noise, in order, with their densities in between."""
    torch.manual_seed(0)
    policy = FlowPolicy(name, 2, 1, FlowConfig(width=16, depth=2, gate_width=8, euler_steps=10)).double()
    noise = torch.linspace(-6, 6, 2001, dtype=torch.float64)[:, None]
    observation = torch.ones(2001, 2, dtype=torch.float64)
    with torch.no_grad():
        latent, log_prob = exact_log_density(policy, observation, noise)
        torch.testing.assert_close(squash(latent), policy(observation, noise))
    assert (latent.diff(dim=0) > 0).all(), "invertible"
    density = (log_prob + squash_log_det(latent)).exp()
    assert torch.trapezoid(density, latent[:, 0]).item() == pytest.approx(1, abs=1e-4)
    assert math.isfinite(float(log_prob.min()))
