import gymnasium
import numpy as np
import pytest

from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.gymnasium_env import GymnasiumEnv
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.envs.tasks import is_gymnasium_id
from sacflow_robot.envs.vector import SubprocVectorEnv
from sacflow_robot.errors import DataError, UnknownNameError, UsageError


def test_any_gymnasium_id_is_an_arm() -> None:
    robot = get_robot("Pendulum-v1")
    assert robot.task == "Pendulum-v1" and robot.observation_dim == 3 and robot.action_dim == 1
    assert robot.action_low == (-1.0,) and robot.action_units == ("-2 to 2",)
    assert get_robot("HalfCheetah-v5").control_rate_hz == 20


def test_steps_are_the_environments_own_with_actions_rescaled() -> None:
    ours, theirs = GymnasiumEnv("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    start, (observation, _) = ours.begin(4), theirs.reset(seed=4)
    assert np.array_equal(start.observation["observation"], observation)
    for action in np.random.default_rng(0).uniform(-1, 1, (200, 1)).astype(np.float32):
        result = ours.command(action)
        observation, reward, _, truncated, _ = theirs.step(2 * action)
        assert result.observation["observation"] == pytest.approx(observation, abs=1e-6)
        assert result.reward == pytest.approx(reward, abs=1e-6) and result.truncated == truncated
    assert result.truncated and not result.success and result.state is None


def test_an_end_that_is_no_success_is_not_logged_as_one() -> None:
    """Hopper terminates when it falls."""
    fall = np.full((1, 5, 3), 1.0, np.float32)
    with SubprocVectorEnv("Hopper-v5", 1) as envs:
        episode = next(rollout(envs, (5, 3), lambda _observation, _noise: fall, [0]))
    assert episode.terminated[-1] and not episode.success and episode.states is None


def test_bad_input_is_one_clear_line() -> None:
    assert not is_gymnasium_id("lift") and not is_gymnasium_id("lfit") and is_gymnasium_id("a.b:ns/Arm-v0")
    with pytest.raises(UsageError, match="no environment 'Chetah-v5'"):
        get_robot("Chetah-v5")
    with pytest.raises(UsageError, match="no environment 'nowhere:Arm-v0'"):
        get_robot("nowhere:Arm-v0")
    with pytest.raises(UsageError, match="takes Discrete"):
        get_robot("CartPole-v1")
    with pytest.raises(UnknownNameError, match="valid names: can"):
        get_robot("lfit")
    with pytest.raises(DataError, match="cannot start from a logged state"):
        GymnasiumEnv("Pendulum-v1").begin_at(np.zeros(3))
