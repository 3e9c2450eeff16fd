"""Limits, frozen values and full disks, through the control loop: single cases, each of which was once wrong."""

from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.robot.control.operator import Operator, OperatorRequests
from sacflow_robot.robot.safety.filter import LEAST_SPACING, SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.spec import RobotSpec
from tests.robot.safety.following_robot import (
    LIMITS,
    MOTIONS,
    MS,
    PERIOD,
    POSITIONS,
    SPEED,
    Disk,
    Policy,
    made,
    moving,
    run,
)


@pytest.mark.parametrize("late_ms", [3, 6, 20, 40, 49, 60, 90])
def test_a_late_loop_waits_for_the_next_deadline(late_ms: int) -> None:
    robot = made()
    policy = Policy(robot)
    policy.action[0] = 1.0
    run(
        robot,
        [1.0],
        {12: lambda: setattr(policy, "late_ms", late_ms)},
        actions=policy,
        safety=SafetyFilter(MOTIONS, LIMITS),
    )
    times = np.array([time_ns for time_ns, _ in robot.commands[1:]])
    gaps = np.diff(times) / PERIOD
    assert gaps.min() >= LEAST_SPACING
    assert np.abs((times[-1] - times[0]) / PERIOD % 1 - 0.5) > 0.49, "back on the grid"


def test_the_filter_caps_the_speed_of_a_caller_in_haste() -> None:
    safety, robot = SafetyFilter(MOTIONS, LIMITS), made()
    safety.see(robot.observe().observation, 0)
    safety.enable(0)
    sent = []
    for now_ns in range(0, 40 * PERIOD, PERIOD // 5):
        action = safety.step(np.array([1.0, 0, 0, 0, 0, 0, 0]), now_ns).action
        assert action is not None
        robot.command(action, now_ns + robot.clock.now_ns() + PERIOD)
        sent.append(robot.commands[-1][1][0])
        safety.see(robot.observe().observation, now_ns)
    windows = np.convolve(sent, np.ones(5))
    assert windows.max() <= SPEED * 0.05 * 1.001, "within any period no further than the speed limit allows"


@pytest.mark.parametrize("spec", [MOTIONS, POSITIONS], ids=["motions", "positions"])
def test_values_that_freeze_hold_the_robot_with_the_reason(spec: RobotSpec) -> None:
    robot, limits = made(spec), replace(LIMITS, workspace=None)
    said = run(
        robot, [1.0, 0.0, 0.0], {10: lambda: setattr(robot, "fault", "frozen")}, safety=SafetyFilter(spec, limits)
    )
    assert said[0].startswith("hold: the observed values have not changed for 0.")
    assert "were commanded: they are frozen, or the robot is blocked" in said[0]
    last = moving(robot)[-1]
    assert last - 10 < 0.25 / 0.05 + 8, "within the age that an observation may have, and the time to brake"


def test_values_that_freeze_do_not_move_the_robot_out_of_its_workspace() -> None:
    robot = made()
    robot.place = np.array([0.2, 0.0, 1.0])
    limits = replace(LIMITS, max_observation_age_s=60.0, speed_m_per_s=(2.0,) * 3, acceleration_m_per_s2=(50.0,) * 3)
    run(robot, [1.0], {1: lambda: setattr(robot, "fault", "frozen")}, safety=SafetyFilter(MOTIONS, limits))
    assert robot.place[0] <= 0.3 + 1e-6


def test_standing_still_is_not_frozen() -> None:
    robot, safety = made(), SafetyFilter(MOTIONS, replace(LIMITS, workspace=None, acceleration_m_per_s2=(np.inf,) * 3))
    policy = Policy(robot)
    policy.action[0] = 1.0
    said = run(robot, [], {20: lambda: policy.action.fill(0)}, actions=policy, safety=safety)
    assert said == [] and safety.state is State.RUNNING


def test_positions_without_limits_get_cautious_ones() -> None:
    robot, safety = made(POSITIONS), SafetyFilter(POSITIONS)
    assert "limited to 0.5 rad/s and 2 rad/s^2" in safety.axes.assumed
    run(robot, [1.0, -1.0, 1.0], {}, safety=safety, max_steps=100)
    steps = np.array([motion for _, motion in robot.commands[1:]])
    assert np.abs(steps).max() <= 0.5 * 0.05 + 1e-6 and np.abs(np.diff(steps, axis=0)).max() <= 2 * 0.05**2 + 1e-6


def test_a_full_disk_refuses_to_enable_and_keeps_holding() -> None:
    robot, requests, disk = made(), OperatorRequests(), Disk()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("cannot enable: the disk"):
            disk.full = False
        if not line.startswith("enabled"):
            requests.enable()

    run(
        robot,
        [0.2],
        {10: lambda: setattr(disk, "full", True)},
        safety=SafetyFilter(MOTIONS, LIMITS),
        recorder=disk,
        tell=tell,
        operator=Operator(requests),
    )
    assert said[0] == "hold: the disk is full" and "cannot enable: the disk is full" in said and said[-1] == "enabled"


def test_a_slow_disk_at_enabling_does_not_hold_the_robot_again() -> None:
    robot, requests, disk = made(), OperatorRequests(), Disk()
    mend = disk.mend

    def mending() -> None:
        mend()
        robot.clock.time_ns += 200 * MS

    disk.mend = mending  # type: ignore[method-assign]
    disk.append = lambda step: mend()  # type: ignore[method-assign]
    at = {10: lambda: requests.hold("enough") and None}

    def tell(line: str) -> None:
        said.append(line)
        if "enough" in line or line.startswith("cannot enable"):
            requests.enable()

    said: list[str] = []
    run(robot, [0.2], at, safety=SafetyFilter(MOTIONS, LIMITS), recorder=disk, tell=tell, operator=Operator(requests))
    assert said[-1] == "enabled", said
