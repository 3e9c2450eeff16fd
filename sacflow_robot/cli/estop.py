"""``sacflow-robot estop``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sacflow_robot.errors import RobotError, UsageError


@dataclass(frozen=True)
class Estop:
    """Stop a running robot: it comes to rest within its limits, and takes no command until it is enabled again.

    It says which state was reached: stopped, hold or running. This is software over a network. It does not take the
    place of the robot's own stop button.

    Attributes:
        address: Where the running robot listens: what was given to run --estop.
        key: Shared key file: the same that run --estop-key was given.
        reason: Shown in the terminal of the program that moves the robot.
        enable: Enable it again instead, after a hold or a stop. Look at the robot first.
        timeout: Longest wait for the state (s).
    """

    address: Annotated[str, tyro.conf.Positional]
    key: Path | None = None
    reason: str = ""
    enable: bool = False
    timeout: float = 2.0

    def run(self) -> int:
        from sacflow_robot.robot.control.estop import PENDING, read_key, request

        if not 0 < self.timeout <= 60:
            raise UsageError("--timeout must be above 0 and at most 60")
        state = request(
            self.address, "enable" if self.enable else "stop", self.reason, read_key(self.key), self.timeout
        )
        within = f"within {self.timeout:g} s"
        if self.enable and state == PENDING:
            raise RobotError(f"{self.address}: asked to enable the robot, but it was not enabled {within}; look at it")
        if self.enable and state != "running":
            raise RobotError(
                f"{self.address}: not enabled, the robot stays in {state}; the program that moves it says why"
            )
        if state == PENDING:
            raise RobotError(
                f"{self.address}: the stop was accepted, but the robot was not seen to stop {within}; "
                "USE THE ROBOT'S OWN STOP BUTTON"
            )
        if not self.enable and state == "running":
            raise RobotError(f"{self.address}: the robot was stopped, and somebody has enabled it again since")
        print(f"{self.address}: {state}")
        return 0
