"""Gymnasium vector environment held against Gymnasium's own over the stock engine."""

from dataclasses import replace

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sacflow_robot.envs.compiled_env import shared_task
from sacflow_robot.envs.gymnasium_vector_env import RobosuiteVectorEnv
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.errors import InvalidValueError

TOLERANCE = 1e-9  # m, rad, and per second


def test_the_vector_environment_is_gymnasiums_over_the_stock_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "lift", replace(TASKS["lift"], horizon=4))
    shared_task.cache_clear()
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
        shared_task.cache_clear()
