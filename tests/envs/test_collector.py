"""Rollouts on real simulators in processes of their own."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from sacflow_robot.envs.collector import Rollouts, rollout
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.vector import make_vector_env
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.utils.seeding import chunk_noise

SHAPE = (5, 7)


@pytest.fixture(scope="module", params=["stock", "compiled"])
def envs(request: pytest.FixtureRequest) -> Iterator[VectorEnv]:
    with make_vector_env("lift", 2, request.param) as made:
        assert made.engine == request.param
        yield made


def choose(observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
    """A policy that depends on observation and noise, so that a mix-up between robots would show."""
    return np.clip(0.5 * noise + observation["object"][:, None, 7:8], -1, 1).astype(np.float32)


def test_an_episode_depends_on_its_seed_alone(envs: VectorEnv, env: RobosuiteEnv) -> None:
    rollouts = Rollouts(envs, SHAPE, [3, 4, 5])
    assert rollouts.send(choose)
    total, ended = rollouts.receive()
    assert total == 10 and not ended
    state = rollouts.state_dict()
    by_seed = {episode["seed"]: episode["actions"] for episode in state.values()}

    start = env.begin(4)
    observation = {key: value[None] for key, value in start.observation.items()}
    noise = chunk_noise(SHAPE, 4, 0)
    assert np.array_equal(by_seed[4], choose(observation, noise[None])[0])


def test_rollout_runs_every_seed_once_and_in_full(envs: VectorEnv) -> None:
    episodes = list(rollout(envs, (75, 7), choose, [1, 2, 3]))
    assert sorted(e.info["seed"] for e in episodes) == [1, 2, 3]
    assert all((len(e) == 300 and e.truncated[-1]) or e.success for e in episodes)
    assert all((np.diff(e.time_ns) == 50_000_000).all() and "nominal" in e.info["clock"] for e in episodes)
    assert {e.info["env_engine"] for e in episodes} == {envs.engine}
    assert list(rollout(envs, SHAPE, choose, [])) == []


def test_interrupted_episodes_go_on_exactly(envs: VectorEnv) -> None:
    first = Rollouts(envs, SHAPE, [6, 7])
    for _ in range(3):
        first.send(choose)
        first.receive()
    saved = first.state_dict()
    first.send(choose)
    first.receive()
    expected = first.state_dict()

    second = Rollouts(envs, SHAPE, [])
    second.load_state_dict(saved)
    second.send(choose)
    second.receive()
    again = second.state_dict()
    assert again.keys() == expected.keys()
    for i in expected:
        assert again[i]["seed"] == expected[i]["seed"]
        assert np.array_equal(again[i]["actions"], expected[i]["actions"])


def test_parts_are_the_episode_cut_where_it_was_complete(envs: VectorEnv) -> None:
    rollouts = Rollouts(envs, SHAPE, [8], part_steps=20)
    parts, whole = [], []
    while rollouts.send(choose):
        whole += rollouts.receive()[1]
        parts += rollouts.take_parts()
        if len(parts) == 1:  # what was given out before a stop is not given out again after it
            state = rollouts.state_dict()
            rollouts = Rollouts(envs, SHAPE, [], part_steps=20)
            rollouts.load_state_dict(state)
    assert {len(part) for part in parts[:-1]} == {20} and sum(map(len, parts)) == len(whole[0])
    for name in ("action", "rewards", "terminated", "time_ns"):
        cut = [getattr(part, name)[: len(part)] for part in parts]
        assert np.array_equal(np.concatenate(cut), getattr(whole[0], name)[: len(whole[0])])
    for key, column in whole[0].observations.items():
        assert np.array_equal(np.concatenate([part.observations[key][:-1] for part in parts]), column[:-1])
        assert all(np.array_equal(a.observations[key][-1], b.observations[key][0]) for a, b in pairwise(parts))
    assert all(part.truncated[-1] for part in parts[:-1])
