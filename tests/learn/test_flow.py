import math
from dataclasses import replace
from typing import Any, get_args

import mujoco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy, path_entropy
from sacflow_robot.learn.networks.policy import rotation_matrix, squash, squash_log_det, squash_through, unsquash
from sacflow_robot.learn.networks.velocity import Velocity
from sacflow_robot.learn.presets import preset

CONFIG = FlowConfig(width=16, depth=2, gate_width=8, euler_steps=4, noise_scale=0.1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_what_is_fitted_is_what_is_played(values: list[float]) -> None:
    """A data action of 1, e.g. of a gripper, comes back as 1 and not as tanh(1) = 0.76."""
    action = torch.tensor(values)
    torch.testing.assert_close(squash(unsquash(action)), action, atol=1e-6, rtol=0)


def test_squashing_log_determinant_against_autograd() -> None:
    latent = torch.linspace(-4, 4, 9, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda u: u.tanh() / 0.95, latent).diagonal()
    torch.testing.assert_close(squash_log_det(latent[:, None]), jacobian.log())
    assert squash_log_det(torch.tensor([[50.0]])).isfinite().all()


def test_a_clipped_action_can_be_pulled_back() -> None:
    latent = torch.tensor([5.0], requires_grad=True)
    action = squash_through(latent)
    assert action.item() == pytest.approx(1, abs=1e-6)
    action.backward()
    assert latent.grad is not None and latent.grad.item() > 0


class Recorded(Velocity):
    """v = 0, noting what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: list[Tensor] = []
        self.times: list[float] = []

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        self.latents.append(action)
        self.times.append(time.item())
        return torch.zeros_like(action)


class Sigmas(nn.Module):
    """A given sigma for each of four steps."""

    def __init__(self, sigmas: list[float]) -> None:
        super().__init__()
        self._sigmas = sigmas

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return torch.full_like(action, math.log(self._sigmas[round(4 * time.item())]))


class Scaling(Velocity):
    """The exact flow-matching velocity from N(0, 1) to N(0, s^2): v = A (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2)."""

    def __init__(self, target_std: float) -> None:
        super().__init__()
        self._variance = target_std**2

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        t = time
        return action * (t * self._variance - (1 - t)) / ((1 - t) ** 2 + t**2 * self._variance)


def policy_with(velocity: nn.Module, dim: int = 3, **changes: Any) -> FlowPolicy:
    policy = FlowPolicy("mlp", 2, dim, replace(CONFIG, **changes))
    policy.velocity = velocity  # type: ignore[assignment]
    return policy


def test_path_density_by_hand() -> None:
    """log p from the visited points alone: Gaussian start, Gaussian steps around A + b dt, minus log |da/du|."""
    velocity = Recorded()
    policy = policy_with(velocity)
    rollout = policy.sample(torch.zeros(5, 2), torch.Generator().manual_seed(0))
    assert velocity.times == [0.0, 0.25, 0.5, 0.75]
    points = [*velocity.latents, rollout.latent]
    std = 0.1 * math.sqrt(0.25)
    by_hand = torch.distributions.Normal(0, 1).log_prob(points[0]).sum(-1)
    for t, here, there in zip(velocity.times, points[:-1], points[1:], strict=True):
        drift = 0.1**2 / 2 * (t * 0 - here) / (1 - t)
        by_hand += torch.distributions.Normal(here + drift * 0.25, std).log_prob(there).sum(-1)
    by_hand -= squash_log_det(points[-1])
    torch.testing.assert_close(rollout.log_prob, by_hand, atol=1e-4, rtol=0)


def test_the_last_step_alone_bounds_the_entropy_of_the_action() -> None:
    """A velocity that forgets everything before the last step: the path's entropy grows with noise that the action lacks."""

    class Forgetful(Recorded):
        def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
            super().forward(time, action, context)
            return -4 * action if time.item() == 0.75 else torch.zeros_like(action)

    def mean_entropies(sigma: float, last_sigma: float) -> tuple[float, float, float]:
        """What the last step counts, what the path counts, and the entropy of the latent that comes out (nats)."""
        found = {}
        for entropy in ("last-step", "path"):
            policy = policy_with(Forgetful(), dim=1, entropy=entropy, drift=False, noise="learned")
            policy.learned_noise = Sigmas([sigma, sigma, sigma, last_sigma])  # type: ignore[assignment]
            rollout = policy.sample(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
            before_squashing = rollout.log_prob + squash_log_det(rollout.latent)
            found[entropy] = -before_squashing.mean().item()
        action = 0.5 * math.log(2 * math.pi * math.e * rollout.latent.var().item())
        return found["last-step"], found["path"], action

    last, path, action = mean_entropies(0.2, 0.2)
    assert last == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.1**2), abs=0.02)
    assert last == pytest.approx(action, abs=0.02), "all that comes before is forgotten"
    parked, same_path, action = mean_entropies(2.0, 0.0002)
    assert same_path == pytest.approx(path, abs=0.02), "the same by the path"
    assert parked == pytest.approx(action, abs=0.02) and parked < last - 6, "next to no noise in the action"


