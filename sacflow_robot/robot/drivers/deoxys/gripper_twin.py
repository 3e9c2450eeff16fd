"""The gripper's part of the twin."""

from typing import Any

import numpy as np

from sacflow_robot.envs.panda_plant import PandaPlant
from sacflow_robot.errors import WireError
from sacflow_robot.robot.drivers.deoxys import messages

MAX_WIDTH_M = 0.08
_STALLED_S, _STILL_M_S = 0.1, 0.02


class GripperTwin:
    """The gripper: one action at a time, at its own speed."""

    def __init__(self, plant: PandaPlant) -> None:
        self._plant = plant
        self.reset()

    def reset(self) -> None:
        """Forget what was commanded; the fingers stay."""
        self._pending: Any = None
        self._busy = self.grasped = False
        self._command = self._target = self._width = self._plant.finger_width()
        self._speed = self._still_s = 0.0
        self._grasping, self._within = False, (0.0, 0.0)

    def take(self, data: bytes) -> None:
        """Keep a command until the one before is done; a stop counts at once."""
        action = messages.packed(messages.parse("FrankaGripperControlMessage", data))
        if action is None:
            raise WireError("a gripper command that holds no action")
        if action.DESCRIPTOR.name == "FrankaGripperStopMessage":
            self.reset()
        else:
            self._pending = action

    def step(self, seconds: float) -> None:
        if not self._busy and self._pending is not None:
            action, self._pending = self._pending, None
            self._begin(action)
        if not self._busy:
            return
        move = self._speed * seconds
        self._command += float(np.clip(self._target - self._command, -move, move))
        self._plant.set_finger_width(self._command)
        width = self._plant.finger_width()
        still = abs(width - self._width) < _STILL_M_S * seconds
        self._still_s, self._width = self._still_s + seconds if still else 0.0, width
        arrived = abs(self._command - self._target) < 1e-9
        if arrived and self._still_s > _STALLED_S:
            self._busy = False
            # libfranka's rule; with deoxys's tolerances of 0.08 m any width but the widest counts as a grasp.
            self.grasped = self._grasping and self._within[0] < width < self._within[1]

    def _begin(self, action: Any) -> None:
        kind = action.DESCRIPTOR.name
        if kind == "FrankaGripperGraspMessage" and self.grasped:
            return
        homing = kind == "FrankaGripperHomingMessage"
        self._grasping, self.grasped = kind == "FrankaGripperGraspMessage", False
        if self._grasping:
            inner, outer = action.epsilon_inner, action.epsilon_outer
            inner, outer = (inner, outer) if inner or outer else (MAX_WIDTH_M, MAX_WIDTH_M)
            self._within = action.width - inner, action.width + outer
        self._target = MAX_WIDTH_M if homing else float(np.clip(action.width, 0.0, MAX_WIDTH_M))
        self._speed = 0.1 if homing else float(np.clip(action.speed, 0.0, 0.5))
        self._busy, self._still_s = True, 0.0
        self._command = self._width = self._plant.finger_width()
