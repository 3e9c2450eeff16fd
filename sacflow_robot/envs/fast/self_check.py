"""Check of the compiled step against one control step of robosuite's own, before it is used."""

from __future__ import annotations

import mujoco
import numpy as np

from sacflow_robot.envs.fast.fast_robot import CompiledTask, FastRobot
from sacflow_robot.envs.fast.plan import NotCoveredError
from sacflow_robot.envs.state import StateLayout
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import RobotSpec

ACTION = np.array([0.3, -0.2, -0.5, 0.1, -0.3, 0.2, 1.0], np.float32)
"""Action of the step that is compared."""

_TOLERANCE = 1e-9  # m, rad, and per second, after one control step


def check_step(task: CompiledTask, layout: StateLayout, spec: RobotSpec, start: StepResult, stock: StepResult) -> None:
    """Take the step that the stock engine took.

    Args:
        task: The compiled step.
        layout: Its state's.
        spec: Its robot's.
        start: State and observation before :data:`ACTION`.
        stock: The same after it, by the stock engine.

    Raises:
        NotCoveredError: The two differ.
    """
    assert start.state is not None and stock.state is not None
    data = mujoco.MjData(task.model)
    layout.write(start.state, task.model, data)
    robot = FastRobot(task, task.model, data)
    robot.begin(start.state)
    first = robot.observe()
    observations, states, solved = robot.execute(ACTION[None].astype(np.float64))
    difference = float(np.abs(states[0] - stock.state).max())
    if not difference < _TOLERANCE:
        raise NotCoveredError(f"it differs from robosuite's by {difference:.1e} after one step on this machine")
    for compiled, result in ((first, start), (observations[0], stock)):
        if not np.allclose(compiled, spec.flatten(result.observation), rtol=0, atol=1e-6):
            raise NotCoveredError("it observes differently from robosuite on this machine")
    if solved != stock.terminated:
        raise NotCoveredError("it tells success differently from robosuite on this machine")