def test_the_last_step_of_a_fixed_noise_is_measured_from_its_own_entropy() -> None:
    policy = policy_with(Recorded(), entropy="last-step")
    rollout = policy.sample(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
    excess = rollout.log_prob + squash_log_det(rollout.latent) + policy.reference_entropy
    assert excess.mean().item() == pytest.approx(0, abs=0.05)


def test_noise_is_fresh_for_every_step_row_and_dimension() -> None:
    """Noise from one key at every step is a constant offset; one scalar for a batch is no noise."""
    velocity = Recorded()
    policy = policy_with(velocity, noise_scale=1.0)
    rollout = policy.sample(torch.zeros(64, 2), torch.Generator().manual_seed(0))
    steps = torch.stack([*velocity.latents, rollout.latent]).diff(dim=0).flatten(1)
    correlation = torch.corrcoef(steps)
    assert (correlation - torch.eye(4)).abs().max() < 0.6
    assert len(steps.flatten().unique()) == steps.numel()


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_noise_augmented_rollout_keeps_the_marginal(sigma: float) -> None:
    """Paper, section 4.2: exact for a true flow-matching velocity in the limit of small steps."""
    target = 0.5
    policy = policy_with(Scaling(target), dim=1, euler_steps=400, noise_scale=sigma)
    with torch.no_grad():
        rollout = policy.sample(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
    assert rollout.latent.std().item() == pytest.approx(target, rel=0.03)
    assert rollout.latent.mean().item() == pytest.approx(0, abs=0.02)


class Wave(Velocity):
    """v = sin(2 A) + t, smooth and not linear."""

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return torch.sin(2 * action) + time


class WavySigma(nn.Module):
    """log sigma = -1 + cos(A) / 2 + t / 4."""

    def encode(self, observation: Tensor) -> Tensor:
        return observation

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return -1 + torch.cos(action) / 2 + time / 4


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_path_density_against_numerical_integration_in_one_dimension(learned: bool, drift: bool) -> None:
    """Three points A_0, A_1, A_2 on a grid: the density sums to 1, and its entropy is that of sampled paths."""
    sigma = 0.7
    policy = policy_with(Wave(), dim=1, euler_steps=2, noise_scale=sigma, drift=drift)
    if learned:
        policy.learned_noise = WavySigma()  # type: ignore[assignment]
    with torch.no_grad():
        rollout = policy.sample(torch.zeros(200_000, 2), torch.Generator().manual_seed(0))

    grid = np.linspace(-6, 6, 241)
    width = grid[1] - grid[0]

    def start(here: np.ndarray) -> np.ndarray:
        return -0.5 * here**2 - 0.5 * math.log(2 * math.pi)

    def step(t: float, here: np.ndarray, there: np.ndarray) -> np.ndarray:
        """log p(A' | A)."""
        v = np.sin(2 * here) + t
        std = np.exp(-1 + np.cos(here) / 2 + t / 4) if learned else np.full_like(here, sigma)
        mean = here + 0.5 * (v + (std**2 / 2 * (t * v - here) / (1 - t) if drift else 0))
        step_std = std * math.sqrt(0.5)
        return -0.5 * ((there - mean) / step_std) ** 2 - np.log(step_std * math.sqrt(2 * math.pi))

    on_grid = [step(t, grid[:, None], grid[None]) for t in (0.0, 0.5)]
    log_p = start(grid)[:, None, None] + on_grid[0][:, :, None] + on_grid[1][None]
    weight = np.exp(log_p) * width**3
    assert weight.sum() == pytest.approx(1, abs=1e-3)
    squashing = np.log((1 - np.tanh(grid) ** 2) / 0.95)
    assert rollout.log_prob.mean().item() == pytest.approx((weight * (log_p - squashing)).sum(), abs=0.02)
    assert rollout.latent.mean().item() == pytest.approx((weight.sum((0, 1)) * grid).sum(), abs=0.02)

    # The density that was found to sum to 1 is also the code's, path by path.
    noise = torch.randn(3, 50, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        middle, path = policy.rollout(torch.zeros(50, 2), noise[:2]).latent, policy.rollout(torch.zeros(50, 2), noise)
    a, b, c = (x[:, 0].double().numpy() for x in (noise[0], middle, path.latent))
    by_hand = start(a) + step(0.0, a, b) + step(0.5, b, c) - np.log((1 - np.tanh(c) ** 2) / 0.95)
    np.testing.assert_allclose(path.log_prob.numpy(), by_hand, atol=1e-4)


def test_without_the_drift_correction_noise_widens_the_marginal() -> None:
    widths = {}
    for drift in (True, False):
        policy = policy_with(Scaling(0.5), dim=1, euler_steps=400, noise_scale=0.5, drift=drift)
        with torch.no_grad():
            widths[drift] = policy.sample(torch.zeros(20_000, 2), torch.Generator().manual_seed(0)).latent.std().item()
    assert widths[True] == pytest.approx(0.5, rel=0.03) and widths[False] > 0.6


def test_a_learned_noise_scale_starts_as_configured_stays_bounded_and_gets_the_entropy_gradient() -> None:
    torch.manual_seed(0)
    policies = {noise: FlowPolicy("mlp", 2, 3, replace(CONFIG, noise=noise)) for noise in ("fixed", "learned")}
    policies["fixed"].velocity.load_state_dict(policies["learned"].velocity.state_dict())
    observation = torch.randn(16, 2)
    rollouts = {n: p.sample(observation, torch.Generator().manual_seed(1)) for n, p in policies.items()}
    torch.testing.assert_close(rollouts["fixed"].latent, rollouts["learned"].latent)
    torch.testing.assert_close(rollouts["fixed"].log_prob, rollouts["learned"].log_prob)
    head = policies["learned"].learned_noise
    assert head is not None
    rollouts["learned"].log_prob.sum().backward()
    assert (head.trunk.head.bias.grad < 0).all(), "a smaller log p, more entropy, means a larger sigma"
    with torch.no_grad():
        head.trunk.head.bias.fill_(99.0)
        assert head(torch.zeros(1, 1), torch.zeros(1, 3), head.encode(observation)).unique().tolist() == [2.0]
        assert torch.equal(
            policies["learned"](observation, torch.ones(16, 3)), policies["fixed"](observation, torch.ones(16, 3))
        )


def test_path_entropy_is_the_mean_negative_log_density() -> None:
    policy = policy_with(Recorded(), dim=3)
    rollout = policy.sample(torch.zeros(20_000, 2), torch.Generator().manual_seed(0))
    without_squash = -(rollout.log_prob + squash_log_det(rollout.latent)).mean().item()
    assert without_squash == pytest.approx(path_entropy(3, 4, 0.1), abs=0.05)
    assert path_entropy(35, 4, 0.1) < -170
    published = math.exp(-0.5 * math.log(2 * math.pi * math.e) * 5 / 4) * 2
    assert path_entropy(35, 4, published) == pytest.approx(0, abs=1e-9) and published == pytest.approx(0.34, abs=0.01)


def test_deterministic_rollout_is_the_noise_free_one_and_normalizes_inside() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy("flow-g", 2, 3, CONFIG)
    observations = torch.randn(500, 2) * torch.tensor([3.0, 0.0]) + 7
    policy.fit_normalizer(observations)
    normalized = policy.normalize(observations)
    assert normalized[:, 0].std().item() == pytest.approx(1, rel=0.01)
    assert normalized[:, 1].abs().max() < 1e-3, "a constant dimension is not blown up"
    assert policy.normalize(observations + 1e3).abs().max() == 10
    noise = torch.randn(4, 3)
    first, second = policy(observations[:4], noise), policy(observations[:4], noise)
    assert torch.equal(first, second) and first.abs().max() <= 1


@pytest.mark.parametrize("velocity", get_args(VelocityName))
def test_what_is_played_from_scratch_is_what_is_trained_without_the_noise(velocity: VelocityName) -> None:
    """The drift's correction has no part in it: with one, and a large sigma, another policy is trained than is exported."""
    torch.manual_seed(0)
    config = preset("Hopper-v5", velocity, from_scratch=True)
    noise = torch.zeros(1 + config.flow.euler_steps, 8, 3)
    noise[0].normal_()
    actions = {}
    for drift in (False, True):
        policy = FlowPolicy(velocity, 2, 3, replace(config.flow, drift=drift, noise_scale=2.0))
        trained = policy.rollout(torch.zeros(8, 2), noise).action
        actions[drift] = (trained - policy(torch.zeros(8, 2), noise[0])).abs().max().item()
    assert not config.flow.drift and actions[False] < 1e-6 < 0.05 < actions[True]


def test_what_random_actions_showed_does_not_bound_what_is_seen_later() -> None:
    """Hopper's height while it falls, 1.25 +- 0.02 m, and where it is when it has learned to hop."""
    policy = FlowPolicy("flow-g", 1, 3, CONFIG)
    heights = torch.linspace(1.21, 1.29, 50)[:, None]
    policy.fit_normalizer(heights, early=True)
    later = policy.normalize(torch.tensor([[0.8], [1.25], [1.5]]))
    assert later.squeeze().tolist() == pytest.approx([-4.5, 0, 2.5], abs=1e-3)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_rotation_matrices_turn_vectors_as_the_quaternions_do(seed: int) -> None:
    x, y, z, w, *vector = np.random.default_rng(seed).normal(size=7)
    expected = np.zeros(3)
    mujoco.mju_rotVecQuat(expected, np.array(vector), np.array([w, x, y, z]) / np.linalg.norm([w, x, y, z]))
    matrix = rotation_matrix(torch.tensor([[x, y, z, w]], dtype=torch.float64)).numpy().reshape(3, 3)
    assert matrix @ vector == pytest.approx(expected, abs=1e-12)


def test_a_quaternion_and_its_negative_are_one_rotation_to_the_policy() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy("flow-g", 9, 4, CONFIG, quaternions=(2,))
    one = torch.randn(6, 9)
    policy.fit_normalizer(one)
    other = one.clone()
    other[:, 2:6] *= -1
    noise = torch.randn(6, 4)
    assert torch.equal(policy(one, noise), policy(other, noise))
    other[:, 2] += 0.5
    assert not torch.equal(policy(one, noise), policy(other, noise))
    features = policy.normalize(one)
    assert features.shape == (6, policy.feature_dim) == (6, 5 + 9)
    assert torch.allclose(features[:, :5].mean(0), torch.zeros(5), atol=1e-6)
    assert policy(torch.zeros(1, 9), noise[:1]).isfinite().all(), "a quaternion of zeros is no rotation, and no NaN"
