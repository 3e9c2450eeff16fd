"""A person takes the robot over, and hands it back.

An input device (keyboard, SpaceMouse, gamepad) is a :class:`Teleoperator`: it is asked once each control period what the
person wants. What a person commands goes through the same safety filter as what a policy does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sacflow_robot.spec import FloatArray


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
            No motion (zeros but for the gripper): the person has it, and lets it stand still.
        label: The person's word on the episode, once, in the period in which it was given.
        stop: Emergency stop.
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
            commanded: What the robot was last commanded (A,), whoever chose it. A device that takes over goes on with its
                gripper entry until the person says otherwise, so that taking over drops nothing.
        """
        ...

    def close(self) -> None:
        """Give the device back, e.g. the terminal its echo."""
        ...
