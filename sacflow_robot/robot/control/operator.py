"""A person's side of a moving robot: every way to stop, hold and enable it, in one place for every command."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sacflow_robot.errors import RobotError, StoppedError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.control.operator_requests import OperatorInput, OperatorRequests
from sacflow_robot.robot.safety.latch import Latch, State
from sacflow_robot.robot.teleop.intervention import HANDS_OFF, Label, Teleoperator
from sacflow_robot.spec import FloatArray


class Operator:
    """Everything through which a person controls a robot: requests from anywhere, and an input device.

    Args:
        requests: Requests over the network and by signals.
        teleop: Keyboard, gamepad or SpaceMouse; None for none.
    """

    def __init__(self, requests: OperatorRequests | None = None, teleop: Teleoperator | None = None) -> None:
        self.requests = OperatorRequests() if requests is None else requests
        self.teleop = teleop
        self._in_charge = False
        self._label: Label | None = None

    def look(self, commanded: FloatArray, between: bool = False) -> OperatorInput:
        """Take what was requested since the last look; does not wait.

        Args:
            commanded: The last action (A,) that was sent.
            between: Whether no episode is under way: a label is kept for the next look in an episode.
        """
        signal = HANDS_OFF
        stop = ""
        if self.teleop is not None:
            try:
                signal = self.teleop.poll(commanded)
            except Exception as error:  # a device's fault must not end the loop before the robot has stopped
                stop = f"the input device failed: {one_line(error)}"
                self.teleop = None
        if signal.stop:
            stop = "stopped by hand"
        requested = self.requests.take(in_charge=signal.action is not None or self._in_charge)
        self._in_charge = signal.action is not None
        stop = stop or requested.stop
        hold = "the input device is gone" if signal.hold else requested.hold
        enable = (signal.enable or requested.enable) and not (stop or hold)
        self._label = signal.label or self._label
        label = None if between else self._label
        self._label = self._label if between else None
        return OperatorInput(stop, hold, enable, signal.action, label)

    def report(self, safety: Latch) -> None:
        """Note what state the robot is in, as the outcome of the requests taken so far."""
        self.requests.report(safety.state, safety.settled)


class StopOnlyOperator(Operator):
    """The operator of a program that can only be ended: taking over holds the robot, enabling does nothing."""

    def look(self, commanded: FloatArray, between: bool = False) -> OperatorInput:
        found = super().look(commanded, between)
        hold = found.hold or ("" if found.action is None else "a person took the robot over")
        return replace(found, hold=hold, enable=False, action=None, label=None)


def obey(safety: Latch, requested: OperatorInput) -> None:
    """Stop or hold as requested. The caller enables, because that depends on what the robot is doing."""
    if requested.stop:
        safety.halt(requested.stop)
        if safety.at_rest:
            safety.rest()
    elif requested.hold:
        safety.hold(requested.hold)


def refuse_if_stopped(robot: Robot, safety: Latch, operator: Operator) -> None:
    """Refuse to start an episode of a robot that is held or stopped, or is requested to be.

    Raises:
        StoppedError: A stop or a hold was requested.
        RobotError: The robot was held or stopped before, and nobody has enabled it since.
    """
    requested = operator.look(np.zeros(robot.spec.action_dim, np.float32), between=True)
    obey(safety, requested)
    if safety.may_start:
        return
    if safety.state is State.STOPPED:
        robot.stop()
    operator.report(safety)
    if requested.stop or requested.hold:
        how = "stopped" if requested.stop else "held"
        raise StoppedError(f"{how} before the first command: {requested.stop or requested.hold}")
    raise RobotError(f"the robot is not enabled: {safety.reason}; enable it before the next episode")


def settle(robot: Robot, safety: Latch, operator: Operator) -> None:
    """End the motion: hold the robot, stop it if a stop is under way, and only then report its state."""
    try:
        robot.hold()
    finally:
        safety.rest()
        if safety.state is State.STOPPED:
            robot.stop()
        operator.report(safety)
