"""Closed forms against hand-computed numbers and against each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sacflow_robot.learn.networks.policy import squash_log_det
from sacflow_robot.study.targets import (
    GAUSSIAN,
    MIXTURE,
    Mixture,
    exact_policy,
    follow,
    gaussian_divergence,
    gaussian_drift,
    gaussian_steps,
    noise_of,
    path_divergence,
    path_log_density,
)


def test_the_divergence_of_gaussians_by_hand() -> None:
    assert gaussian_divergence(0, 1, 0, 1) == 0
    assert gaussian_divergence(1, 1, 0, 1) == 0.5  # half the squared distance of the means
    assert gaussian_divergence(0, 2, 0, 1) == pytest.approx(0.5 * (4 - 1 - math.log(4)))  # 0.80685
    assert gaussian_divergence(0, 1, 0, 2) == pytest.approx(math.log(2) - 3 / 8)  # 0.31815


def test_the_density_of_a_mixture_by_hand() -> None:
    target = Mixture("two", (0.25, 0.75), (-1.0, 1.0), (1.0, 0.5))
    # At 1: 0.25 N(2; 0, 1) + 0.75 N(0; 0, 0.25) = 0.25 * 0.053991 + 0.75 * 0.797885
    assert target.density(np.array(1.0)) == pytest.approx(0.611911, abs=1e-6)
    assert target.log_density(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(
        math.log(0.611911), abs=1e-5
    )
    assert Mixture("one", (1.0,), (3.0,), (0.5,)).quantiles(np.array([0.5, 0.841345])) == pytest.approx(
        [3, 3.5], abs=1e-3
    )
    x = np.linspace(-4, 4, 4001)
    assert np.sum(MIXTURE.density(x)) * (x[1] - x[0]) == pytest.approx(1)


def test_the_velocity_of_a_gaussian_by_hand() -> None:
    # N(2, 0.5^2) at t = 0.5: x_t ~ N(1, 0.3125), and E[x_1 - x_0 | x] = 2 + (0.125 - 0.5) / 0.3125 (x - 1)
    target = Mixture("one", (1.0,), (2.0,), (0.5,))
    got = target.velocity(torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert got.tolist() == [[pytest.approx(2.0), pytest.approx(2 - 1.2)]]
    gain, offset = gaussian_drift(target, 0.5, 0.0, drift=False)
    assert (gain + offset, 2 * gain + offset) == (pytest.approx(2.0), pytest.approx(0.8))


def test_the_velocity_of_a_mixture_is_the_mean_of_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    component = rng.random(2_000_000) < MIXTURE.weights[0]
    end = np.where(component, MIXTURE.means[0], MIXTURE.means[1]) + np.where(
        component, *MIXTURE.stds
    ) * rng.standard_normal(2_000_000)
    start, t = rng.standard_normal(2_000_000), 0.6
    near = np.abs((1 - t) * start + t * end - 0.1) < 0.01
    got = MIXTURE.velocity(torch.tensor([[t]], dtype=torch.float64), torch.tensor([[0.1]], dtype=torch.float64)).item()
    assert got == pytest.approx((end - start)[near].mean(), abs=4 * (end - start)[near].std() / math.sqrt(near.sum()))


@given(st.integers(1, 12), st.floats(0.05, 1.0), st.booleans())
def test_the_recursion_of_a_gaussian_meets_the_rollout(steps: int, sigma: float, drift: bool) -> None:
    """The rollout is affine in its noise, so that a few paths give its mean and spread without sampling."""
    policy = exact_policy(GAUSSIAN, 1, steps, sigma, drift=drift)
    unit = torch.cat([torch.zeros(1, 1 + steps), torch.eye(1 + steps)]).double()
    ends = follow(policy, unit.T.unsqueeze(-1))[0][-1, :, 0].numpy()
    expected = gaussian_steps(GAUSSIAN, steps, sigma, drift=drift)
    assert ends[0] == pytest.approx(expected.means[-1], abs=1e-9)
    assert np.sqrt(((ends[1:] - ends[0]) ** 2).sum()) == pytest.approx(expected.stds[-1], abs=1e-9)


def test_one_step_of_the_path_divergence_by_hand() -> None:
    # K = 1, sigma = 0.5: the step starts at t = 0 from N(0, 1). b = m - x - sigma^2 / 2 x, so that drifts differ by the
    # means alone: (0.4 - 0.2)^2 / (2 * 0.25) = 0.08.
    other = Mixture("other", (1.0,), (0.2,), (0.9,))
    assert path_divergence(GAUSSIAN, other, 1, 0.5) == pytest.approx(0.08)


@pytest.mark.parametrize("target", [GAUSSIAN, MIXTURE], ids=lambda t: t.name)
def test_noise_is_got_back_from_its_path(target: Mixture) -> None:
    policy = exact_policy(target, 2, 5, 0.3)
    noise = torch.randn(6, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path, rollout = follow(policy, noise)
    assert torch.allclose(noise_of(policy, path), noise, atol=1e-9)
    assert torch.allclose(path_log_density(policy, path), rollout.log_prob, atol=1e-8)
    assert squash_log_det(rollout.latent).shape == (7,)
