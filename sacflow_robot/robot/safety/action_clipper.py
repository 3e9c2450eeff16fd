"""Action bounds and a latch, for a robot in lockstep without a profile of safety limits."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.robot.safety.latch import Latch, State, Verdict
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.spec import FloatArray, RobotSpec


class ActionClipper(Latch):
    """Clips actions to bounds, and lets none through after a hold or a stop.

    A robot whose time stands still is at rest as soon as it gets no command, so it neither brakes nor is sent anything while
    it holds.

    Args:
        robot: The robot; its bounds always hold.
        bounds: Lower and upper bound (A,), (A,) on top of them, in action units, e.g. those of a calibration profile.

    Attributes:
        limits: None but the defaults of how long it holds.

    Raises:
        InvalidValueError: The bounds do not have the action's dimension.
    """

    def __init__(self, robot: RobotSpec, bounds: tuple[FloatArray, FloatArray] | None = None) -> None:
        super().__init__()
        self.limits = SafetyLimits()
        self._robot = robot
        self._bounds = bounds
        if bounds is not None and any(bound.shape != (robot.action_dim,) for bound in bounds):
            shapes = " and ".join(str(bound.shape) for bound in bounds)
            raise InvalidValueError(f"action limits have shapes {shapes}, expected ({robot.action_dim},)")

    def __call__(self, proposed: npt.ArrayLike) -> FloatArray:
        """The action (A,) to send, float32.

        Raises:
            InvalidValueError: The action has the wrong shape or contains NaN or infinity; nothing may be sent.
        """
        allowed = self._robot.check_action(proposed)
        if self._bounds is None:
            return allowed
        clipped: FloatArray = np.clip(allowed, *self._bounds).astype(np.float32)
        return clipped

    def begin(self, measured: FloatArray | None = None) -> None:
        """As of a :class:`~sacflow_robot.robot.safety.filter.SafetyFilter`; there is no state to reset."""

    def see(self, observation: Mapping[str, Any], captured_ns: int, stale_reason: str = "") -> bool:
        """As of a :class:`~sacflow_robot.robot.safety.filter.SafetyFilter`; observations do not matter here."""
        return True

    def step(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int | None = None) -> Verdict:
        """The action to send in place of a proposed one (A,); nothing where there is none, or while held or stopped."""
        self.rest()
        if self.state is not State.RUNNING or proposed is None:
            return Verdict(None, self.state, True, True, self.reason or "no action came")
        sent = self(proposed)
        return Verdict(sent, self.state, not np.array_equal(sent, np.asarray(proposed)), False)
