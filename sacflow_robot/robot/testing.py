"""For tests of drivers and of what uses them: a made-up arm, and the conformance kit that every driver can run."""

from __future__ import annotations

import numpy as np

from sacflow_robot.errors import StoppedError
from sacflow_robot.robot.clock import MonotonicClock
from sacflow_robot.spec import ArmSpec, Clock, FloatArray, StepResult


class FakeRobot:
    """An arm in lockstep that does nothing but keep what it is sent; override ``react`` to make it do something.

    Args:
        spec: What it claims to be.
        clock: Its clock; the machine's if None.

    Attributes:
        commands: Actions that it was sent.
        calls: Names of the methods called, in order.
    """

    lockstep = True

    def __init__(self, spec: ArmSpec, clock: Clock | None = None) -> None:
        self.spec, self.clock = spec, MonotonicClock() if clock is None else clock
        self.commands: list[FloatArray] = []
        self.calls: list[str] = []
        self.stopped = self.closed = False
        self.result = self.start(0)

    def start(self, seed: int) -> StepResult:
        """What an episode begins with: zeros."""
        return StepResult({a.key: np.zeros(a.shape, a.dtype) for a in self.spec.observations})

    def react(self, action: FloatArray) -> StepResult:
        """What comes of an action; ``commands`` holds it already."""
        return self.start(0)

    def connect(self) -> None:
        self.calls.append("connect")
        self.stopped = False

    def begin(self, seed: int) -> StepResult:
        self.calls.append("begin")
        self.result = self.start(seed)
        return self.result

    def observe(self) -> StepResult:
        return self.result

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        if self.stopped:
            raise StoppedError("the arm has been stopped; connect it again")
        self.calls.append("command")
        self.commands.append(action)
        self.result = self.react(action)

    def hold(self) -> None:
        self.calls.append("hold")

    def stop(self) -> None:
        self.calls.append("stop")
        self.stopped = True

    def close(self) -> None:
        self.calls.append("close")
        self.closed = True
