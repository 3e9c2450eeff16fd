"""Shared by every command that moves a robot: its filter, and a person's ways to stop it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sacflow_robot.cli import common
from sacflow_robot.interfaces import Robot
from sacflow_robot.spec import RobotSpec

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile
    from sacflow_robot.robot.control.operator import OperatorRequests, StopOnlyOperator
    from sacflow_robot.robot.control.run_config import Safety
    from sacflow_robot.robot.teleop.intervention import Teleoperator


def safety_filter(robot: Robot, profile: Profile | None) -> Safety:
    """The filter of every command to the robot; says what limits were assumed."""
    from sacflow_robot.robot.control.run_config import default_safety
    from sacflow_robot.robot.safety.filter import SafetyFilter

    safety = default_safety(robot, profile)
    if isinstance(safety, SafetyFilter) and safety.axes.assumed:
        common.console().print(f"{robot.spec.robot}: {safety.axes.assumed}")
    return safety


def profile_of(path: Path | None) -> Profile | None:
    """The calibration profile of that file; None for none."""
    if path is None:
        return None
    from sacflow_robot.calibrate.profile import load_profile

    return load_profile(path)


def with_clock(robot: str, clock: str | None) -> str:
    """The name of a robot's driver with a clock among what it takes."""
    return robot if clock is None else f"{robot}{'&' if '?' in robot else '?'}clock={clock}"


def teller(robot: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """A function that prints a message about a robot, with the command that enables it again."""

    def tell(line: str) -> None:
        enabling = f"; enable it again with: kill -USR2 {os.getpid()}" if line.startswith(("hold", "stopped")) else ""
        say(f"{robot}: {line}{enabling}")

    return tell


@dataclass(frozen=True)
class OperatorOptions:
    """A person's ways to stop a moving robot, and to take it over; the same for every command that moves one.

    Attributes:
        estop: Listen for stops at this address, e.g. tcp://127.0.0.1:5560.
        estop_key: Shared key file that a stop has to show.
        keyboard: Let a person stop with the keys of this terminal; with run, also take over and label.
        teleop: The same with a gamepad or spacemouse, or e.g. gamepad:/dev/input/js1; goes with --keyboard.
    """

    estop: str | None = None
    estop_key: Path | None = None
    keyboard: bool = False
    teleop: str | None = None

    def listen(self, requests: OperatorRequests, stack: ExitStack) -> None:
        """Listen for stops over the network while the stack lasts."""
        from sacflow_robot.robot.control.estop import read_key
        from sacflow_robot.robot.control.stop_server import StopServer

        if self.estop is not None:
            server = stack.enter_context(StopServer(self.estop, requests, read_key(self.estop_key)))
            common.console().print(f"stop it with: {common.command_line('estop', server.address)}")

    def teleoperator(self, robot: RobotSpec, say: Callable[[str], None], stack: ExitStack) -> Teleoperator | None:
        """The input devices, open while the stack lasts; None for none."""
        inputs: list[Teleoperator] = []
        if self.teleop is not None:
            from sacflow_robot.robot.teleop.gamepad import open_handheld

            inputs.append(stack.enter_context(closing(open_handheld(self.teleop, robot, say))))
        if self.keyboard:
            from sacflow_robot.robot.teleop.keyboard import Keyboard

            inputs.append(stack.enter_context(closing(Keyboard(robot, say=say))))
        if len(inputs) < 2:
            return inputs[0] if inputs else None
        from sacflow_robot.robot.teleop.gamepad import Both

        return Both(*inputs)


@contextmanager
def operating(options: OperatorOptions, robot: RobotSpec, requests: OperatorRequests) -> Iterator[StopOnlyOperator]:
    """A person's ways to stop a robot that runs something other than episodes, while this lasts.

    The caller passes signals on to ``requests``, from before it makes the robot.

    Raises:
        KeyboardInterrupt: A signal asked the program to end; the robot is at rest.
    """
    from sacflow_robot.robot.control.operator import StopOnlyOperator
    from sacflow_robot.robot.control.session import watched

    with ExitStack() as stack:
        options.listen(requests, stack)
        teleop = options.teleoperator(robot, common.console().print, stack)
        with watched(requests):
            yield StopOnlyOperator(requests, teleop)
