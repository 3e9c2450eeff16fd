"""``sacflow-robot estop``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError


@dataclass(frozen=True)
class Estop:
    """Stop a running arm: it comes to rest within its limits, and takes no command until it is armed again.

    This is software over a network. It does not take the place of the arm's own stop button.

    Attributes:
        address: Where the running arm listens: what was given to run --estop.
        key: Shared key file, if it was given one.
        reason: What to say there.
        arm: Arm it again instead, after a hold or a stop. Look at the arm first.
        timeout: Longest wait for the answer (s).
    """

    address: Annotated[str, tyro.conf.Positional]
    key: Path | None = None
    reason: str = ""
    arm: bool = False
    timeout: float = 2.0

    def run(self) -> int:
        from sacflow_robot.robot.estop import read_key, request

        if not 0 < self.timeout <= 60:
            raise UsageError("--timeout must be above 0 and at most 60")
        request(self.address, "arm" if self.arm else "stop", self.reason, read_key(self.key), self.timeout)
        common.results().print(f"{self.address}: {'arming' if self.arm else 'stopping'}")
        return 0
