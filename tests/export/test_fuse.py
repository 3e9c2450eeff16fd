from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.bench.export import NaiveFlow
from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash, unsquash

OBSERVATION, H, A = 11, 3, 4
D = H * A
QUATERNIONS = (2, 7)
CONFIG = FlowConfig(width=32, depth=3, gate_width=16, euler_steps=4)


def make_policy(velocity: VelocityName, quaternions: tuple[int, ...] = QUATERNIONS) -> FlowPolicy:
    """Untrained, with no bias, norm or head left at the zero or one where it starts."""
    torch.manual_seed(3)
    policy = FlowPolicy(velocity, OBSERVATION, D, CONFIG, quaternions).requires_grad_(False).eval()
    for parameter in policy.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    policy.fit_normalizer(
        torch.randn(100, OBSERVATION) * torch.linspace(0.02, 2, OBSERVATION) + torch.linspace(-1, 1, OBSERVATION)
    )
    return policy


def observations(batch: int) -> torch.Tensor:
    """With entries beyond the normalizer's limit, and a quaternion that is none."""
    seen = torch.randn(batch, OBSERVATION, generator=torch.Generator().manual_seed(batch)) * 2
    seen[0, 0], seen[-1, QUATERNIONS[0] : QUATERNIONS[0] + 4] = 1e3, 0
    return seen


@pytest.mark.parametrize("quaternions", [(), QUATERNIONS])
@pytest.mark.parametrize("velocity", get_args(VelocityName))
def test_the_same_function(velocity: VelocityName, quaternions: tuple[int, ...]) -> None:
    policy = make_policy(velocity, quaternions)
    for steps in (1, 4, 8):
        policy.euler_steps = steps
        folded, for_prefix = policy.twin(prefix=False), policy.twin(prefix=True)
        for batch in (1, 7, 64):
            seen, noise = observations(batch), torch.randn(batch, D)
            expected, nothing = policy(seen, noise), torch.zeros(batch, D)
            torch.testing.assert_close(folded(seen, noise), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(for_prefix(seen, noise, nothing + 0.5, nothing), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(folded.normalize(seen), policy.normalize(seen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("velocity", get_args(VelocityName))
def test_the_networks_as_published_are_the_same_function_too(velocity: VelocityName) -> None:
    policy = make_policy(velocity)
    naive, seen, noise = NaiveFlow(policy).eval(), observations(7), torch.randn(7, D)
    torch.testing.assert_close(naive(seen, noise), policy(seen, noise), atol=1e-5, rtol=0)


def by_hand(
    policy: FlowPolicy, seen: torch.Tensor, noise: torch.Tensor, prefix: torch.Tensor, held: torch.Tensor
) -> torch.Tensor:
    """The rollout with committed entries put on the straight path before every step, as the scheme is published."""
    goal, latent, k = unsquash(prefix.clamp(-1, 1)), noise, policy.euler_steps
    context = policy.velocity.encode(policy.normalize(seen))
    for i in range(k):
        on_path = (1 - i / k) * noise + i / k * goal
        latent = torch.where(held > 0, on_path, latent)
        latent = latent + policy.velocity(torch.full((1, 1), i / k), latent, context) / k
    return torch.where(held > 0, prefix, squash(latent))


@settings(max_examples=25)
@given(
    st.sampled_from(get_args(VelocityName)),
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=H, max_size=H), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_what_is_committed_comes_back_and_the_rest_flows_beside_it(
    velocity: VelocityName, masks: list[list[float]], seed: int
) -> None:
    policy = make_policy(velocity)
    batch, drawn = len(masks), torch.Generator().manual_seed(seed)
    seen = torch.randn(batch, OBSERVATION, generator=drawn)
    noise, prefix = (torch.randn(batch, D, generator=drawn) for _ in range(2))
    held = torch.tensor(masks).repeat_interleave(A, 1)
    chunk = policy.twin(prefix=True)(seen, noise, prefix, held)
    assert torch.equal(chunk[held == 1], prefix[held == 1])
    torch.testing.assert_close(chunk, by_hand(policy, seen, noise, prefix, held), atol=2e-5, rtol=0)


def test_the_rest_of_a_chunk_depends_on_what_is_committed() -> None:
    policy = make_policy("flow-g")
    folded, held = policy.twin(prefix=True), torch.zeros(1, D)
    held[:, :A] = 1
    seen, noise = torch.randn(1, OBSERVATION), torch.randn(1, D)
    low, high = (folded(seen, noise, torch.full((1, D), value), held) for value in (-0.9, 0.9))
    assert (low - high)[:, A:].abs().max() > 1e-3
