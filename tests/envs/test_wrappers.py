from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.environment import LimitedEnv
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.vector import make_vector_env
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.training_envs import training_limiter
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from sacflow_robot.spec import Engine


def test_the_environment_moves_within_the_limits(env: RobosuiteEnv) -> None:
    limits = SafetyLimits(
        speed_m_per_s=(0.3,) * 3, acceleration_m_per_s2=(1.5,) * 3, workspace=Box((-0.3, -0.3, 0.95), (0.3, 0.3, 1.2))
    )
    limited = LimitedEnv(env, SafetyFilter(env.robot, limits))
    executed = []
    for seed in (1, 2):
        limited.begin(seed)
        for _ in range(60):
            result = limited.command(np.array([0, 0, -1, 0, 0, 0, -1], np.float32))
            assert result.action is not None
            executed.append(result.action[2] * 0.05 / 0.05)
        seen = result.observation
        assert seen["robot0_eef_pos"][2] >= 0.95 - 1e-3, "pushed down for three seconds, it stays above the floor given"
        assert executed[-1] != -1
    speed = np.array(executed[:60])
    assert np.abs(speed).max() <= 0.3 + 1e-6 and np.abs(np.diff(speed)).max() <= 1.5 * 0.05 + 1e-6
    assert seen["robot0_eef_pos"][2] < 0.98, "and it does come down to it"


@pytest.mark.parametrize("engine", ["stock", "compiled"])
def test_training_robots_move_within_the_limits_and_record_what_was_executed(engine: Engine) -> None:
    limits = SafetyLimits(speed_m_per_s=(0.3,) * 3, acceleration_m_per_s2=(1.5,) * 3)

    def choose(observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.clip(noise, -1, 1)

    limiter = partial(SafetyFilter, get_robot("lift"), limits)
    with make_vector_env("lift", 2, engine, limiter=limiter) as envs, make_vector_env("lift", 2, engine) as replayed:
        episodes = list(rollout(envs, (5, 7), choose, range(3)))
        assert len(episodes) == 3
        for episode in episodes:
            speed = episode.action[:, :3]  # one per 0.05 m and 0.05 s: meters per second
            assert np.abs(speed).max() <= 0.3 + 1e-6
            assert np.abs(np.diff(speed, axis=0)).max() <= 1.5 * 0.05 + 1e-6
            assert np.abs(episode.policy_action).max() == 1 and not np.array_equal(
                episode.policy_action, episode.action
            )
            # What was commanded, without a filter, leads to the same states.
            replayed.begin({0: int(episode.info["seed"])})
            replayed.send({0: episode.action})
            (results,) = replayed.receive().values()
            assert np.array_equal(results[-1].state, episode.states[-1])  # type: ignore[index,arg-type]


def test_train_takes_the_limits_of_a_profile(tmp_path: Path) -> None:
    profile = Path(__file__).parents[2] / "calibration" / "panda.yaml"
    assert training_limiter(TrainConfig()) is None
    limiter = training_limiter(TrainConfig(safety=str(profile), action_history=2))
    assert limiter is not None
    made = limiter()
    assert isinstance(made, SafetyFilter) and made.limits == load_profile(profile).safety_limits(get_robot("lift"))
    other = tmp_path / "other.yaml"
    other.write_text(Path(profile.with_name("sim_panda.yaml")).read_text().partition("safety:")[0])
    with pytest.raises(UsageError, match="has no section 'safety'"):
        training_limiter(TrainConfig(safety=str(other)))
