"""Measure the timing of the control loop, with everything running: a policy server, a simulated robot on its own clock
and the log writer, each in a process of its own, and the safety filter with limits of every kind."""

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sacflow_robot.bench.serve import process, serve_native
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.robot.control.operator import Operator, OperatorRequests
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.control.timing import joined
from sacflow_robot.robot.drivers.rtsim import ProcessRobot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import Box, Cone, SafetyLimits
from sacflow_robot.serve.autotune import quickest
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.spec import RobotSpec

_SEED = 40_000

# A Panda's, but patient: what is measured is the loop's time, which a hold would change.
LIMITS = SafetyLimits(
    speed_m_per_s=(0.85,) * 3,
    acceleration_m_per_s2=(13.0,) * 3,
    jerk_m_per_s3=(6500.0,) * 3,
    turn_rad_per_s=(1.25,) * 3,
    turn_acceleration_rad_per_s2=(25.0,) * 3,
    turn_jerk_rad_per_s3=(12500.0,) * 3,
    workspace=Box((-0.4, -0.4, 0.8), (0.4, 0.4, 1.4)),
    keep_out=(Box((-0.75, -0.2, 0.0), (-0.45, 0.2, 1.35), "the base"),),
    cone=Cone((0, 0, -1), 0.8),
    max_observation_age_s=5.0,
    max_action_age_s=5.0,
    patience_s=5.0,
    hold_to_stop_s=3600.0,
)


class _AtRate(ProcessRobot):
    """The simulated robot, commanded at another rate than its task's."""

    def __init__(self, task: str, rate_hz: float) -> None:
        self._rate_hz = rate_hz
        super().__init__(task)

    @property
    def spec(self) -> RobotSpec:
        return replace(super().spec, control_rate_hz=self._rate_hz)


def measure(policy: Path, rate_hz: float, seconds: float) -> dict[str, Any]:
    """Run episodes for so long; percentiles of the period in microseconds, deadlines missed, steps held, steps.

    Raises:
        ServerError, RobotError: The server or the robot does not start.
    """
    engine = quickest(policy)[0].engine
    with (
        tempfile.TemporaryDirectory() as folder,
        process(serve_native, policy, engine, "tcp://127.0.0.1:*") as address,
        PolicyClient(address, 5.0, swap="episode") as client,
        closing(_AtRate(client.spec.robot.task, rate_hz)) as robot,
        StepRecorder(Path(folder) / "episodes.zarr", robot.spec) as log,
    ):
        robot.connect()
        chooser, safety, requests = ActionQueue(client), SafetyFilter(robot.spec, LIMITS), OperatorRequests()

        def robot_again(line: str) -> None:  # a loop that was silent for 2.5 periods holds; the measurement goes on
            requests.enable()

        runs, left, seed = [], round(seconds * rate_hz), _SEED
        while left > 0:
            version = client.begin_episode(seed)
            run = run_episode(
                *(robot, client, seed),
                RunConfig(
                    policy_version=version,
                    recorder=log,
                    safety=safety,
                    actions=chooser,
                    tell=robot_again,
                    max_steps=left,
                    operator=Operator(requests),
                ),
            )
            runs.append(run)
            left, seed = left - len(run.episode), seed + 1
    timing = joined([run.timing for run in runs])
    return {**timing.row(), "held": sum(run.held for run in runs), "steps": len(timing.sent_ns)}
