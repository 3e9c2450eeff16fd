from __future__ import annotations

import numpy as np

from sacflow_robot.envs.limited import LimitedEnv
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.robot.safety import SafetyFilter
from sacflow_robot.safetylimits import Box, SafetyLimits


def test_the_environment_moves_within_the_limits(env: RobosuiteEnv) -> None:
    limits = SafetyLimits(
        speed_m_per_s=(0.3,) * 3, acceleration_m_per_s2=(1.5,) * 3, workspace=Box((-0.3, -0.3, 0.95), (0.3, 0.3, 1.2))
    )
    limited = LimitedEnv(env, SafetyFilter(env.arm, limits))
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
