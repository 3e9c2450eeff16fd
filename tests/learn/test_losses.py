from collections.abc import Callable

import numpy as np
import pytest
import torch

from sacflow_robot.data.replay_buffer import ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.learn import losses
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import unsquash
from sacflow_robot.spec import RobotSpec


def test_temperature_rises_when_entropy_is_below_target() -> None:
    for entropy, target, rises in ((-50.0, -35.0, True), (-20.0, -35.0, False)):
        log_temperature = torch.tensor(-5.0, requires_grad=True)
        losses.temperature_loss(log_temperature, torch.full((8,), -entropy), target).backward()
        assert log_temperature.grad is not None
        assert (log_temperature.grad.item() < 0) == rises


def test_critic_target_by_hand() -> None:
    """H = 2, gamma = 0.9: r_0 + 0.9 r_1 + 0.81 (Q' - alpha log p), and nothing after success."""
    reward = torch.tensor([0.5 + 0.9 * 2.0, 1.0])
    discount = torch.tensor([0.81, 0.0])
    target = losses.td_target(reward, discount, torch.tensor([3.0, 99.0]), torch.tensor([0.2, 99.0]))
    assert target.tolist() == pytest.approx([2.3 + 0.81 * 2.8, 1.0])


def test_critic_loss_skips_windows_without_return() -> None:
    values = torch.tensor([[1.0, 50.0], [3.0, -50.0]])
    loss = losses.critic_loss(values, torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert loss.item() == 1.0
    assert losses.critic_loss(values, torch.zeros(2), torch.zeros(2)).item() == 0.0


def test_distance_to_data_is_a_sum_over_valid_dimensions() -> None:
    """Traps 6 and 8."""
    distance = losses.chunk_distance(
        torch.tensor([[1.0, 0.0, 5.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]])
    )
    assert distance.tolist() == [1.0]
    assert losses.chunk_distance(torch.ones(1, 35), torch.zeros(1, 35), torch.ones(1, 35)).tolist() == [35.0]


def test_actor_loss_by_hand() -> None:
    loss = losses.actor_loss(torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]), 0.1)
    assert loss.item() == pytest.approx(-3 + 0.5 + 0.2)


def test_flow_matching_loss_ignores_invalid_rows_and_fits_the_played_action() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy("mlp", 2, 4, FlowConfig(width=64, depth=2))
    observation = torch.zeros(256, 2)
    chunk = torch.tensor([1.0, -1.0, 0.3, 0.0]).expand(256, 4)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(256, 4)

    def loss(data: torch.Tensor) -> torch.Tensor:
        drawn = losses.draw_flow_matching(data, torch.Generator().manual_seed(1))
        return losses.flow_matching_loss(policy, observation, data, mask, *drawn)

    # The last dimension is invalid: changing its data may change the network's input, never the target.
    changed = chunk.clone()
    changed[:, 3] = 0.9
    policy.velocity.trunk.from_action.weight.data[:, 3] = 0  # type: ignore[union-attr]
    assert torch.equal(loss(chunk), loss(changed))

    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(800):
        optimizer.zero_grad()
        drawn = losses.draw_flow_matching(chunk, generator)
        losses.flow_matching_loss(policy, observation, chunk, torch.ones_like(mask), *drawn).backward()
        optimizer.step()
    with torch.no_grad():
        played = policy(observation, torch.randn(256, 4))
    assert played.mean(0).tolist() == pytest.approx([1.0, -1.0, 0.3, 0.0], abs=0.06)
    assert unsquash(torch.tensor(1.0)).isfinite()


def test_chunked_targets_by_hand_around_the_ends_of_episodes(
    make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    """H = 3, gamma = 0.5, reward 1 at the last step, value 8 everywhere: what each window's critic is fitted to."""
    expected = {
        # steps of the episode, success: (target, whether it counts) from the first window on
        (5, True): [(0 + 8 / 8, True), (0 + 8 / 8, True), (0.25, True), (0.5, True), (1.0, True)],
        (5, False): [(1.0, True), (1.0, True), (1.0, True), (None, False), (None, False)],
        (2, True): [(0.5, True), (1.0, True)],
        (2, False): [(None, False), (None, False)],
    }
    for (steps, success), windows in expected.items():
        buffer = ReplayBuffer(robot, 3, 0.5, 50)
        buffer.append(make_episode(steps, success=success))
        batch = buffer.sample(200, np.random.default_rng(0))
        starts = batch.observation[:, 0].astype(int)
        target = losses.td_target(
            torch.from_numpy(batch.reward), torch.from_numpy(batch.discount), torch.full((200,), 8.0), torch.zeros(200)
        )
        assert set(starts) == set(range(steps))
        for start, value, counts in zip(starts, target.tolist(), batch.critic_valid, strict=True):
            by_hand, valid = windows[start]
            assert counts == valid and (by_hand is None or value == pytest.approx(by_hand))


def test_distances_and_losses_leave_out_what_is_behind_an_episodes_end(
    make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    buffer = ReplayBuffer(robot, 3, 0.5, 50)
    buffer.append(make_episode(2))
    batch = buffer.sample(50, np.random.default_rng(0))
    chunk = torch.from_numpy(batch.actions).flatten(1)
    mask = torch.from_numpy(batch.valid).float().repeat_interleave(7, 1)
    assert mask.sum(-1).unique().tolist() == [7.0, 14.0]
    torch.testing.assert_close(losses.chunk_distance(chunk + 1, chunk, mask), mask.sum(-1))
    wild = torch.where(mask == 1, chunk, torch.full_like(chunk, 50.0))
    torch.testing.assert_close(losses.chunk_distance(wild, chunk, mask), torch.zeros(50))
