"""A person's side of a moving robot: every way to stop, hold and enable it, in one place for every command."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sacflow_robot.errors import one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.control.operator_requests import OperatorRequests
from sacflow_robot.robot.safety.latch import Latch, State
from sacflow_robot.robot.teleop.intervention import HANDS_OFF, Label, Teleoperator, TeleopSignal
from sacflow_robot.spec import FloatArray


@dataclass(frozen=True, slots=True)
class Requests:
    """What a person asks for in one look. A stop takes precedence over a hold, and both take precedence over enabling.

    Attributes:
        stop: Why to stop; empty for no stop.
        hold: Why to hold; empty for no hold.
        enable: Whether to enable.
        signal: The input device's signal: the action and the label.
    """

    stop: str = ""
    hold: str = ""
    enable: bool = False
    signal: TeleopSignal = HANDS_OFF


class Operator:
    """Everything through which a person controls a robot: requests from anywhere, and an input device.

    Args:
        switches: Requests over the network and by signals.
        human: Keyboard, gamepad or SpaceMouse; None for none.
    """

    def __init__(self, switches: OperatorRequests | None = None, human: Teleoperator | None = None) -> None:
        self.switches = OperatorRequests() if switches is None else switches
        self.human = human
        self._in_charge = False
        self._label: Label | None = None

    def look(self, commanded: FloatArray, between: bool = False) -> Requests:
        """Take what was asked for since the last look; does not wait.

        Args:
            commanded: The last action (A,) that was sent.
            between: Whether no episode is under way: a label is kept for the next look in an episode.
        """
        signal, stop = HANDS_OFF, ""
        if self.human is not None:
            try:
                signal = self.human.poll(commanded)
            except Exception as error:  # a device's fault must not end the loop before the robot has stopped
                stop = f"the input device failed: {one_line(error)}"
                self.human = None
        if signal.stop:
            stop = "stopped by hand"
        asked = self.switches.take_all()
        in_charge = signal.action is not None or self._in_charge
        self._in_charge = signal.action is not None
        hold = "the input device is gone" if signal.hold else asked.hold
        if asked.hangup:
            lost = "the terminal is gone"
            stop, hold = (stop or lost, hold) if in_charge else (stop, hold or lost)
        stop = stop or asked.stop
        enable = (signal.enable or asked.enable) and not stop and not hold
        self._label = signal.label or self._label
        signal = replace(signal, label=None if between else self._label)
        self._label = self._label if between else None
        return Requests(stop, hold, enable, signal)

    def report(self, safety: Latch) -> None:
        """Tell whoever asked what state the robot is in."""
        self.switches.report(str(safety.state), safety.settled)


def obey(safety: Latch, requests: Requests) -> None:
    """Stop or hold as requested. The caller enables, because that depends on what the robot is doing."""
    if requests.stop:
        safety.halt(requests.stop)
        if safety.at_rest:
            safety.rest()
    elif requests.hold:
        safety.hold(requests.hold)


def settle(robot: Robot, safety: Latch, operator: Operator) -> None:
    """End the motion: hold the robot, stop it if a stop is under way, and only then say what state it is in."""
    robot.hold()
    safety.rest()
    if safety.state is State.STOPPED:
        robot.stop()
    operator.report(safety)


def heed(safety: Latch, operator: Operator, commanded: FloatArray) -> None:
    """Look, and stop or hold as requested, in a program that can only be ended: taking over holds, enabling does nothing.

    Args:
        safety: What every command passes.
        operator: A person's requests and input device.
        commanded: The last action (A,) that was sent.
    """
    requests = operator.look(commanded)
    obey(safety, requests)
    if requests.signal.action is not None:
        safety.hold("a person took the robot over")
