"""The safety filter: what stands between whoever chooses an action and the arm, the same in ``run`` and ``replay``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.spec import ArmSpec, FloatArray


class ActionLimits:
    """Turns proposed actions into ones that may be sent.

    Args:
        arm: The arm; its bounds always hold.
        bounds: Lower and upper bound (A,), (A,) on top of them, in action units, e.g. those of a calibration profile.

    Raises:
        InvalidValueError: The bounds do not have the arm's dimension.
    """

    def __init__(self, arm: ArmSpec, bounds: tuple[FloatArray, FloatArray] | None = None) -> None:
        self._arm, self._bounds = arm, bounds
        if bounds is not None and any(bound.shape != (arm.action_dim,) for bound in bounds):
            shapes = " and ".join(str(bound.shape) for bound in bounds)
            raise InvalidValueError(f"action limits have shapes {shapes}, expected ({arm.action_dim},)")

    def __call__(self, proposed: npt.ArrayLike) -> FloatArray:
        """The action (A,) to send, float32.

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity; nothing may be sent.
        """
        allowed = self._arm.check_action(proposed)
        if self._bounds is None:
            return allowed
        clipped: FloatArray = np.clip(allowed, *self._bounds).astype(np.float32)
        return clipped
