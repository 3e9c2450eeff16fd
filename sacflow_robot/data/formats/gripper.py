"""Compare a gripper's commands with what its fingers do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec

FINGERS = "robot0_gripper_qpos"

_MOVES_M = 5e-4  # fingers that come nearer or part by less than this in a step do not move
_FEWEST = 20  # moves, before anything is said
_AGAINST = 0.8


def gripper_dimensions(robot: RobotSpec) -> npt.NDArray[np.bool_]:
    """Mask (A,) of the action dimensions that are the gripper's, by their names."""
    return np.array(["gripper" in name for name in robot.action_names], bool)


def finger_width(episode: Episode) -> npt.NDArray[np.float64]:
    """Distance between the fingers (T + 1,), m."""
    width: npt.NDArray[np.float64] = np.ptp(episode.observations[FINGERS].astype(np.float64), axis=1)
    return width


def gripper_disagreement(episodes: Sequence[Episode], robot: RobotSpec) -> str | None:
    """A line that says so, where the fingers mostly part while the command closes them; None where they obey."""
    dimensions = np.flatnonzero(gripper_dimensions(robot))
    if len(dimensions) != 1 or robot.action_units[dimensions[0]] != "closing":
        return None
    if any(FINGERS not in each.observations for each in episodes):
        return None
    against = moves = commands = 0
    for episode in episodes:
        closing = episode.action[:, dimensions[0]]
        change = np.diff(finger_width(episode))
        moving = np.abs(change) > _MOVES_M
        against += int(((closing > 0) & (change > 0) & moving).sum() + ((closing < 0) & (change < 0) & moving).sum())
        moves += int(moving.sum())
        commands += int((np.diff(np.sign(closing)) != 0).sum())
    if moves >= _FEWEST and against > _AGAINST * moves:
        return (
            f"the gripper's command and fingers disagree: in {against / moves:.0%} of the steps that move the fingers they go "
            f"against the command; an action of 1 must close them, turn its sign around if it opens them"
        )
    if not moves and commands:
        return f"the gripper's command and fingers disagree: it changes {commands} times, and no finger moves"
    return None
