"""``sacflow-robot twin franka``."""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common


@dataclass(frozen=True)
class TwinFranka:
    """Stand in for a Franka Panda and its real-time computer: deoxys's wire, over robosuite's Panda, at the robot's rates.

    Whatever speaks deoxys can drive it. An episode starts anew, and faults are made, on a socket that only the twin has
    (SACFLOW.RESET in the file); object poses are published as a tracker would (SACFLOW.OBJECTS).

    Attributes:
        config: deoxys's YAML file, the same that the driver reads.
    """

    config: Path = Path("launch/deoxys_twin.yml")

    def run(self) -> int:
        from sacflow_robot.robot.drivers.deoxys.config import load_config
        from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin

        config, out = load_config(self.config), common.console()
        with closing(FrankaTwin(config)) as twin:
            for asked in (signal.SIGINT, signal.SIGTERM):
                signal.signal(asked, lambda *_: twin.stop())
            out.print(
                f"twin of a Franka Panda before {config.task}: states at tcp://{config.nuc_ip}:{config.state_port} "
                f"({config.state_rate_hz:g} Hz), commands from tcp://{config.pc_ip}:{config.command_port} "
                f"({config.policy_rate_hz:g} Hz)"
            )
            out.print(f"drive it with:\n  {common.command_line('run --robot', f'deoxys:{self.config}')}")
            twin.run()
            out.print(
                f"stopped after {twin.commands:,} robot commands, {twin.refused} refused; {twin.overruns} ticks were late"
            )
        return 0
