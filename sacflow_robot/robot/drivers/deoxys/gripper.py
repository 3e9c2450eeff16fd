"""Commands to the gripper within its limits, and what is known of the motion that they began."""

from __future__ import annotations

from sacflow_robot.robot.drivers.deoxys import wire
from sacflow_robot.robot.drivers.deoxys.states import GripperState

_STARTS_NS = 1_000_000_000  # a command that is older has been begun


class Gripper:
    """The gripper, which finishes by itself what it was told.

    Attributes:
        force_n: Largest force to grasp with (N); None for no limit.
        width_m: Least and greatest width to go to (m), likewise.
    """

    def __init__(self) -> None:
        self.force_n: float | None = None
        self.width_m: tuple[float, float] | None = None
        self._closing = 0.0  # what it was told last; 0 for nothing
        self._since_ns = 0

    def command(self, closing: float, now_ns: int) -> bytes | None:
        """The command that closes the gripper above 0 and opens it below; None for 0."""
        if not closing:
            return None
        if closing * self._closing <= 0:
            self._closing = closing
            self._since_ns = now_ns
        return wire.gripper_command(closing, self.force_n, self.width_m)

    def stop(self, seen: GripperState | None, now_ns: int) -> bytes | None:
        """The command that ends a motion; None for fingers at rest, which would let go of what they hold."""
        closing = self._closing
        self._closing = 0.0
        if not closing:
            return None
        starting = now_ns - self._since_ns < _STARTS_NS
        if seen is None or seen.moving or (starting and not (closing > 0 and seen.grasped)):
            return wire.gripper_stop()
        return None
