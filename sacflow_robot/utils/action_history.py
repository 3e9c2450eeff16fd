"""History of the last actions sent, as one more observation: with delays, what a robot does next depends on them.

The history follows from an episode's actions. So a log can be learned from with another length than it was recorded with,
and an episode replays without it.
"""

from dataclasses import replace

import numpy as np

from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec

KEY = "action_history"


def robot_with_history(robot: RobotSpec, length: int) -> RobotSpec:
    """The robot with its last actions (length, A) among its observations, newest last, in place of a history that it had.

    Raises:
        UsageError: The length is not from 0 to 100.
    """
    if not 0 <= length <= 100:
        raise UsageError(f"the action history is {length}; it must be from 0 to 100")
    robot = without_history(robot)
    if not length:
        return robot
    return replace(robot, observations=(*robot.observations, ArraySpec(KEY, (length, robot.action_dim), "action")))


def without_history(robot: RobotSpec) -> RobotSpec:
    """The robot without its last actions among its observations."""
    if not history_of(robot):
        return robot
    return replace(robot, observations=tuple(a for a in robot.observations if a.key != KEY))


def history_of(robot: RobotSpec) -> int:
    """Number of past actions in a robot's observations; 0 for none."""
    return next((a.shape[0] for a in robot.observations if a.key == KEY and a.shape), 0)


def start_history(robot: RobotSpec, length: int) -> FloatArray:
    """The history (length, A) at an episode's start: zeros."""
    return np.zeros((length, robot.action_dim), np.float32)


def push(history: FloatArray, action: FloatArray) -> FloatArray:
    """The history (length, A) after one more action (A,), as a new array."""
    return np.concatenate([history[1:], action[None]])


def with_action_history(episode: Episode, length: int) -> Episode:
    """The episode with the ``length`` actions commanded before each observation, zeros before the start; 0 leaves them out."""
    held = episode.observations.get(KEY)
    others = {key: rows for key, rows in episode.observations.items() if key != KEY}
    if not length:
        return episode if held is None else replace(episode, observations=others)
    before = np.concatenate([np.zeros((length, episode.action.shape[1]), np.float32), episode.action])
    rows = np.stack([before[t : t + length] for t in range(len(episode) + 1)])
    if held is not None and np.array_equal(held, rows):
        return episode
    return replace(episode, observations={**others, KEY: rows})
