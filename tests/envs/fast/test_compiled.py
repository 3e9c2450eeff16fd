"""The compiled engine held against robosuite, and how it gives way."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sacflow_robot.envs import thread_vector_env as threads
from sacflow_robot.envs.engine import usable_engine
from sacflow_robot.envs.fast import kernels
from sacflow_robot.envs.fast import plan as plans
from sacflow_robot.envs.fast import self_check as check
from sacflow_robot.envs.fast.compare import KINDS, TOLERANCE, Comparer
from sacflow_robot.envs.fast.compilation import is_cached
from sacflow_robot.envs.fast.plan import NotCoveredError
from sacflow_robot.envs.fast.strip_visuals import lean_model
from sacflow_robot.envs.gymnasium_vector_env import RobosuiteVectorEnv
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.envs.thread_vector_env import ThreadVectorEnv
from sacflow_robot.envs.vector_env import SubprocVectorEnv, make_vector_env
from sacflow_robot.errors import InvalidValueError, UnknownNameError

# With the wheels that constraints.txt names, NumPy's and SciPy's BLAS compute alike.
EXACT = sys.platform == "linux" and platform.machine() == "x86_64"


def random_actions(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


@pytest.fixture(scope="module")
def compiled() -> Iterator[RobosuiteEnv]:
    made = RobosuiteEnv("lift", engine="compiled")
    assert made.engine == "compiled"
    yield made
    made.close()


@pytest.mark.parametrize("task", TASKS)
def test_it_goes_where_robosuite_goes(task: str) -> None:
    """A part of ``make test-sim``."""
    comparer = Comparer(task)
    assert comparer.engine == "compiled"
    for kind in KINDS:
        for seed in (0, 1):
            found = comparer.episode(kind, seed, 30)
            assert found.alike and found.step_deviation < TOLERANCE, (kind, seed, found)
            if EXACT:
                assert found.free_deviation == 0, (kind, seed, found)


def test_what_is_only_seen_is_left_out_where_it_changes_nothing() -> None:
    env = RobosuiteEnv("square")
    lean = lean_model(env._suite)
    assert lean.nq == env.model.nq and lean.ngeom < env.model.ngeom / 2 and lean.nbuffer < env.model.nbuffer / 10
    damping = env.model.dof_damping.copy()
    env.model.dof_damping[3] += 0.1  # as a randomized model has it
    whole = lean_model(env._suite)
    assert whole.ngeom == env.model.ngeom and whole.dof_damping[3] == damping[3] + 0.1


def test_success_is_told_as_robosuite_tells_it() -> None:
    """Also where contacts decide: a cube on another one counts once the gripper has let go of it."""
    comparer = Comparer("stack")
    assert all(comparer.episode("expert", seed, 120).alike for seed in (1, 2))
    env = RobosuiteEnv("stack", engine="compiled")
    state = env.begin(0).state
    assert state is not None
    names = [env.model.joint(i).name for i in range(env.model.njnt)]
    a, b = (1 + int(env.model.joint(names.index(f"cube{c}_joint0")).qposadr[0]) for c in "AB")
    state[a : a + 2] = state[b : b + 2]
    for height, stacked in ((0.04, True), (0.06, False)):
        state[a + 2] = state[b + 2] + height
        assert env.observe_state(state)[1] == stacked
        assert RobosuiteEnv("stack").observe_state(state)[1] == stacked


def test_a_chunk_is_its_actions_one_by_one(compiled: RobosuiteEnv) -> None:
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


def test_arms_stop_where_episodes_end() -> None:
    with ThreadVectorEnv("lift", 1) as envs:
        envs.begin({0: 0})
        envs.send({0: np.zeros((400, 7), np.float32)})
        results = envs.receive()[0]
        assert len(results) == TASKS["lift"].horizon
        assert [r.truncated for r in results] == [False] * 299 + [True] and not any(r.terminated for r in results)
        lifted = envs.begin({0: 0})[0].state
        assert lifted is not None
        lifted[1 + 9 + 2] = 0.95  # the cube's height
        envs._envs[0].begin(lifted)
        envs.send({0: np.zeros((5, 7), np.float32)})
        (result,) = envs.receive()[0]
        assert result.terminated and not result.truncated and result.reward == 1


def test_doors_of_different_arms_stand_in_different_places() -> None:
    env, actions = RobosuiteEnv("door"), random_actions(10)
    with ThreadVectorEnv("door", 2) as envs:
        envs.begin({0: 1, 1: 2})
        envs.send({0: actions, 1: actions})
        results = envs.receive()
    for i, seed in ((0, 1), (1, 2)):
        env.begin(seed)
        for action, result in zip(actions, results[i], strict=True):
            assert result.state == pytest.approx(env.command(action).state, abs=TOLERANCE)
    assert not np.array_equal(results[0][0].state[-7:], results[1][0].state[-7:])


def test_a_refused_action_moves_nothing_and_leaves_nothing_behind() -> None:
    with ThreadVectorEnv("lift", 2) as envs:
        starts = envs.begin({0: 1, 1: 2})
        envs.send({0: np.full((1, 7), np.nan, np.float32), 1: np.zeros((1, 7), np.float32)})
        with pytest.raises(InvalidValueError, match="NaN"):
            envs.receive()
        assert envs.receive() == {}
        assert np.array_equal(envs.begin({0: 1})[0].state, starts[0].state)
    with pytest.raises(UnknownNameError):
        make_vector_env("juggle", 1)


def test_the_vector_environment_is_gymnasiums_over_the_stock_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "lift", replace(TASKS["lift"], horizon=4))
    threads._maker.cache_clear()
    theirs = SyncVectorEnv([lambda: RobosuiteEnv("lift")] * 2)
    ours = RobosuiteVectorEnv("lift", 2)
    try:
        assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
        pairs = [(ours.reset(seed=7), theirs.reset(seed=7))]
        rng = np.random.default_rng(0)
        for _ in range(12):  # twice past the end
            actions = rng.uniform(-1, 1, (2, 7)).astype(np.float32)
            mine, his = ours.step(actions), theirs.step(actions)
            pairs.append(((mine[0], mine[4]), (his[0], his[4])))
            for a, b in zip(mine[1:4], his[1:4], strict=True):
                assert a.dtype == b.dtype and np.array_equal(a, b)
        for (seen, info), (expected, their_info) in pairs:
            assert info["state"] == pytest.approx(their_info["state"], abs=TOLERANCE)
            assert seen.keys() == expected.keys()
            for key, value in expected.items():
                assert ours.observation_space[key].contains(seen[key])
                assert seen[key] == pytest.approx(value, abs=1e-6), key
        with pytest.raises(InvalidValueError, match=r"shape \(3, 7\), expected \(2, 7\)"):
            ours.step(np.zeros((3, 7), np.float32))
    finally:
        ours.close()
        theirs.close()
        threads._maker.cache_clear()


def test_what_is_not_covered_falls_back_with_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert usable_engine("HalfCheetah-v5", "compiled") == "stock"
    assert usable_engine("HalfCheetah-v5", "stock") == usable_engine("lift", "stock") == "stock"
    assert [r.getMessage() for r in caplog.records] == [
        "HalfCheetah-v5 is stepped by the stock engine: the compiled one does not cover it (it is of robosuite's tasks only)"
    ]
    env = RobosuiteEnv("lift")
    env._robot.composite_controller_config["body_parts"]["right"]["input_type"] = "absolute"
    with pytest.raises(NotCoveredError, match="OSC_POSE with input_type absolute"):
        check.checked_task(env)

    # Another controller than robosuite's is noticed, wherever the difference comes from.
    make = plans.make_plan

    def other(*arguments: object) -> kernels.Plan:
        plan = make(*arguments)
        return plan._replace(kp=plan.kp * 1.01)

    monkeypatch.setattr("sacflow_robot.envs.fast.fast_robot.make_plan", other)
    threads._maker.cache_clear()
    caplog.clear()
    with make_vector_env("lift", 1) as envs:
        assert isinstance(envs, SubprocVectorEnv) and envs.engine == "stock"
    env = RobosuiteEnv("lift", engine="compiled")
    assert env.engine == "stock" and env.begin(0).observation
    assert len(caplog.records) == 2
    assert all("differs from robosuite's by" in r.getMessage() for r in caplog.records)


def test_what_is_compiled_is_kept_for_the_next_process(compiled: RobosuiteEnv) -> None:
    assert is_cached(kernels.execute)
    code = (
        "from sacflow_robot.envs.robosuite_env import RobosuiteEnv\n"
        "from sacflow_robot.envs.fast import kernels\n"
        "assert RobosuiteEnv('lift', engine='compiled').engine == 'compiled'\n"
        "print(sum(kernels.execute.stats.cache_hits.values()), sum(kernels.execute.stats.cache_misses.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["1", "0"] and done.stderr == ""
