import logging

import gymnasium
import numpy as np
import pytest
import robosuite
from gymnasium.utils.env_checker import check_env

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS, get_task
from sacflow_robot.errors import DataError, InvalidValueError, UnknownNameError


def random_actions(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7)).astype(np.float32)


def test_it_is_a_gymnasium_environment() -> None:
    gymnasium.logger.min_level = logging.ERROR  # check_env warns that unbounded observations are unusual
    try:
        check_env(RobosuiteEnv("lift"), skip_render_check=True)
    finally:
        gymnasium.logger.min_level = gymnasium.logger.WARN


def test_observation_has_robomimics_keys(env: RobosuiteEnv) -> None:
    observation, _ = env.reset(seed=0)
    shapes = {key: value.shape for key, value in observation.items()}
    assert shapes == {
        "robot0_eef_pos": (3,),
        "robot0_eef_quat": (4,),
        "robot0_gripper_qpos": (2,),
        "object": (10,),
    }
    cube, relative = observation["object"][:3], observation["object"][7:]
    assert relative == pytest.approx(cube - observation["robot0_eef_pos"], abs=1e-6)
    for quat in (observation["robot0_eef_quat"], observation["object"][3:7]):
        assert np.linalg.norm(quat) == pytest.approx(1, abs=1e-5)
    # The cube lies flat, so its quaternion turns about z alone: x and y are 0 in x y z w order.
    assert observation["object"][3:5] == pytest.approx([0, 0], abs=1e-6)


def test_observation_is_robosuites_own_at_a_resting_state(env: RobosuiteEnv) -> None:
    env.begin(3)
    theirs = env._suite._get_observations(force_update=True)
    ours, _ = env.observe_state(env.state())
    for key in ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6), key
    assert ours["object"] == pytest.approx(theirs["object-state"], abs=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str) -> None:
    """robosuite's own start, physics and object observation; logged states replay exactly, the door's place included."""
    env = RobosuiteEnv(name)
    for seed in (0, 1):
        results = [env.begin(seed)]
        env._suite._get_observations(force_update=True)
        # Twice, as its sensors of one thing relative to another read the others' values of the time before.
        theirs = env._suite._get_observations(force_update=True)
        assert results[0].observation["object"] == pytest.approx(theirs["object-state"], abs=1e-6)
        assert results[0].observation["object"].shape == (get_task(name).object_size,)
        actions = random_actions(25, seed)
        results += [env.command(action) for action in actions]
        env.begin(seed + 10)
        again = [env.begin_at(results[0].state), *(env.command(action) for action in actions)]
        for a, b in zip(results, again, strict=True):
            assert np.array_equal(a.state, b.state)
            observation, success = env.observe_state(a.state)
            assert success == a.terminated
            for key, value in observation.items():
                assert value == pytest.approx(a.observation[key], abs=1e-5), key
    assert env.task.horizon == {"square": 400}.get(name, 300)


def test_the_seed_decides_everything_and_global_random_state_nothing(env: RobosuiteEnv) -> None:
    other = RobosuiteEnv("lift")
    np.random.seed(1)
    first = [env.begin(7), *(env.command(a) for a in random_actions(30))]
    np.random.seed(2)
    other.begin(99)
    other.command(random_actions(1)[0])
    before = np.random.get_state()[1].copy()
    second = [other.begin(7), *(other.command(a) for a in random_actions(30))]
    assert np.array_equal(before, np.random.get_state()[1])
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.state, b.state)
    assert not np.array_equal(env.begin(8).state, first[0].state)


def test_unseeded_resets_differ(env: RobosuiteEnv) -> None:
    env.reset(seed=3)
    first = env.reset()[1]["state"]
    second = env.reset()[1]["state"]
    assert not np.array_equal(first, second)
    env.reset(seed=3)
    assert np.array_equal(env.reset()[1]["state"], first)


def test_a_logged_state_and_its_actions_replay_exactly(env: RobosuiteEnv) -> None:
    actions = random_actions(60, seed=5)
    states = [env.begin(11).state, *(env.command(a).state for a in actions)]
    env.begin(12)
    env.command(actions[0])
    _, info = env.reset(options={"state": states[0]})
    again = [info["state"], *(env.command(a).state for a in actions)]
    assert np.array_equal(states, again)


def test_observation_is_a_function_of_the_state(env: RobosuiteEnv) -> None:
    env.begin(0)
    results = [env.command(a) for a in random_actions(20)]
    for result in results:
        assert result.state is not None
        observation, success = env.observe_state(result.state)
        assert success == result.terminated
        for key, value in observation.items():
            assert value == pytest.approx(result.observation[key], abs=1e-6), key


def test_physics_and_control_are_robosuites_own(env: RobosuiteEnv) -> None:
    stock = robosuite.make(
        "Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
        hard_reset=False, control_freq=20, ignore_done=True, seed=0,
    )  # fmt: skip
    theirs = RobosuiteEnv("lift")
    theirs._suite, theirs._robot = stock, stock.robots[0]
    theirs.model, theirs.data = stock.sim.model._model, stock.sim.data._data
    for seed in (0, 1):
        start = env.begin(seed)
        theirs.begin(seed)
        assert np.array_equal(theirs.state(), start.state)
        for action in random_actions(40, seed):
            mine = env.command(action)
            stock.step(action.astype(np.float64))
            assert np.array_equal(theirs.state(), mine.state)


def test_success_terminates_and_the_horizon_truncates(env: RobosuiteEnv) -> None:
    env.begin(0)
    still = np.zeros(7, np.float32)
    results = [env.command(still) for _ in range(300)]
    assert [r.truncated for r in results] == [False] * 299 + [True]
    assert not any(r.terminated for r in results) and all(r.reward == 0 for r in results)
    lifted = env.state()
    lifted[1 + 9 + 2] = 0.95  # the cube's height
    observation, success = env.observe_state(lifted)
    assert success and observation["object"][2] == pytest.approx(0.95)
    env.reset(options={"state": lifted})
    result = env.command(still)
    assert result.terminated and not result.truncated and result.reward == 1


def test_bad_input_is_one_clear_line(env: RobosuiteEnv) -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'lfit'; valid names: can, door, lift, square, stack"):
        get_task("lfit")
    env.begin(0)
    before = env.state()
    with pytest.raises(InvalidValueError, match="NaN"):
        env.command(np.full(7, np.nan, np.float32))
    assert np.array_equal(env.state(), before), "a refused action moves nothing"
    with pytest.raises(DataError, match=r"shape \(3,\), task 'lift' expects \(32,\)"):
        env.reset(options={"state": np.zeros(3)})
    for damage in (np.nan, 1e300):
        with pytest.raises(DataError, match="damaged"):
            env.reset(options={"state": np.full(32, damage)})


@pytest.mark.parametrize("name", TASKS)
def test_the_quaternions_of_a_task_are_where_its_table_says(name: str) -> None:
    env, starts = RobosuiteEnv(name), TASKS[name].robot.quaternions
    flat = np.array([env.robot.flatten(env.begin(seed).observation) for seed in range(6)])
    fours = {
        i for i in range(flat.shape[1] - 3) if np.allclose(np.linalg.norm(flat[:, i : i + 4], axis=1), 1, atol=1e-4)
    }
    assert set(starts) == fours
