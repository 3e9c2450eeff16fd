from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sacflow_robot.data.replay import ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.spec import ArmSpec

MakeEpisode = Callable[..., Episode]
H, GAMMA = 5, 0.9
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


@relaxed
@given(episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12))
def test_windows_stay_within_their_episode_and_the_ring(
    make_episode: MakeEpisode, arm: ArmSpec, episodes: list[tuple[int, bool]]
) -> None:
    made = [make_episode(steps, success=success, seed=i) for i, (steps, success) in enumerate(episodes)]
    buffer = ReplayBuffer(arm, H, GAMMA, capacity=30)
    for episode in made:
        buffer.append(episode)
    assert 0 < len(buffer) <= 30
    batch = buffer.sample(200, np.random.default_rng(0))
    for row in range(200):
        start, which = int(batch.observation[row, 0]), int(batch.observation[row, 1])
        episode = made[which]
        valid = min(H, len(episode) - start)
        assert batch.valid[row].tolist() == [j < valid for j in range(H)]
        assert np.array_equal(batch.actions[row, :valid], episode.commanded[start : start + valid])
        assert (np.abs(batch.actions[row, valid:]) <= 1).all()
        assert batch.next_observation[row, 0] == start + valid
        assert batch.next_observation[row, 1] == which
        reaches_end = start + valid == len(episode)
        assert batch.critic_valid[row] == (episode.success or valid == H)
        # The discount once in the reward sum, once in the bootstrap, and no bootstrap after success.
        expected = GAMMA ** (len(episode) - 1 - start) if episode.success and reaches_end else 0.0
        assert batch.reward[row] == pytest.approx(expected)
        assert batch.discount[row] == pytest.approx(0.0 if episode.success and reaches_end else GAMMA**valid)


def test_every_step_is_drawn_and_the_oldest_episodes_leave_first(make_episode: MakeEpisode, arm: ArmSpec) -> None:
    buffer = ReplayBuffer(arm, H, GAMMA, capacity=20)
    for seed in range(4):
        buffer.append(make_episode(8, seed=seed))
    batch = buffer.sample(2000, np.random.default_rng(1))
    drawn = {(int(o[1]), int(o[0])) for o in batch.observation}
    assert drawn == {(seed, step) for seed in (2, 3) for step in range(8)}
    assert buffer.episode_count == 2


def test_filler_after_the_end_is_random(make_episode: MakeEpisode, arm: ArmSpec) -> None:
    buffer = ReplayBuffer(arm, H, GAMMA, capacity=20)
    buffer.append(make_episode(1))
    batch = buffer.sample(50, np.random.default_rng(1))
    assert len(np.unique(batch.actions[:, 1, 0])) == 50


def test_going_on_from_a_saved_state_draws_the_same(make_episode: MakeEpisode, arm: ArmSpec) -> None:
    first, second = (ReplayBuffer(arm, H, GAMMA, capacity=40) for _ in range(2))
    for seed in range(6):
        first.append(make_episode(9, seed=seed, success=seed % 2 == 0))
    second.load_state_dict(first.state_dict())
    for buffer in (first, second):
        buffer.append(make_episode(7, seed=9))
    a, b = (buffer.sample(64, np.random.default_rng(3)) for buffer in (first, second))
    for name in vars(a):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_actions_beyond_the_bounds_are_refused(make_episode: MakeEpisode, arm: ArmSpec) -> None:
    episode = make_episode(3)
    buffer = ReplayBuffer(arm, H, GAMMA, capacity=5)
    with pytest.raises(DataError, match="beyond the arm's bounds"):
        buffer.append(replace(episode, commanded=episode.proposed))


def test_bad_use(make_episode: MakeEpisode, arm: ArmSpec) -> None:
    buffer = ReplayBuffer(arm, H, GAMMA, capacity=5)
    with pytest.raises(DataError, match="empty"):
        buffer.sample(1, np.random.default_rng(0))
    with pytest.raises(DataError, match="empty"):
        buffer.observations()
    with pytest.raises(UsageError, match="6 steps does not fit a replay buffer of 5"):
        buffer.append(make_episode(6))
