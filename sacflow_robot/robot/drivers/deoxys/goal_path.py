"""The twin's way to a goal."""

from __future__ import annotations

from typing import Any

from sacflow_robot.envs.panda_plant import PandaPlant
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.messages import Interpolator
from sacflow_robot.utils.rotations import Array, matrix_to_vector, vector_to_matrix

_LEAST_FRACTION = 0.1


class GoalPath:
    """The way to a goal, as deoxys interpolates it.

    Attributes:
        goal: Position (3,) and rotation (3, 3) of the end effector in base.
    """

    def __init__(self, plant: PandaPlant, config: DeoxysConfig) -> None:
        self._plant = plant
        self._period_s = 1 / config.policy_rate_hz
        self.end()

    def end(self) -> None:
        """Go nowhere from where the end effector is."""
        self._start: tuple[Array, Array] | None = None
        self.goal: tuple[Array, Array] = self._plant.ee_pose()

    def aim(self, goal: Array, command: Any, *, is_delta: bool) -> None:
        """Go to a goal from where the end effector is now, or to a pose in base, which deoxys takes since August 2023."""
        position, rotation = self._plant.ee_pose()
        turned = vector_to_matrix(goal[3:])
        self._start = position, rotation
        self.goal = (position + goal[:3], turned @ rotation) if is_delta else (goal[:3], turned)
        smooth = command.traj_interpolator_type == Interpolator.LINEAR_POSE
        fraction = max(_LEAST_FRACTION, command.traj_interpolator_time_fraction)
        self._reach_s = fraction * self._period_s if smooth else 0.0
        self._since_s = 0.0

    def step(self) -> None:
        """Pull to where the end effector is to be now, at the beginning of a step of the physics."""
        if self._start is None:
            return
        share = min(1.0, self._since_s / self._reach_s) if self._reach_s else 1.0
        (p0, r0), (p1, r1) = self._start, self.goal
        turn = vector_to_matrix(share * matrix_to_vector(r1 @ r0.T))
        self._plant.set_goal(p0 + share * (p1 - p0), turn @ r0)
        self._since_s += self._plant.step_s
        if share >= 1.0:
            self._start = None
