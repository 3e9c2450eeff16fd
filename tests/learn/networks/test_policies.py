import numpy as np
import pytest
import torch

from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.critic import Critic, aggregate
from sacflow_robot.learn.networks.policies import QC, GaussianPolicy, OneStepPolicy, pick_best, repeat_rows
from sacflow_robot.learn.networks.policy import squash

SMALL = FlowConfig(width=16, depth=2, gate_width=8)


def test_density_of_a_gaussian_sums_to_one_over_actions() -> None:
    """In one dimension, by the noise that leads to each action; the clipped ends of the action range aside."""
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 1, SMALL).double()
    eps = torch.linspace(-8, 8, 4001, dtype=torch.float64)[None, :, None]
    rollout = policy.rollout(torch.ones(4001, 2, dtype=torch.float64), eps)
    unclipped = rollout.latent.tanh() / 0.95
    total = torch.trapezoid(rollout.log_prob.exp(), unclipped[:, 0])
    assert total.item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(rollout.action, squash(rollout.latent))


def test_a_gaussian_plays_its_mean_and_its_entropy_is_its_width() -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 3, SMALL)
    observation = torch.randn(5, 2)
    assert torch.equal(policy(observation, torch.randn(5, 3)), policy(observation, torch.randn(5, 3)))
    rollout = policy.rollout(observation, torch.zeros(1, 5, 3))
    torch.testing.assert_close(rollout.action, policy(observation, torch.zeros(5, 3)))
    mean, log_std = policy._moments(observation)
    samples = policy.sample(observation[:1].expand(20_000, 2), torch.Generator().manual_seed(1)).latent
    torch.testing.assert_close(samples.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0).log(), log_std[0], atol=0.05, rtol=0)
    assert policy.reference_entropy == 0.0


def test_a_one_step_policy_has_no_density() -> None:
    policy = OneStepPolicy(2, 3, SMALL)
    noise = torch.randn(4, 3)
    rollout = policy.rollout(torch.zeros(4, 2), noise[None])
    assert torch.equal(rollout.action, policy(torch.zeros(4, 2), noise)) and not rollout.log_prob.any()


def test_candidates_are_samples_of_the_policy_and_the_first_is_its_own() -> None:
    torch.manual_seed(0)
    policy, critic = FlowPolicy("flow-g", 2, 6, SMALL), Critic(2, 6, 16, 2, 3)
    best = QC(policy, critic, 8, "min")
    observation, noise = torch.randn(4, 2), torch.randn(4, 6)
    starts = (noise @ best.turns).reshape(4, 8, 6)
    torch.testing.assert_close(starts.norm(dim=-1), noise.norm(dim=-1, keepdim=True).expand(4, 8))
    chunks, values = best.candidates(observation, noise)
    torch.testing.assert_close(chunks[:, 0], policy(observation, noise))
    assert (torch.cdist(chunks[0], chunks[0]) + torch.eye(8) > 1e-3).all(), "all of them differ"
    chosen = best(observation, noise)
    by_hand = aggregate(critic(observation, chosen), "min")
    torch.testing.assert_close(by_hand, values.amax(-1))
    many = (torch.randn(20_000, 6) @ best.turns).reshape(-1, 8, 6)
    for n in range(8):
        torch.testing.assert_close(torch.cov(many[:, n].T), torch.eye(6), atol=0.06, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_what_candidates_start_from_is_uncorrelated(dim: int) -> None:
    """Rotations drawn evenly have a mean of 0: on average candidates agree with the first by chance alone."""
    best = QC(FlowPolicy("mlp", 2, dim, SMALL), Critic(2, dim, 16, 2, 3), 400, "min")
    turns = best.turns.reshape(dim, 400, dim).permute(1, 0, 2)
    correlation = turns[1:].diagonal(dim1=1, dim2=2).sum(-1) / dim
    # The mean of 399 traces, each of variance 1, over D: three standard deviations.
    assert abs(correlation.mean().item()) < 3 / (dim * 399**0.5)
    assert len({tuple(np.round(turn.flatten().tolist(), 6)) for turn in turns}) == (2 if dim == 1 else 400)


def test_picking_rows() -> None:
    chunks = torch.arange(12.0).reshape(2, 3, 2)
    assert pick_best(chunks, torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])).tolist() == [[2, 3], [6, 7]]
    assert repeat_rows(torch.tensor([[1.0], [2.0]]), 2).flatten().tolist() == [1, 1, 2, 2]
