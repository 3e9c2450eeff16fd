"""Real processes, killed with -9 in the middle of an episode: the robot holds, no step is lost, a person enables it, it goes on."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.resilient_recorder import ResilientRecorder
from sacflow_robot.episode import Source, StepFlag, StepResult
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.robot.control.operator import Operator, OperatorRequests
from sacflow_robot.robot.control.run_config import EpisodeRun, RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.rtsim import ProcessRobot
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.serve.client import PolicyClient

pytestmark = pytest.mark.realtime

LIFT = Path(__file__).parents[2] / "policies" / "lift.onnx"
PERIOD = 50_000_000
# The policy's own motions, slowed, so that an episode lasts long enough for something to happen in it; patient with a machine
# that does many other things, but for what is tested: missing actions.
LIMITS = SafetyLimits(
    speed_m_per_s=(0.15,) * 3, acceleration_m_per_s2=(3.0,) * 3, max_observation_age_s=0.5, hold_to_stop_s=60.0
)

AFTERWARDS = 30  # steps that an episode goes on for once the robot is enabled again


class EndingRobot(ProcessRobot):
    """Ends its episode a while after ``enabled`` was said, so that none is longer than what happens in it."""

    def __init__(self) -> None:
        super().__init__("lift", RtsimOptions(horizon_s=120))
        self.end_ns = 0

    def begin(self, seed: int) -> StepResult:
        self.end_ns = 0
        return super().begin(seed)

    def observe(self) -> StepResult:
        seen = super().observe()
        return replace(seen, truncated=True) if 0 < self.end_ns < self.clock.now_ns() else seen

    def end_after(self, steps: int) -> None:
        self.end_ns = self.clock.now_ns() + steps * PERIOD


class Server:
    """A policy server in a process of its own, that can be killed and started again at the same address."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return  # held for another reason, the robot is enabled by somebody who need not mend anything
        command = [sys.executable, "-m", "sacflow_robot", "serve", "--policy", str(LIFT), "--bind", self.address]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        PolicyClient(self.address, 60.0).close()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def robot() -> Iterator[EndingRobot]:
    made = EndingRobot()
    yield made
    made.close()


def run_with(
    robot: EndingRobot,
    server: Server,
    log: Path,
    at_step: int,
    fail: Callable[[StepRecorder], None],
    mend: Callable[[], None],
) -> tuple[EpisodeRun, list[tuple[int, str]]]:
    """An episode in which something fails; a person mends it, and enables the robot once it is at rest. Returns what was said, and
    when."""
    requests, said = OperatorRequests(), []  # type: ignore[var-annotated]

    def person() -> None:
        mend()
        time.sleep(0.5)  # a person looks at the robot first
        requests.enable()

    def tell(line: str) -> None:
        said.append((time.monotonic_ns(), line))
        if line == "enabled":
            robot.end_after(AFTERWARDS)
        if line.startswith(("hold", "cannot enable")):
            threading.Thread(target=person).start()

    class Failing(ActionQueue):
        """Something fails as the step of that number is about to be chosen."""

        count = 0

        def step(self, *arguments, **named):  # type: ignore[no-untyped-def]
            self.count += 1
            if self.count == at_step:
                fail(recorder)
                said.append((time.monotonic_ns(), "failed"))
            return super().step(*arguments, **named)

    with PolicyClient(server.address, 5.0, swap="episode") as client:
        robot.connect()
        version, safety = client.begin_episode(1), SafetyFilter(robot.spec, LIMITS)
        with ResilientRecorder(log, robot.spec) as recorder:
            run = run_episode(
                *(robot, client, 1),
                RunConfig(
                    policy_version=version,
                    recorder=recorder,
                    safety=safety,
                    actions=Failing(client),
                    tell=tell,
                    max_steps=400,
                    operator=Operator(requests),
                ),
            )
    return run, said


def check_logged(run: EpisodeRun, log: Path) -> None:
    """All that was commanded is in the log, in one episode, whatever failed on the way."""
    (episode,) = EpisodeLog.open(log).episodes()
    assert np.array_equal(episode.action, run.episode.action)
    assert np.array_equal(episode.source, run.episode.source)


def test_a_killed_server(robot: EndingRobot, server: Server, tmp_path: Path) -> None:
    run, said = run_with(robot, server, tmp_path / "a.zarr", 12, lambda log: server.kill(), server.start)
    lines = [line for _, line in said]
    assert lines[0] == "failed" and lines[1].startswith("hold: no action came") and "enabled" in lines
    after = lines[lines.index("enabled") :]
    assert not any("connection" in line for line in after), "made again while held, so that one act is enough"
    flags, source = run.episode.flags, run.episode.source
    assert flags is not None and (source == Source.HOLD).any()
    missing = int(np.argmax(source == Source.HOLD))
    held_at, sent = said[1][0], run.timing.sent_ns
    assert held_at - sent[missing] <= 2 * PERIOD + 20_000_000, "in hold within two periods of the first missing action"
    assert (flags[source == Source.HOLD] & StepFlag.HELD).all()
    enabled = int(np.flatnonzero(source == Source.HOLD)[-1]) + 1
    assert (source[enabled:] == Source.POLICY).all() and len(source) - enabled > 10, "enabled again, it goes on"
    still = run.episode.action[missing + 6 : enabled, :6]
    assert len(still) and np.abs(still).max() == 0
    check_logged(run, tmp_path / "a.zarr")


def test_a_killed_recorder(robot: EndingRobot, server: Server, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(log: StepRecorder) -> None:
        killed.append(log._writer.pid)  # type: ignore[union-attr]
        os.kill(killed[0], signal.SIGKILL)

    run, said = run_with(robot, server, tmp_path / "b.zarr", 12, kill, lambda: None)
    lines = [line for _, line in said]
    assert killed and any(
        line.startswith("hold: step not logged: the process that writes the log has died") for line in lines
    )
    assert "enabled" in lines and run.episode.source[-1] == Source.POLICY
    check_logged(run, tmp_path / "b.zarr")


def test_a_killed_network(robot: EndingRobot, server: Server, tmp_path: Path) -> None:
    run, said = run_with(
        robot, server, tmp_path / "c.zarr", 12, lambda log: robot.network(True), lambda: robot.network(False)
    )
    lines = [line for _, line in said]
    assert lines[0] == "failed" and lines[1].startswith("hold: the last observation is")
    assert said[1][0] - said[0][0] <= (0.5 + 0.1) * 1e9 + 2 * PERIOD, "the age that is allowed, then the patience"
    assert run.episode.source[-1] == Source.POLICY and "enabled" in lines
    check_logged(run, tmp_path / "c.zarr")
