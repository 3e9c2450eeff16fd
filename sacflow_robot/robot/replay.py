"""Logged episodes, run again in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.robot.sim import SimRobot


@dataclass(frozen=True)
class ReplayResult:
    """How a replayed episode compares with its log.

    Attributes:
        steps: Steps replayed.
        max_state_deviation: Largest absolute difference in any entry of any simulator state.
        success: Whether the replay solved the task.
    """

    steps: int
    max_state_deviation: float
    success: bool


def replay_episode(robot: SimRobot, episode: Episode, on_frame: Callable[[], None] = lambda: None) -> ReplayResult:
    """Start from the logged initial state, send the logged commands, and compare every state with the log.

    Args:
        robot: The simulated arm.
        episode: The episode.
        on_frame: Called at the start and after every step, e.g. to render a video frame.

    Raises:
        DataError: The episode has no simulator states, e.g. because it comes from a physical arm.
    """
    if episode.states is None:
        raise DataError("this episode has no simulator states to start from; only episodes of simulated arms replay")
    result = robot.begin_at(episode.states[0])
    on_frame()
    states = [result.state]
    for action in episode.commanded:
        result = robot.command(action)
        states.append(result.state)
        on_frame()
    deviation = float(np.abs(np.stack(states) - episode.states).max())  # type: ignore[arg-type]
    return ReplayResult(len(episode), deviation, result.terminated)
