from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.safety_wrapper import LimitedEnv, LimitedVectorEnv
from sacflow_robot.envs.vector_env import make_vector_env
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.training_envs import limited
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits


def test_the_environment_moves_within_the_limits(env: RobosuiteEnv) -> None:
    limits = SafetyLimits(
        speed_m_per_s=(0.3,) * 3, acceleration_m_per_s2=(1.5,) * 3, workspace=Box((-0.3, -0.3, 0.95), (0.3, 0.3, 1.2))
    )
    limited = LimitedEnv(env, SafetyFilter(env.robot, limits))
    commanded = []
    for seed in (1, 2):
        limited.reset(seed=seed)
        for _ in range(60):
            seen, _, _, _, info = limited.step(np.array([0, 0, -1, 0, 0, 0, -1], np.float32))
            commanded.append(info["commanded"][2] * 0.05 / 0.05)
        assert seen["robot0_eef_pos"][2] >= 0.95 - 1e-3, "pushed down for three seconds, it stays above the floor given"
        assert info["limited"]
    speed = np.array(commanded[:60])
    assert np.abs(speed).max() <= 0.3 + 1e-6 and np.abs(np.diff(speed)).max() <= 1.5 * 0.05 + 1e-6
    assert seen["robot0_eef_pos"][2] < 0.98, "and it does come down to it"


def test_arms_that_learn_move_within_the_limits_and_learn_from_what_was_commanded() -> None:
    limits = SafetyLimits(speed_m_per_s=(0.3,) * 3, acceleration_m_per_s2=(1.5,) * 3)

    def choose(observation: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.clip(noise, -1, 1)

    with make_vector_env("lift", 2) as envs, make_vector_env("lift", 2) as replayed:
        made = LimitedVectorEnv(envs, lambda: SafetyFilter(envs.spec, limits))
        episodes = list(rollout(made, (5, 7), choose, range(3)))
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
    with make_vector_env("lift", 1) as envs:
        assert limited(envs, TrainConfig()) is envs
        assert isinstance(limited(envs, TrainConfig(safety=str(profile))), LimitedVectorEnv)
        other = tmp_path / "other.yaml"
        other.write_text(Path(profile.with_name("sim_panda.yaml")).read_text().partition("safety:")[0])
        with pytest.raises(UsageError, match="has no section 'safety'"):
            limited(envs, TrainConfig(safety=str(other)))
