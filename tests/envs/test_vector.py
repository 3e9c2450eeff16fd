"""Vector environments: threads under the compiled engine, processes under the stock one."""

import numpy as np
import pytest

from sacflow_robot.envs.compiled_env import CompiledEnv
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.envs.vector import SubprocVectorEnv, ThreadVectorEnv, make_vector_env
from sacflow_robot.errors import InvalidValueError, SacflowError, UnknownNameError

TOLERANCE = 1e-9  # m, rad, and per second


def random_actions(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


def test_a_chunk_is_its_actions_one_by_one() -> None:
    compiled = RobosuiteEnv("lift", engine="compiled")
    actions = random_actions(12)
    with make_vector_env("lift", 2) as envs:
        assert isinstance(envs, ThreadVectorEnv) and len(envs) == 2
        starts = envs.begin({0: 5, 1: 6})
        envs.send({0: actions[:5], 1: actions[5:]})
        chunks = envs.receive()
    for i, seed, part in ((0, 5, actions[:5]), (1, 6, actions[5:])):
        for result, expected in zip(
            [starts[i], *chunks[i]], [compiled.begin(seed), *map(compiled.command, part)], strict=True
        ):
            assert np.array_equal(result.state, expected.state)
            assert result.observation.keys() == expected.observation.keys()
            for key, value in expected.observation.items():
                assert value.dtype == result.observation[key].dtype and np.array_equal(value, result.observation[key])


def test_robots_stop_where_episodes_end() -> None:
    env = CompiledEnv("lift")
    with ThreadVectorEnv([env]) as envs:
        envs.begin({0: 0})
        envs.send({0: np.zeros((400, 7), np.float32)})
        results = envs.receive()[0]
        assert len(results) == TASKS["lift"].horizon
        assert [r.truncated for r in results] == [False] * 299 + [True] and not any(r.terminated for r in results)
        lifted = envs.begin({0: 0})[0].state
        assert lifted is not None
        lifted[1 + 9 + 2] = 0.95  # the cube's height
        env.begin_at(lifted)
        envs.send({0: np.zeros((5, 7), np.float32)})
        (result,) = envs.receive()[0]
        assert result.terminated and not result.truncated and result.reward == 1


def test_doors_of_different_robots_stand_in_different_places() -> None:
    env, actions = RobosuiteEnv("door"), random_actions(10)
    with make_vector_env("door", 2) as envs:
        envs.begin({0: 1, 1: 2})
        envs.send({0: actions, 1: actions})
        results = envs.receive()
    for i, seed in ((0, 1), (1, 2)):
        env.begin(seed)
        for action, result in zip(actions, results[i], strict=True):
            assert result.state == pytest.approx(env.command(action).state, abs=TOLERANCE)
    assert not np.array_equal(results[0][0].state[-7:], results[1][0].state[-7:])


def test_a_refused_action_moves_nothing_and_leaves_nothing_behind() -> None:
    with make_vector_env("lift", 2) as envs:
        starts = envs.begin({0: 1, 1: 2})
        envs.send({0: np.full((1, 7), np.nan, np.float32), 1: np.zeros((1, 7), np.float32)})
        with pytest.raises(InvalidValueError, match="NaN"):
            envs.receive()
        assert envs.receive() == {}
        assert np.array_equal(envs.begin({0: 1})[0].state, starts[0].state)
    with pytest.raises(UnknownNameError):
        make_vector_env("juggle", 1)


def test_failures_in_a_worker_reach_the_caller() -> None:
    with pytest.raises(UnknownNameError):
        SubprocVectorEnv("juggle", 1)
    with SubprocVectorEnv("lift", 2) as envs:
        envs.begin({0: 1, 1: 2})
        envs.send({0: np.full((1, 7), np.nan, np.float32), 1: np.zeros((1, 7), np.float32)})
        with pytest.raises(SacflowError, match="simulator process 0 failed: action contains NaN"):
            envs.receive()
        # No answer of the other robot is left over to be taken for the next one.
        starts = envs.begin({0: 1, 1: 2})
        assert all(result.reward == 0 and result.observation["object"].shape == (10,) for result in starts.values())


def test_a_worker_that_dies_is_named() -> None:
    with SubprocVectorEnv("lift", 1) as pool:
        pool.begin({0: 0})
        process = pool._envs[0]._process  # type: ignore[attr-defined]
        process.kill()
        process.join()
        with pytest.raises(SacflowError, match="simulator process 0 died"):
            pool.send({0: np.zeros((1, 7), np.float32)})
            pool.receive()
