"""The compiled engine held against robosuite, and how it gives way."""

import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sacflow_robot.envs.compiled_env import shared_task
from sacflow_robot.envs.fast import kernels
from sacflow_robot.envs.fast import plan as plans
from sacflow_robot.envs.fast.compare import KINDS, TOLERANCE, Comparer
from sacflow_robot.envs.fast.compilation import is_cached
from sacflow_robot.envs.fast.fast_robot import strip_visuals
from sacflow_robot.envs.fast.plan import NotCoveredError
from sacflow_robot.envs.fast.step_data import Plan
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS, usable_engine
from sacflow_robot.envs.vector import SubprocVectorEnv, make_vector_env

# With the wheels that constraints.txt names, NumPy's and SciPy's BLAS compute alike.
EXACT = sys.platform == "linux" and platform.machine() == "x86_64"


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
    stripped = strip_visuals(env._suite)
    assert (
        stripped.nq == env.model.nq
        and stripped.ngeom < env.model.ngeom / 2
        and stripped.nbuffer < env.model.nbuffer / 10
    )
    damping = env.model.dof_damping.copy()
    env.model.dof_damping[3] += 0.1  # as a randomized model has it
    whole = strip_visuals(env._suite)
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
        env.compile_task()

    # Another controller than robosuite's is noticed, wherever the difference comes from.
    make = plans.make_plan

    def other(*arguments: object) -> Plan:
        plan = make(*arguments)
        return plan._replace(kp=plan.kp * 1.01)

    monkeypatch.setattr("sacflow_robot.envs.fast.fast_robot.make_plan", other)
    shared_task.cache_clear()
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
