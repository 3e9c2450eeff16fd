"""Trust, but verify: the compiled step held against robosuite's own before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mujoco
import numpy as np

from sacflow_robot.envs.fast import kernels
from sacflow_robot.envs.fast.compilation import compiling
from sacflow_robot.envs.fast.fast_robot import CompiledTask, FastRobot
from sacflow_robot.envs.fast.plan import NotCoveredError

if TYPE_CHECKING:
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

_TOLERANCE = 1e-9  # m, rad, and per second, after one control step


def checked_task(env: RobosuiteEnv) -> CompiledTask:
    """The compiled step for a stock environment's task, after one control step of both; the episode in progress is lost.

    Raises:
        NotCoveredError: The task is not covered, or the two differ.
    """
    action = np.array([0.3, -0.2, -0.5, 0.1, -0.3, 0.2, 1.0], np.float32)
    start = env.begin(0)
    assert start.state is not None
    task = CompiledTask(env._suite, env.task.name, env.layout.size)
    data = mujoco.MjData(task.model)
    env.layout.write(start.state, task.model, data)
    robot = FastRobot(task, task.model, data)
    robot.begin(start.state)
    with compiling(kernels.execute):
        theirs = env.command(action)
        assert theirs.state is not None
        seen = [robot.observe()]
        observations, states, solved = robot.execute(action[None].astype(np.float64))
    seen.append(observations[0])
    difference = float(np.abs(states[0] - theirs.state).max())
    if not difference < _TOLERANCE:
        raise NotCoveredError(f"it differs from robosuite's by {difference:.1e} after one step on this machine")
    for ours, result in zip(seen, (start, theirs), strict=True):
        if not np.allclose(ours, env.robot.flatten(result.observation), rtol=0, atol=1e-6):
            raise NotCoveredError("it observes differently from robosuite on this machine")
    if solved != theirs.terminated:
        raise NotCoveredError("it tells success differently from robosuite on this machine")
    return task
