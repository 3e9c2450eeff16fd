"""``sacflow-robot serve``."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common


@dataclass(frozen=True)
class Serve:
    """Serve a policy file over ZeroMQ until Ctrl-C or SIGTERM.

    The port is open to whoever reaches it: keep the default, which is this computer alone, or a network you trust.

    Attributes:
        policy: Policy file.
        bind: Address to listen at.
    """

    policy: Path
    bind: str = "tcp://127.0.0.1:5555"

    def run(self) -> int:
        from sacflow_robot.serve.policy import OnnxPolicy
        from sacflow_robot.serve.server import PolicyServer

        out = common.console()
        policy = OnnxPolicy(self.policy)
        spec = policy.spec
        with PolicyServer(policy, self.bind) as server:
            for asked in (signal.SIGINT, signal.SIGTERM):
                signal.signal(asked, lambda *_: server.stop())
            out.print(
                f"serving {self.policy} (version {policy.version}, {spec.velocity}, K = {spec.euler_steps}, "
                f"H = {spec.chunk_length}, self-test passed) for {spec.arm.robot} {spec.arm.task} at {server.address}"
            )
            command = common.command_line("run --robot", f"sim:{spec.arm.task}", "--server", server.address)
            out.print(f"drive the simulated arm with:\n  {command}")
            server.run()
            out.print(f"stopped after {server.requests:,} requests")
        return 0
