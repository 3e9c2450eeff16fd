"""Commands that keep an arm where it is, under a controller that knows goals and no brakes."""

from __future__ import annotations

import numpy as np

from sacflow_robot.robot.drivers.deoxys import wire
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.states import ArmState
from sacflow_robot.utils.rotations import Array, matrix_to_vector

_BRAKE_NS = 150_000_000
_AWAY_M, _AWAY_RAD = 0.02, 0.1


class Standstill:
    """The commands that hold an arm.

    A delta of nothing aims at where the arm is when deoxys reads it: it brakes a moving arm by the controller's damping, and
    pulls it nowhere. Under a load it gives way: each one aims at a place a little lower than the one before, as far below as
    the load moves the arm in a control period. With ``ABSOLUTE_HOLD`` such deltas only brake, for 0.15 s, in which the
    damping of deoxys's own gains takes 97 % of the speed; then the pose at which the arm stands is latched and sent as an
    absolute goal. It is a pose that was seen, so it lies within whatever limits the arm was in, and under a load the arm sags
    once, by the load over the stiffness, and stays.

    deoxys before 14 August 2023 added an absolute position to the current one. There is no asking which one runs: no message
    has a version, and a goal that is harmless under both meanings does not exist. (One without stiffness would be, but would
    show nothing, for joints stick.) So the setting is off unless the operator turns it on, and where it is wrong, or somebody
    pushes the arm, an arm that leaves the latched pose by 20 mm or 0.1 rad is held by deltas until it is connected again.

    Args:
        config: Gains, and whether deoxys takes absolute goals.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Begin anew, after the arm was connected."""
        self._may_latch, self._paused = self._config.absolute_hold, False
        self.end()

    def end(self) -> None:
        """Forget the pose: the arm is commanded to move."""
        self._since_ns: int | None = None
        self._pose: tuple[Array, Array] | None = None

    def pause(self, paused: bool) -> None:
        """Latch nothing meanwhile: the arm is put somewhere else."""
        self.end()
        self._paused = paused

    def command(self, arm: ArmState | None, now_ns: int) -> bytes:
        """The command to send now.

        Args:
            arm: The arm's state; None if there is none that is new enough to be held at.
            now_ns: The time (monotonic ns).
        """
        self._since_ns = now_ns if self._since_ns is None else self._since_ns
        may_latch = self._may_latch and not self._paused and now_ns - self._since_ns >= _BRAKE_NS
        if self._pose is None and arm is not None and may_latch:
            self._pose = arm.position, arm.rotation
        if self._pose is None:
            return wire.pose_command(self._config, np.zeros(6))
        position, rotation = self._pose
        goal = np.concatenate([position, matrix_to_vector(rotation)])
        return wire.pose_command(self._config, goal, is_delta=False)

    def left(self, arm: ArmState) -> str:
        """Message, once, about an arm that is not where it is held; empty if it is."""
        if self._pose is None:
            return ""
        meters = float(np.linalg.norm(arm.position - self._pose[0]))
        radians = float(np.linalg.norm(matrix_to_vector(arm.rotation @ self._pose[1].T)))
        if meters < _AWAY_M and radians < _AWAY_RAD:
            return ""
        self.end()
        self._may_latch = False
        return (
            f"the arm moved by {1e3 * meters:.0f} mm and {radians:.2f} rad from where it was held; was it pushed, or is deoxys "
            "older than August 2023, which needs SACFLOW.ABSOLUTE_HOLD: false?"
        )
