"""A person takes the robot over, and hands it back.

An input device (keyboard, SpaceMouse, gamepad) is a :class:`Teleoperator`: it is asked once each control period what the
person wants. What a person commands goes through the same safety filter as what a policy does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from sacflow_robot.robot.safety.safety_limits import moves_tool
from sacflow_robot.spec import FloatArray, RobotSpec


class Label(StrEnum):
    """A person's word on an episode; it ends the episode."""

    SUCCESS = "success"
    FAILURE = "failure"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class TeleopSignal:
    """A person's wishes in one control period.

    Attributes:
        action: What the person commands (A,), float32, in the robot's action units. None: hands off, the policy has the robot.
            No motion (zeros except the gripper): the person has it, and lets it stand still.
        label: The person's word on the episode, once, in the period in which it was given.
        stop: The person wants the robot stopped.
        enable: The person wants the robot enabled again after a hold or a stop: the deliberate act without which nothing moves.
        hold: Hold until enabled: a device is gone through which a person could have stopped the robot. A device that is gone
            while its person has the robot says ``stop`` instead. Said once.
    """

    action: FloatArray | None = None
    label: Label | None = None
    stop: bool = False
    enable: bool = False
    hold: bool = False


HANDS_OFF = TeleopSignal()
NOT_BY_HAND = "this robot cannot be taken over: its actions are not motions of the tool"


class Teleoperator(Protocol):
    """A device through which a person commands the robot."""

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        """The person's wishes now; called once each control period, must not wait (well under a millisecond).

        Args:
            commanded: What the robot was last commanded (A,), whoever chose it. A device that takes over goes on with
                its gripper entry until the person says otherwise, so that taking over drops nothing.
        """
        ...

    def close(self) -> None:
        """Give the device back, e.g. the terminal its echo."""
        ...


class TeleopDevice(ABC):
    """A ``Teleoperator`` whose keys or buttons take the robot over, label episodes and stop.

    Actions are translations and a rotation vector in the frame of the robot's base, and the gripper. The safety filter
    stands behind them as behind a policy. If the device goes away, that is an emergency stop while the person has the
    robot, and else a hold.

    Args:
        robot: The robot. One whose action is not a motion (7,) of the tool is stopped, enabled and labeled, and not
            taken over.
    """

    help: str
    """Keys or buttons, as lines of text."""

    def __init__(self, robot: RobotSpec, say: Callable[[str], None]) -> None:
        self._say = say
        self._moves = moves_tool(robot)
        self._low, self._high = robot.action_bounds
        self._human = False
        self._gripper = -1.0
        self._said = HANDS_OFF  # since the last poll, without an action
        say(self.help if self._moves else f"{self.help}\n{NOT_BY_HAND}")

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        """The person's wishes since the last call; a stop takes precedence over what came with it, before or after."""
        self._read(commanded)
        said, self._said = self._said, HANDS_OFF
        if said == HANDS_OFF and not self._human:
            return HANDS_OFF
        action = None
        if self._human:
            action = np.clip(np.append(self._motion(), self._gripper).astype(np.float32), self._low, self._high)
        return replace(said, action=action, enable=said.enable and not (said.stop or said.hold))

    @abstractmethod
    def close(self) -> None:
        """Give the device back."""

    @abstractmethod
    def _read(self, commanded: FloatArray) -> None:
        """Take what was pressed since the last call."""

    @abstractmethod
    def _motion(self) -> FloatArray:
        """Translation and rotation (6,) that the person commands, in shares of the action's range."""

    def _emergency(self, line: str) -> None:
        self._human = False
        self._said = replace(self._said, stop=True)
        self._say(line)

    def _gone(self, what: str) -> None:
        if self._human:
            self._emergency(f"{what} is gone: EMERGENCY STOP")
        elif not self._said.stop:
            self._said = replace(self._said, hold=True)
            self._say(f"{what} is gone: hold")

    def _take_over(self, commanded: FloatArray) -> None:
        if self._said.stop:
            return
        if not self._moves:
            self._say(NOT_BY_HAND)
            return
        self._human = not self._human
        self._gripper = 1.0 if commanded[6] > 0 else -1.0  # nothing is dropped by taking over
        self._say("you have the robot" if self._human else "the policy has the robot")

    def _grip(self) -> None:
        if self._human:
            self._gripper = -self._gripper
            self._say("gripper closes" if self._gripper > 0 else "gripper opens")

    def _label_episode(self, label: Label) -> None:
        self._said = replace(self._said, label=label)
        self._say(f"episode labeled: {label}")
