"""The simulated robot in a process of its own, in real time."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from sacflow_robot.errors import RobotError, StoppedError
from sacflow_robot.robot.drivers.rtsim import ProcessRobot
from sacflow_robot.spec import FloatArray

MS = 1_000_000


@pytest.fixture(scope="module")
def running_robot() -> Iterator[ProcessRobot]:
    robot = ProcessRobot("lift")
    yield robot
    robot.close()


@pytest.fixture
def process_robot(running_robot: ProcessRobot) -> ProcessRobot:
    """A connected robot; its process is started anew only where a test has killed it."""
    running_robot.connect()
    return running_robot


@pytest.mark.realtime
def test_an_arm_whose_process_dies_is_an_error_and_can_be_connected_again(process_robot: ProcessRobot) -> None:
    process_robot.begin(1)
    assert process_robot.pid is not None
    os.kill(process_robot.pid, signal.SIGKILL)
    while process_robot._process is not None and process_robot._process.poll() is None:
        time.sleep(0.01)
    for call in (
        process_robot.observe,
        lambda: process_robot.command(np.zeros(7, np.float32), process_robot.clock.now_ns() + 100 * MS),
    ):
        with pytest.raises(RobotError, match=r"does not run; connect it \(its process ended with status -9\)"):
            call()
    for _ in range(2):
        process_robot.hold()
        process_robot.stop()
    process_robot.connect()
    assert process_robot.begin(2).time_ns is not None


def seen_after(robot: ProcessRobot, seconds: float) -> dict[str, FloatArray]:
    until_ns = robot.clock.now_ns() + round(seconds * 1e9)
    while (robot.observe().time_ns or 0) < until_ns:
        time.sleep(0.01)
    return robot.observe().observation


@pytest.mark.realtime
def test_what_fails_in_the_process_is_told_and_it_lives_on(process_robot: ProcessRobot) -> None:
    process_robot.begin(1)
    process_robot._send({"do": "begin", "seed": "seven", "episode": 1})
    with pytest.raises(RobotError, match=r"rtsim:lift failed: Error: Seed must be"):
        seen_after(process_robot, 5.0)
    assert process_robot.begin(2).time_ns is not None
    seen_after(process_robot, 0.1)


@pytest.mark.realtime
def test_after_a_stop_nothing_moves_before_it_is_connected(process_robot: ProcessRobot) -> None:
    process_robot.begin(1)
    until_ns = process_robot.clock.now_ns() + 10**10
    process_robot.command(np.array([1, 0, 0, 0, 0, 0, -1], np.float32), until_ns)
    seen_after(process_robot, 0.1)
    process_robot.stop()
    # A command that left before the stop was heard of, as from a thread in the midst of sending it.
    action = np.array([1, 0, 0, 0, 0, 0, 1], np.float32)
    process_robot._send(
        {"do": "command", "action": action.tobytes(), "until": until_ns, "at": process_robot.clock.now_ns()}
    )
    before = seen_after(process_robot, 0.5)
    after = seen_after(process_robot, 0.5)
    assert np.abs(after["robot0_eef_pos"] - before["robot0_eef_pos"]).max() < 5e-3, "a command moves it tenfold"
    assert after["robot0_gripper_qpos"][0] < 0.035, "nor did the fingers go on opening, to 0.04"
    process_robot.connect()
    process_robot.command(action, process_robot.clock.now_ns() + 10**10)
    moved = seen_after(process_robot, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_robot, "_start", process_robot.stop)
        patch.setattr(process_robot, "_process", None)
        with pytest.raises(StoppedError):
            process_robot.connect()
    assert moved["robot0_eef_pos"][0] - after["robot0_eef_pos"][0] > 0.005


@pytest.mark.realtime
def test_commands_that_came_in_time_count_though_the_arm_was_kept_waiting_for_a_core(
    process_robot: ProcessRobot,
) -> None:
    process_robot.connect()
    process_robot.begin(3)
    assert process_robot.pid is not None
    os.kill(process_robot.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            sent_ns = process_robot.clock.now_ns()
            process_robot.command(np.array([0.5, 0, 0, 0, 0, 0, -1], np.float32), sent_ns + 100 * MS)
            time.sleep(0.1)
    finally:
        os.kill(process_robot.pid, signal.SIGCONT)
    seen = process_robot.observe()
    while (seen.time_ns or 0) < sent_ns + 300 * MS:
        time.sleep(0.01)
        seen = process_robot.observe()
    assert [number for number, _ in process_robot.applied] == [0, 1, 2]
